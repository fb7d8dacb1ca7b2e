"""Head-parallel attention (DeepSpeed-Ulysses, arXiv:2309.14509): ranks trade tokens for heads, attend, and trade back.

A rank then has some of the heads of all tokens, and attends without communication.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_dilated.distributed.accumulate import attend
from hf_dilated.distributed.communication import Wire
from hf_dilated.distributed.shares import Problem, heads_plan
from hf_dilated.distributed.transports import Here
from hf_dilated.memory import BufferType, buffers


def attend_by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    problem: Problem,
    wire: Wire,
    scale: float,
    memory: str = "",
) -> tuple[Tensor, Tensor]:
    """Attend with tensors (T, heads, D) of this rank's tokens, as :func:`hf_dilated.distributed.accumulate.attend`.

    Returns:
        Output (T, H, Dv) and LSE (H, T).
    """
    share = heads_plan(problem, wire.rank)
    table = _Table(wire, problem.tokens, share.index.tensor(query.device), memory)
    own = None if sink_logits is None else sink_logits.unflatten(0, (wire.ranks, -1))[wire.rank]
    q, k, v = (_ToHeads.apply(x, table) for x in (query, key, value))
    output, lse = attend(q, k, v, own, partial(Here, share.plan), scale, memory)
    return _ToTokens.apply(output, table), table.to_tokens(lse.transpose(0, 1), -math.inf).transpose(0, 1)


class _Table:
    """What stands where before and after a trade."""

    def __init__(self, wire: Wire, tokens: int, index: Tensor, memory: str) -> None:
        self.wire, self.tokens, self.index, self.memory = wire, tokens, index, memory

    def to_heads(self, x: Tensor) -> Tensor:
        """Turn tokens (T, heads, …) of this rank into (all real tokens, heads / P, …)."""
        with buffers.using(self.memory):
            parts = buffers.contiguous(BufferType.COMM, x.unflatten(1, (self.wire.ranks, -1)).transpose(0, 1))
            return buffers.gathered(self._trade(parts.flatten(0, 1)), (self.index,))

    def to_tokens(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """The inverse of :meth:`to_heads`; empty slots get a value."""
        with buffers.using(self.memory):
            shape = (self.wire.ranks * self.tokens, *x.shape[1:])
            spread = buffers.full(BufferType.COMM, shape, empty, x.dtype, x.device)
            spread[self.index] = x
            parts = self._trade(spread).unflatten(0, (self.wire.ranks, -1)).transpose(0, 1)
            return buffers.contiguous(BufferType.OUTPUT, parts).flatten(1, 2)

    def _trade(self, x: Tensor) -> Tensor:
        even = [self.tokens] * self.wire.ranks
        return self.wire.exchange(x, even, even).wait()


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: _Table) -> Tensor:
        ctx.table = table
        return table.to_heads(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.table.to_tokens(grad), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: _Table) -> Tensor:
        ctx.table = table
        return table.to_tokens(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.table.to_heads(grad), None
