"""What is compared: dense kernels, ours, FlexAttention on the same pattern, and peers given by name."""

import importlib
import importlib.util
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import hf_dilated
from benchmarking.bigbird import bigbird_of_transformers
from benchmarking.cases import Case, blocks_for
from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.config import Offset, Overlap
from hf_dilated.patterns import BlockSparsePattern

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Pattern = DilatedConfig | BlockSparseConfig

CONTROL = " (again)"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute attention.

    Args:
        name: As it stands in rows and tables; a dense variant's starts with ``dense``.
        prepare: Does what is done once for a shape (block masks, compilation) and returns the function to time.
        claims: The pattern it computes; None is dense attention.
        growth: Power of the length with which its time grows, for the budget.
        optional: Whether it may be missing on this machine.
        longest: Longest length, in tokens, to run it at; None is any.
        order: The order in which it wants the tokens; None is as they come.
        is_checked: Whether it is compared with the oracle; what draws blocks of its own cannot be.
        seconds: How long preparing and the first call may take; None is any time.
    """

    name: str
    prepare: Callable[[], Attention]
    claims: Pattern | None = None
    growth: int = 1
    optional: bool = False
    longest: int | None = None
    order: Tensor | None = None
    is_checked: bool = True
    seconds: float | None = None

    @property
    def is_control(self) -> bool:
        """Whether it measures another variant once more."""
        return self.name.endswith(CONTROL)

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """Stop what takes longer than ``seconds``, such as a compilation, with a ``TimeoutError``."""

        def stop(*_: Any) -> None:
            raise TimeoutError(f"not ready after {self.seconds:.0f} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds or 0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which variants take part."""

    overlaps: tuple[Overlap, ...] = ("once", "count")
    flex: bool = False
    flex_up_to: int = 32768
    flex_seconds: float = 60
    dense_up_to: int = 131072
    peers: tuple[str, ...] = ()
    peer_offset: Offset = "head"


def variants(case: Case, choice: Choice) -> Iterator[Variant]:
    """Yield what takes part; the first is the baseline that the others are compared with."""
    yield from _dense(case, choice.dense_up_to)
    for text in case.blocks:
        config = blocks_for(text, case.length)
        share = BlockSparsePattern(config=config).density(case.length, case.is_causal)
        name = f"{text.partition(':')[0]} {share:.1%}"
        yield ours(config, name, case.is_causal)
        if choice.flex:
            yield flex_blocks(case, config, f"flex {name}", choice.flex_up_to, choice.flex_seconds)
    if not case.is_causal:
        prepare = _bound(bigbird_of_transformers, case)
        yield Variant(name="transformers bigbird", prepare=prepare, optional=True, is_checked=False)
    if case.blocks:
        return
    for overlap in choice.overlaps:
        yield ours(case.config(overlap), f"dilated {overlap}")
    if choice.flex and case.queries == case.length:
        for overlap in choice.overlaps:
            yield _flex(case, case.config(overlap), f"flex {overlap}", choice.flex_up_to)
            yield _flex(case, case.config(overlap), f"flex {overlap} permuted", choice.flex_up_to, permuted=True)
    for peer in choice.peers:
        yield _peer(peer, case.config("count", choice.peer_offset))


def with_control(chosen: Sequence[Variant]) -> list[Variant]:
    """Put the first variant in a second time: two measurements of one thing show the noise."""
    first = chosen[0]
    again = Variant(**{**vars(first), "name": first.name + CONTROL})
    return [first, again, *chosen[1:]]


def _dense(case: Case, longest: int) -> Iterator[Variant]:
    growth = 2 if case.queries == case.length else 1
    if case.device == "cpu":
        yield Variant(name="dense", prepare=lambda: _sdpa(None, case.is_causal), growth=growth, longest=longest)
        return
    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    for name, backend in kernels.items():
        prepare = _bound(_sdpa, backend, case.is_causal)
        yield Variant(name=f"dense {name}", prepare=prepare, growth=growth, longest=longest, optional=True)
    prepare = _bound(_flash_attention_4, case.is_causal)
    yield Variant(name="dense fa4", prepare=prepare, growth=growth, longest=longest, optional=True)


def _bound(function: Callable[..., Attention], *arguments: Any) -> Callable[[], Attention]:
    return lambda: function(*arguments)


def _sdpa(backend: SDPBackend | None, is_causal: bool) -> Attention:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        causal = is_causal and query.shape[2] == key.shape[2]  # a single query, the last one, sees every key
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    def call_on_backend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert backend is not None
        with sdpa_kernel(backend):
            return call(query, key, value)

    return call if backend is None else call_on_backend


def _flash_attention_4(is_causal: bool) -> Attention:
    flash = importlib.import_module("flash_attn.cute").flash_attn_func

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = flash(*(x.transpose(1, 2) for x in (query, key, value)), causal=is_causal)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return call


def ours(config: Pattern, name: str, is_causal: bool = True) -> Variant:
    """Our own attention along a pattern."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if isinstance(config, BlockSparseConfig):
            output = hf_dilated.block_sparse_attention(query, key, value, config, is_causal=is_causal)
        else:
            output = hf_dilated.dilated_attention(query, key, value, config)
        assert isinstance(output, Tensor)
        return output

    return Variant(name=name, prepare=lambda: call, claims=config)


def _peer(path: str, config: DilatedConfig) -> Variant:
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"peer: expected module:function, got {path!r}")
    function = getattr(importlib.import_module(module), name)
    segments, rates = list(config.segment_lengths), list(config.dilation_rates)
    return Variant(
        name=f"peer {name}",
        prepare=lambda: lambda query, key, value: function(query, key, value, segments, rates),
        claims=config,
    )


def _flex(case: Case, config: DilatedConfig, name: str, longest: int, *, permuted: bool = False) -> Variant:
    order = residue_order(case.length, config).to(case.device) if permuted else None
    return Variant(
        name=name,
        prepare=lambda: _prepare_flex(case, config, order),
        claims=config,
        growth=2,
        optional=True,
        longest=longest,
        order=order,
    )


def flex_blocks(case: Case, config: BlockSparseConfig, name: str, longest: int, seconds: float) -> Variant:
    """FlexAttention as its documentation says: a mask function over one table of blocks, everything compiled."""

    def prepare() -> Attention:
        torch._dynamo.config.recompile_limit = 256
        seen = BlockSparsePattern(config=config).block_matrix(case.length, 1, case.is_causal)[0].to(case.device)
        size, grouped = config.block_size, case.heads != case.kv_heads

        def sees(_: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            is_shown = seen[i // size, j // size]
            return (j <= i) & is_shown if case.is_causal else is_shown

        mask = torch.compile(create_block_mask)(sees, None, None, case.length, case.length, device=case.device)
        compiled = torch.compile(flex_attention)
        return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=grouped)

    return Variant(name=name, prepare=prepare, claims=config, optional=True, longest=longest, seconds=seconds)


def residue_order(length: int, config: DilatedConfig) -> Tensor:
    """Sort the tokens of every longest segment by residue, so that the pattern's blocks become dense.

    Example:
        >>> config = DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2))
        >>> residue_order(8, config).tolist()
        [0, 2, 4, 6, 1, 3, 5, 7]
    """
    token = torch.arange(length)
    segment, rate = config.segment_lengths[-1], max(config.dilation_rates)
    rank = token // segment * segment * rate + token % segment % rate * segment + token % segment
    return rank.argsort()


def _prepare_flex(case: Case, config: DilatedConfig, order: Tensor | None) -> Attention:
    torch._dynamo.config.recompile_limit = 256  # every length and pattern is a program of its own
    branches = list(zip(config.segment_lengths, config.dilation_rates, strict=True))

    def count(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        met = [(i // w == j // w) & (i % w % r == head % r) & (j % w % r == head % r) for w, r in branches]
        return sum(x.to(torch.int32) for x in met)  # type: ignore[return-value]

    def sees(_: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = (i, j) if order is None else (order[i], order[j])
        return (j <= i) & (count(head, i, j) > 0)

    def weigh(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = (i, j) if order is None else (order[i], order[j])
        return score + count(head, i, j).to(torch.float32).log()

    mask = torch.compile(create_block_mask)(sees, None, case.heads, case.length, case.length, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads
    score_mod = weigh if config.overlap == "count" else None

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=mask, score_mod=score_mod, enable_gqa=grouped)

    return call
