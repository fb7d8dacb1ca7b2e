"""Comparing ways to do one thing: interleaved in random order, with a control, ratios of medians with intervals."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_dilated.timing import interleave

CONTROL = "again"


class Comparison(NamedTuple):
    """How many times faster than the baseline something is, with a 95 % interval."""

    ratio: float
    low: float
    high: float


def compare(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, seed: int = 0
) -> tuple[dict[str, list[float]], dict[str, Comparison]]:
    """Time calls, each once a round in another random order; the first is the baseline and runs a second time.

    Returns:
        Seconds of every sample by name, and comparisons with the baseline; :data:`CONTROL` is the baseline's second
        turn, which shows the noise.

    Example:
        >>> seconds, found = compare({"one": lambda: None, "other": lambda: None}, rounds=3)
        >>> list(found), len(seconds["one"])
        (['again', 'other'], 3)
    """
    baseline = next(iter(calls))
    everything = {baseline: calls[baseline], CONTROL: calls[baseline], **calls}
    for call in everything.values():
        call()
    seconds = interleave(everything, dict.fromkeys(everything, 1), "cpu", rounds=rounds, seed=seed)
    others = [name for name in everything if name != baseline]
    return seconds, {name: Comparison(*ratio(seconds[baseline], seconds[name])) for name in others}


def ratio(
    baseline: Sequence[float], seconds: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return median(baseline) / median(seconds) with its 95 % bootstrap interval.

    Example:
        >>> ratio([4.0, 4.0, 4.0], [2.0, 2.0, 2.0])
        (2.0, 2.0, 2.0)
    """
    generator = np.random.default_rng(seed)
    medians = [np.median(generator.choice(np.asarray(x), (draws, len(x))), axis=1) for x in (baseline, seconds)]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return statistics.median(baseline) / statistics.median(seconds), float(low), float(high)
