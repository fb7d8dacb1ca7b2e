"""Attention to keys that arrive in portions: one merge over all, gradients with the global output and LSE."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_dilated.distributed.transports import Transport
from hf_dilated.engine import execute
from hf_dilated.engine.op import running, sink_gradient, with_sink
from hf_dilated.engine.streamed import wide

FEW_PORTIONS = 3  # merged without being rounded more often than by the calls of one device


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    start: Callable[[], Transport],
    scale: float,
    memory: str = "",
) -> tuple[Tensor, Tensor]:
    """Attend to what a transport brings.

    A few portions are merged, and their gradients added, as on one device; many in float32 (float64 for float64), so
    that errors do not grow with the number of ranks.

    Args:
        query: (T, H, D), this rank's.
        key: (T, G, D), this rank's.
        value: (T, G, Dv).
        sink_logits: (H,) logits without a value, or None.
        start: Begins the transport, once for the forward and once for the backward pass.
        scale: Factor of the scores.
        memory: Where from to allocate, as in :func:`hf_dilated.dilated_attention`.

    Returns:
        Output (T, H, Dv) and LSE (H, T), which is not differentiable.
    """
    return _Attend.apply(query, key, value, sink_logits, start, scale, memory)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logits: Tensor | None,
        start: Callable[[], Transport],
        scale: float,
        memory: str,
    ) -> tuple[Tensor, Tensor]:
        q = _heads_first(query)
        with running(query, memory):
            transport = start()
            total = execute.output_total(q, value.shape[2], _kept(query, transport))
            for part in transport.portions(key, value):
                execute.add_forward(total, part.plan, q, _heads_first(part.key), _heads_first(part.value), scale)
            merged, lse = total.result()
            output, lse = with_sink(merged, lse, sink_logits)
        ctx.save_for_backward(query, key, value, sink_logits, output, lse)
        ctx.start, ctx.scale, ctx.memory = start, scale, memory
        ctx.mark_non_differentiable(lse)
        return output[0].transpose(0, 1), lse[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, sink_logits, output, lse = ctx.saved_tensors
        transport = ctx.start()
        dtype = _kept(query, transport)
        grad, q = _heads_first(grad.contiguous()), _heads_first(query)
        with running(query, ctx.memory):
            grad_query = execute.gradient_total(q, dtype)
            for part in transport.portions(key, value):
                k, v = _heads_first(part.key), _heads_first(part.value)
                totals = grad_query, execute.gradient_total(k, dtype), execute.gradient_total(v, dtype)
                execute.add_backward(totals, part.plan, grad, q, k, v, output, lse, ctx.scale)
                transport.take(part, *(total.result()[0].transpose(0, 1) for total in totals[1:]))
            of_key, of_value = transport.gradients()
        grads = grad_query.result()[0].transpose(0, 1), of_key.to(key.dtype), of_value.to(value.dtype)
        grad_sink = None if sink_logits is None else sink_gradient(sink_logits, grad, output, lse)
        return *grads, grad_sink, None, None, None


def _kept(query: Tensor, transport: Transport) -> torch.dtype | None:
    """The dtype in which results wait for the next portion; None leaves it to the engine."""
    return wide(query.dtype) if transport.count > FEW_PORTIONS else None


def _heads_first(x: Tensor) -> Tensor:
    """Turn (T, H, …) into (1, H, T, …), as the engine takes it, without copying."""
    return x.transpose(0, 1).unsqueeze(0)
