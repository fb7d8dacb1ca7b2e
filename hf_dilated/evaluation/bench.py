"""How fast a model is with several attentions, on this machine: interleaved, with a control."""

import copy
import errno
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from hf_dilated.evaluation.perplexity import PeakMemory
from hf_dilated.evaluation.suite import DENSE
from hf_dilated.integration.cache import BlockSparseCache, DilatedCache
from hf_dilated.integration.reach import reach_of
from hf_dilated.memory.measure import ratio
from hf_dilated.timing import (
    SHORTEST_SAMPLE,
    Call,
    interleave,
    on_device,
    release,
    repeats_for,
    sample_seconds,
    time_call,
)

CONTROL = " (again)"
FEWEST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured.

    Args:
        lengths: Tokens of an input, or before the token that is decoded.
        attentions: Names of backends; ``"dense"`` is sdpa. The first is what the others are compared with.
        modes: Some of :data:`MODES`.
        rounds: Samples of each attention; fewer, but at least three, if the budget ends before.
        seconds: Budget; what does not fit into it is left out.

    Raises:
        ValueError: If a mode is unknown, or something is missing.
    """

    lengths: Sequence[int]
    attentions: Sequence[str] = (DENSE, "dilated")
    modes: Sequence[str] = ("forward", "step", "decode")
    rounds: int = 7
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.modes) - set(MODES)):
            raise ValueError(f"modes: unknown {', '.join(unknown)}; known are {', '.join(MODES)}")
        if len(set(self.attentions)) < len(self.attentions):
            raise ValueError("attentions: each may be named once; the first is measured twice anyway, as the control")
        for name in ("lengths", "attentions", "modes"):
            if not getattr(self, name):
                raise ValueError(f"{name}: name at least one")
        if min(self.lengths) < 3:
            raise ValueError(f"lengths: expected at least 3 tokens, got {min(self.lengths)}")
        if self.rounds < FEWEST_ROUNDS:
            raise ValueError(f"rounds: expected at least {FEWEST_ROUNDS}, got {self.rounds}")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One attention in one mode at one length.

    Attributes:
        seconds: Of every sample; empty if it was not measured.
        median: Of the samples.
        speedup: How many times faster than the first attention, with the ends of its 95 % interval.
        peak_bytes: Most memory in use beyond what was in use before; None where the system does not tell.
        reason: Why there is no measurement.
    """

    mode: str
    tokens: int
    attention: str
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    speedup: tuple[float, float, float] | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


Advance = Callable[[list[Timing]], None]


def bench(model: Any, plan: Bench, advance: Advance = lambda rows: None) -> list[Timing]:
    """Time a causal language model with every attention of the plan, on random tokens.

    Args:
        model: A causal language model of Transformers; it stays as it is.
        plan: What to measure.
        advance: Called with all rows so far: before anything is measured, and after every length and mode.

    Raises:
        UnsupportedError: If the model refuses an attention.
        ValueError: As :func:`check`, and if the mode ``step`` would clear gradients that the model holds.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
        >>> rows = bench(model, Bench(lengths=[16], modes=["decode"], rounds=3))
        >>> [(row.attention, len(row.seconds)) for row in rows]
        [('dense', 3), ('dense (again)', 3), ('dilated', 3)]
    """
    check(model.config, plan, model.device)
    if "step" in plan.modes and any(parameter.grad is not None for parameter in model.parameters()):
        raise ValueError("modes: step would clear the gradients that the model holds; call model.zero_grad() first")
    models = {name: _sharing_weights(model, name) for name in plan.attentions}
    deadline = time.monotonic() + plan.seconds
    rows: list[Timing] = []
    advance(rows)
    with on_device(model.device):
        for length in plan.lengths:
            vocabulary = model.config.get_text_config().vocab_size
            ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
            for mode in plan.modes:
                rows += _measure(models, mode, ids, plan.rounds, deadline)
                advance(rows)
    return rows


def check(config: Any, plan: Bench, device: torch.device) -> None:
    """Refuse what cannot be measured; needs no weights.

    Raises:
        ValueError: If there is no clock for the device, or an input goes beyond the model's positions.
    """
    if device.type not in SHORTEST_SAMPLE:
        raise ValueError(f"device: times are taken on {' and '.join(SHORTEST_SAMPLE)}, not on {device.type}")
    reach, longest = reach_of(config), max(plan.lengths)
    if reach is not None and longest > reach and not getattr(config.get_text_config(), "rope_parameters", None):
        raise ValueError(
            f"lengths: the model has no rotary positions, so it reads at most {reach:,} tokens; got {longest:,}"
        )


def _sharing_weights(model: Any, attention: str) -> Any:
    """A second model of the same tensors with another attention: nothing is switched while the clock runs."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared).eval()
    other.set_attn_implementation("sdpa" if attention == DENSE else attention)
    return other


def _forward(model: Any, ids: Tensor) -> Call:
    """Read the whole input without a cache."""

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call


def _step(model: Any, ids: Tensor) -> Call:
    """Loss and gradients, without dropout and without an optimizer's own work."""

    def call() -> None:
        try:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        finally:
            model.zero_grad(set_to_none=True)

    return call


def _decode(model: Any, ids: Tensor, cache: Cache | None = None) -> Call:
    """The last token behind the cache of those before it, again and again."""
    with torch.no_grad():
        given = {"past_key_values": cache} if cache else {}
        cache = model(input_ids=ids[:, :-2], use_cache=True, logits_to_keep=1, **given).past_key_values
        model(input_ids=ids[:, -2:-1], past_key_values=cache, use_cache=True)  # some caches now make room for many
    assert cache is not None
    before = [(layer, dict(vars(layer))) for layer in cache.layers]

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        for layer, state in before:
            vars(layer).update(state)

    return call


def _decode_kept(model: Any, ids: Tensor) -> Call:
    """The same with the cache that keeps only what the pattern can see; dense attention sees everything."""
    cache = CACHES.get(model.config.get_text_config()._attn_implementation, DynamicCache)
    return _decode(model, ids, cache(config=model.config))


CACHES: Mapping[str, Any] = {cache.backend: cache for cache in (DilatedCache, BlockSparseCache)}
MODES: Mapping[str, Callable[[Any, Tensor], Call]] = {
    "forward": _forward,
    "step": _step,
    "decode": _decode,
    "decode-kept": _decode_kept,
}


def _measure(models: Mapping[str, Any], mode: str, ids: Tensor, rounds: int, deadline: float) -> Iterator[Timing]:
    """Warm up, and time what fits into the budget."""
    row = partial(Timing, mode=mode, tokens=ids.shape[1])
    device, spent = ids.device.type, "the budget is spent"
    calls: dict[str, Call] = {}
    once: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    for name, model in models.items():
        if time.monotonic() > deadline:
            yield row(attention=name, reason=spent)
            continue
        try:
            calls[name], once[name], peaks[name] = _warmed_up(MODES[mode](model, ids), ids.device)
        except (RuntimeError, MemoryError, OSError) as error:
            if not _is_out_of_memory(error):
                raise
            yield row(attention=name, reason="out of memory")
        release()
    if not calls:
        return
    first = next(iter(calls))
    control = first + CONTROL
    calls = {first: calls[first], control: calls[first], **calls}
    once[control], peaks[control] = once[first], peaks[first]
    possible = int((deadline - time.monotonic()) / sum(sample_seconds(seconds, device) for seconds in once.values()))
    if possible < FEWEST_ROUNDS:
        yield from (row(attention=name, reason=spent) for name in calls if name != control)
        return
    repeats = {name: repeats_for(once[name], device) for name in calls}
    samples = interleave(calls, repeats, device, rounds=min(rounds, possible))
    for name, seconds in samples.items():
        speedup = None if name == first else ratio(samples[first], seconds)
        median = statistics.median(seconds)
        yield row(attention=name, seconds=seconds, median=median, speedup=speedup, peak_bytes=peaks[name])


def _is_out_of_memory(error: Exception) -> bool:
    """Also of the CPU, for which torch and the operating system have no class of their own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _warmed_up(call: Call, device: torch.device) -> tuple[Call, float, int | None]:
    """The call, its seconds, and its memory."""
    memory = PeakMemory(device)
    call()
    with memory.measured():
        seconds = time_call(call, 1, device.type)
    return call, seconds, memory.peak_bytes
