"""Run a plan: every call on a stock kernel, merged by log-sum-exp; gradients with the global output and LSE."""

import math

import torch
from torch import Tensor

from hf_dilated.engine import kernels
from hf_dilated.engine.kernels import Gradients
from hf_dilated.engine.plan import Call, Plan, Selection


def forward(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        plan: The calls.
        query: (B, H, N, D).
        key: (B, G, M, D).
        value: (B, G, M, Dv).
        scale: Factor of the scores.

    Returns:
        Output (B, H, N, Dv) in the dtype of the query, and LSE (B, H, N) in float32 (float64 for float64).
    """
    B, H, N, _ = query.shape
    wide_dtype = wide(query.dtype)
    output = query.new_zeros((B, N, H, value.shape[3]), dtype=wide_dtype).transpose(1, 2)
    lse = query.new_full((B, H, N), -math.inf, dtype=wide_dtype)
    for call in plan.calls:
        part, part_lse = _call_forward(call, query, key, value, scale)
        if call.is_first:
            _put(call.query, output, part)
            _put(call.query, lse, part_lse)
        else:
            _merge(call.query, output, lse, part.to(wide_dtype), part_lse.to(wide_dtype))
    return output.to(query.dtype), lse


def backward(
    plan: Plan, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> Gradients:
    """Gradients of :func:`forward`; ``output`` and ``lse`` are what it returned."""
    wide_dtype = wide(query.dtype)
    grads = tuple(torch.zeros_like(x, dtype=wide_dtype) for x in (query, key, value))
    for call in plan.calls:
        parts = _call_backward(call, grad, query, key, value, output, lse, scale)
        for selection, total, part in zip((call.query, call.key, call.key), grads, parts, strict=True):
            _add(selection, total, part)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _call_forward(call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = call.query.take(query), call.key.take(key), call.key.take(value)
    if call.is_packed:
        output, lse = kernels.packed_forward(q, k, v, call.packed_lengths(q.device), call.is_causal, scale)
        return output, lse.transpose(0, 1)
    kernel = kernels.choose(kernels.Case.of(q, v))
    return kernel.forward(q, k, v, call.is_causal, scale)


def _call_backward(
    call: Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> Gradients:
    q, k, v = call.query.take(query), call.key.take(key), call.key.take(value)
    grad, output, lse = call.query.take(grad), call.query.take(output), call.query.take(lse)
    if call.is_packed:
        lengths = call.packed_lengths(q.device)
        return kernels.packed_backward(grad, q, k, v, output, lse.transpose(0, 1), lengths, call.is_causal, scale)
    kernel = kernels.choose(kernels.Case.of(q, v))
    return kernel.backward(grad, q, k, v, output, lse, call.is_causal, scale)


def _put(selection: Selection, total: Tensor, part: Tensor) -> None:
    part = selection.packed(part).to(total.dtype)
    if selection.view is not None:
        view = selection.view.of(total)
        view.copy_(part.reshape(view.shape))
    else:
        total[selection.index(total.device)] = part


def _add(selection: Selection, total: Tensor, part: Tensor) -> None:
    part = selection.packed(part).to(total.dtype)
    if selection.view is not None:
        view = selection.view.of(total)
        view.add_(part.reshape(view.shape))
    else:
        total.index_put_(selection.index(total.device), part, accumulate=True)


def _merge(selection: Selection, output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    part, part_lse = selection.packed(part), selection.packed(part_lse)
    if selection.view is not None:
        old, old_lse = selection.view.of(output), selection.view.of(lse)
        part, part_lse = part.reshape(old.shape), part_lse.reshape(old_lse.shape)
    else:
        index = selection.index(output.device)
        old, old_lse = output[index], lse[index]
    new_lse = torch.logaddexp(old_lse, part_lse)
    old.mul_((old_lse - new_lse).exp_().unsqueeze(-1)).addcmul_(part, (part_lse - new_lse).exp_().unsqueeze(-1))
    if selection.view is not None:
        old_lse.copy_(new_lse)
    else:
        output[index], lse[index] = old, new_lse


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which outputs of a dtype are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32
