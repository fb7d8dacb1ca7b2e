"""The ablation's table."""

from collections import defaultdict
from collections.abc import Iterator
from math import sqrt
from typing import Any

from hf_dilated.evaluation.report import Table, short_count

Row = dict[str, Any]


def interval(found: int, asked: int, deviations: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share, by default with a confidence of 95 %.

    Example:
        >>> low, high = interval(40, 40)
        >>> round(low, 3), high
        (0.912, 1.0)
    """
    share, squared = found / asked, deviations**2
    middle = share + squared / (2 * asked)
    half = deviations * sqrt(share * (1 - share) / asked + squared / (4 * asked**2))
    whole = 1 + squared / asked
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def summary(rows: list[Row], dense: str) -> Table:
    """Return a line for every variant, way of reading, and time before or after tuning.

    Args:
        rows: What :mod:`ablation` writes for each variant.
        dense: Name of the variant that the others are compared with.
    """
    lengths = sorted({found["tokens"] for row in rows for found in row["after"]["retrieval"]})
    last = "perplexity at the end"
    header = ["variant", "tuning", "read with", "attention operations", "step", last, "against dense", "short texts"]
    base = next((_at_end(row["after"])["dense"] for row in rows if row["variant"] == dense), None)
    body = [
        line
        for row in rows
        for when in ("before", "after")
        for attention, line in _lines(row, when, base, lengths)
        if row["variant"] == dense or attention in (row["own"], "dense")  # windows are read by all: shown once
    ]
    return Table("Variants", header + [f"pass keys at {short_count(length)}" for length in lengths], body)


def _at_end(report: Row) -> dict[str, float]:
    """Perplexity at the last positions, by attention."""
    return {found["attention"]: found["perplexity"] for found in report["perplexity"]}


def _lines(row: Row, when: str, base: float | None, lengths: list[int]) -> Iterator[tuple[str, list[str]]]:
    report, cost = row[when], row["cost"]
    short = {found["attention"]: f"{found['perplexity']:.3f}" for found in report["short"]}
    keys: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for found in report["retrieval"]:
        total = keys[found["attention"], found["tokens"]]
        total[0] += found["found"]
        total[1] += found["asked"]
    share = cost["operations"]["attention"] / cost["operations"]["dense attention"]
    costs = [f"{share:.0%}", f"{cost['seconds'] * 1e3:.0f} ms, dense {cost['dense_seconds'] * 1e3:.0f}"]
    for attention, perplexity in _at_end(report).items():
        against = f"{perplexity / base - 1:+.1%}" if base else "–"
        shares = [_share(*keys[attention, length]) for length in lengths]
        quality = [f"{perplexity:.3f}", against, short.get(attention, "–"), *shares]
        price = costs if attention == row["own"] else ["–", "–"]
        yield attention, [row["variant"], when, attention, *price, *quality]


def _share(found: int, asked: int) -> str:
    if not asked:
        return "–"
    low, high = interval(found, asked)
    return f"{found / asked:.0%} ({100 * low:.0f}–{100 * high:.0f})"
