"""One process, chunk by chunk: the scratch of attention is that of a few chunks, however long the sequence."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_dilated.distributed.shares import Problem, chunk_plan
from hf_dilated.engine import execute
from hf_dilated.engine.op import running, sink_gradient, with_sink
from hf_dilated.engine.plan import Plan
from hf_dilated.engine.streamed import wide
from hf_dilated.memory import BufferType, buffers


def attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    problem: Problem,
    chunk: int,
    scale: float,
    memory: str = "",
) -> tuple[Tensor, Tensor]:
    """Attend with chunks of queries to chunks of keys, one pair at a time.

    Parts of a chunk of queries are merged, and its gradient is added, in float32 (float64 for float64). Gradients of
    keys and values are added in that dtype, too: where theirs is smaller, they are kept in it until the end.

    Args:
        query: (T, H, D), the tokens of all rows.
        key: (T, G, D).
        value: (T, G, Dv).
        sink_logits: (H,) logits without a value, or None.
        problem: Who attends to whom, in one process.
        chunk: Tokens of a chunk.
        scale: Factor of the scores.
        memory: Where from to allocate, as in :func:`hf_dilated.dilated_attention`.

    Returns:
        Output (T, H, Dv) and LSE (H, T), which is not differentiable.
    """
    return _AttendInChunks.apply(query, key, value, sink_logits, _Chunks(problem, chunk), scale, memory)


class _Chunks:
    """The pairs of chunks of which the first sees the second."""

    def __init__(self, problem: Problem, size: int) -> None:
        self.problem, self.size = problem, size
        self.slices = [slice(i, min(i + size, problem.tokens)) for i in range(0, problem.tokens, size)]

    def seen(self, number: int) -> Iterator[tuple[slice, Plan]]:
        """Yield the chunks of keys that a chunk of queries sees, its own first."""
        later = () if self.problem.is_causal else range(number + 1, len(self.slices))
        for other in (number, *range(number), *later):
            if (plan := chunk_plan(self.problem, self.size, number, other)).calls:
                yield self.slices[other], plan


class _AttendInChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logits: Tensor | None,
        chunks: _Chunks,
        scale: float,
        memory: str,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (query, key, value))
        T, H, _ = query.shape
        with running(query, memory):
            output = buffers.empty(BufferType.OUTPUT, (1, T, H, value.shape[2]), query.dtype, query.device)
            output = output.transpose(1, 2)
            lse = buffers.empty(BufferType.OUTPUT, (1, H, T), wide(query.dtype), query.device)
            for number, own in enumerate(chunks.slices):
                total = execute.output_total(q[:, :, own], v.shape[3], wide(query.dtype))
                for seen, plan in chunks.seen(number):
                    execute.add_forward(total, plan, q[:, :, own], k[:, :, seen], v[:, :, seen], scale)
                merged, merged_lse = total.result()
                output[:, :, own], lse[:, :, own] = with_sink(merged, merged_lse, sink_logits)
        ctx.save_for_backward(query, key, value, sink_logits, output, lse)
        ctx.chunks, ctx.scale, ctx.memory = chunks, scale, memory
        ctx.mark_non_differentiable(lse)
        return output[0].transpose(0, 1), lse[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, sink_logits, output, lse = ctx.saved_tensors
        dtype = wide(query.dtype)
        grad, q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (grad.contiguous(), query, key, value))
        with running(query, ctx.memory):
            grad_query = buffers.empty(BufferType.OUTPUT, query.shape, query.dtype, query.device)
            of_keys = [buffers.full(BufferType.OUTPUT, x.shape, 0.0, dtype, x.device) for x in (key, value)]
            for number, own in enumerate(ctx.chunks.slices):
                of_query = execute.gradient_total(q[:, :, own], dtype)
                tensors = grad[:, :, own], q[:, :, own]
                for seen, plan in ctx.chunks.seen(number):
                    pair = k[:, :, seen], v[:, :, seen]
                    found = [execute.gradient_total(x, dtype) for x in pair]
                    execute.add_backward(
                        (of_query, *found), plan, *tensors, *pair, output[:, :, own], lse[:, :, own], ctx.scale
                    )
                    for total, part in zip(of_keys, found, strict=True):
                        total[seen] += part.result()[0].transpose(0, 1)
                grad_query[own] = of_query.result()[0].transpose(0, 1)
        grads = grad_query, of_keys[0].to(key.dtype), of_keys[1].to(value.dtype)
        grad_sink = None if sink_logits is None else sink_gradient(sink_logits, grad, output, lse)
        return *grads, grad_sink, None, None, None
