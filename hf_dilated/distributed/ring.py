"""Attention over a sequence whose tokens are spread over ranks: exact, whatever the pattern."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dilated.config import RingConfig
from hf_dilated.config.ring import Transport as TransportName
from hf_dilated.distributed.accumulate import attend
from hf_dilated.distributed.chunks import attend_in_chunks
from hf_dilated.distributed.communication import Wire
from hf_dilated.distributed.heads import attend_by_heads
from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.distributed.pieces import Group
from hf_dilated.distributed.session import active
from hf_dilated.distributed.shares import Problem, own_plan
from hf_dilated.distributed.symmetric import SymmetricWire
from hf_dilated.distributed.transports import Here, Pieces, SeenRows, Transport
from hf_dilated.engine import kernels
from hf_dilated.functional import check_inputs
from hf_dilated.patterns import DensePattern, parse
from hf_dilated.patterns.partials import Pattern


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    *,
    group: dist.ProcessGroup | None = None,
    pattern: Pattern | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    config: RingConfig | None = None,
    return_lse: bool = False,
    memory: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one rank's queries to the keys of all ranks; forward and backward are collective.

    Args:
        query: (B, H, n, D), this rank's shard: ``n`` is ``layout.slots``.
        key: (B, G, n, D), G a divisor of H: grouped heads are not repeated, neither here nor on the way.
        value: (B, G, n, Dv).
        layout: Which rank holds which tokens. All ranks must have the same.
        group: The ranks; None takes those of the open ``sequence_parallel``, or else this process alone.
        pattern: Who attends to whom: ``DensePattern()`` (the default), a windowed or a ``DilatedPattern``.
        is_causal: Whether tokens see only earlier ones.
        scale: Factor of the scores; ``1 / sqrt(D)`` by default.
        sink_logits: (H,) learned logits that take part in every softmax of their head without a value.
        config: How keys and values travel.
        return_lse: Also return the log-sum-exp, which is not differentiable.
        memory: Where large tensors come from: the ``spec`` of a :class:`hf_dilated.MemoryPolicy`; by default torch.

    Returns:
        Output (B, H, n, Dv), 0 in empty slots, and, if asked for, LSE (B, H, n) in float32 (float64 for float64).

    Raises:
        ValueError: If shapes do not fit together or the layout was made for another number of ranks.
        NotImplementedError: While ``torch.compile`` traces.

    Example:
        >>> layout = SequenceLayout.of((1, 100), ranks=1)
        >>> query, key, value = (torch.randn(1, 8, 100, 32) for _ in range(3))
        >>> ring_attention(query, key, value, layout).shape
        torch.Size([1, 8, 100, 32])
    """
    config, pattern = config or RingConfig(), pattern or DensePattern()
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "ring attention cannot be compiled: mark the model's layers with torch.compiler.disable"
        )
    check_inputs(query, key, value, None, sink_logits)
    session = active()
    wire = Wire.of(group) if group is not None else session.wire if session else None
    _check_layout(query, key, layout, 1 if wire is None else wire.ranks)
    problem = Problem(
        layout=layout,
        pattern=pattern.spec,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        is_causal=is_causal,
        packs=kernels.choose_packed(kernels.Case.of(query, value)) is not None,
    )
    if session is not None and group is None:
        session.observe(is_dense=is_causal and attends_densely(problem))
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    q, k, v = (_flat(x) for x in (query, key, value))
    is_alone = wire is None or wire.ranks == 1
    if is_alone and 0 < config.chunk_tokens < problem.tokens:
        output, lse = attend_in_chunks(q, k, v, sink_logits, problem, config.chunk_tokens, scale, memory)
    elif wire is None or wire.ranks == 1:
        output, lse = attend(q, k, v, sink_logits, partial(Here, own_plan(problem, 0)), scale, memory)
    elif (name := choose_transport(problem, config, k, v)) == "heads":
        output, lse = attend_by_heads(q, k, v, sink_logits, problem, wire, scale, memory)
    else:
        start: Callable[[], Transport]
        if name == "rows":
            start = partial(SeenRows, wire, problem)
        else:
            carrier = SymmetricWire.over(wire, query.device) if name == "symmetric" else wire
            start = partial(Pieces, carrier, problem, groups_of(name, wire.ranks, fits=_fits(problem, config, k, v)))
        output, lse = attend(q, k, v, sink_logits, start, scale, memory)
    output = output.view(layout.rows, layout.slots, *output.shape[1:]).transpose(1, 2)
    if not return_lse:
        return output
    return output, lse.detach().view(-1, layout.rows, layout.slots).transpose(0, 1)


def choose_transport(problem: Problem, config: RingConfig, key: Tensor, value: Tensor) -> TransportName:
    """Return how keys and values travel; a function of what all ranks have in common.

    Raises:
        ValueError: If the heads cannot be divided among the ranks as ``transport="heads"`` asks.
    """
    ranks = problem.layout.ranks
    if config.transport == "heads" and problem.kv_heads % ranks:
        raise ValueError(
            f'transport="heads": {problem.kv_heads} key-value heads do not divide among {ranks} ranks; use '
            '"gather" or "exchange"'
        )
    if config.transport != "auto":
        return config.transport
    if not attends_densely(problem):
        return "rows"
    return "gather" if _fits(problem, config, key, value) else "exchange"


def _fits(problem: Problem, config: RingConfig, key: Tensor, value: Tensor) -> bool:
    """Whether the keys and values of all ranks may be here at once.

    Two buffers from which others pull count with them: gradients go home to all other ranks at once, too.
    """
    ranks = problem.layout.ranks
    shards = ranks + 2 * (ranks - 1) * (config.transport == "symmetric")
    return shards * (key.nbytes + value.nbytes) <= config.gather_bytes


def groups_of(transport: TransportName, ranks: int, *, fits: bool) -> tuple[Group, ...]:
    """Return which ranks' pieces a rank has at once; ``fits`` says whether ``"symmetric"`` may have all."""
    distances = tuple(range(1, ranks))
    at_once = transport == "gather" or (transport == "symmetric" and fits)
    return (distances,) if at_once else tuple((distance,) for distance in distances)


def attends_densely(problem: Problem) -> bool:
    """Whether every document sees all of itself."""
    return parse(problem.pattern).is_dense(max(problem.layout.documents.length, default=0))


def _flat(x: Tensor) -> Tensor:
    """Turn (B, H, n, D) into (T, H, D), token by token."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _check_layout(query: Tensor, key: Tensor, layout: SequenceLayout, ranks: int) -> None:
    if layout.ranks != ranks:
        raise ValueError(f"layout: made for {layout.ranks} ranks, the group has {ranks}")
    expected = layout.rows, layout.slots
    for name, x in (("query", query), ("key", key)):
        if (x.shape[0], x.shape[2]) != expected:
            raise ValueError(f"{name}: a shard of this layout has {expected} rows and slots, got {tuple(x.shape)}")
