"""Run a plan: every call on a stock kernel, merged by log-sum-exp; gradients with the global output and LSE."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_dilated.engine import kernels
from hf_dilated.engine.kernels import Gradients
from hf_dilated.engine.plan import Call, Plan, Selection
from hf_dilated.engine.streamed import StreamedGradient, StreamedOutput
from hf_dilated.memory import buffers

try:
    from hf_dilated.engine.fused import FusedGradient, FusedOutput, gather
except ImportError:  # Triton comes with the CUDA builds of torch only
    HAS_TRITON = False
else:
    HAS_TRITON = True


def forward(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        plan: The calls.
        query: (B, H, N, D).
        key: (B, G, M, D).
        value: (B, G, M, Dv).
        scale: Factor of the scores.

    Returns:
        Output (B, H, N, Dv) in the dtype of the query, stored token by token, and LSE (B, H, N) in float32
        (float64 for float64).
    """
    total = output_total(query, value.shape[3])
    add_forward(total, plan, query, key, value, scale)
    return total.result()


def output_total(query: Tensor, value_size: int, dtype: torch.dtype | None = None) -> Any:
    """Begin a merge of parts into an output like the query; ``dtype`` is what it is kept in between."""
    return (FusedOutput if runs_fused(query) else StreamedOutput)(query, value_size, dtype)


def gradient_total(like: Tensor, dtype: torch.dtype | None = None) -> Any:
    """Begin a sum of parts of a gradient."""
    return (FusedGradient if runs_fused(like) else StreamedGradient)(like, dtype)


def add_forward(total: Any, plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Merge what a plan's calls return into an :func:`output_total`; tensors as in :func:`forward`."""
    chosen = _Kernels.of(query, value)
    for call in plan.calls:
        part, lse = _attend(chosen, call, query, key, value, scale)
        total.add(call.query, part, lse, call.is_first)
        del part, lse  # before the next call gathers


def _attend(
    chosen: "_Kernels", call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (q,), (k, v) = _take(call, call.query, query), _take(call, call.key, key, value)
    if call.is_packed:
        return chosen.packed.forward(q, k, v, call.packed_lengths(q.device), call.is_causal, scale)
    return chosen.for_call(call).forward(q, k, v, call.is_causal, scale)


def backward(
    plan: Plan, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> Gradients:
    """Gradients of :func:`forward`; ``output`` and ``lse`` are what it returned."""
    totals = gradient_total(query), gradient_total(key), gradient_total(value)
    add_backward(totals, plan, grad, query, key, value, output, lse, scale)
    return totals[0].result(), totals[1].result(), totals[2].result()


def add_backward(
    totals: tuple[Any, Any, Any],
    plan: Plan,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Add a plan's share to the :func:`gradient_total` of query, key and value; tensors as in :func:`backward`."""
    of_query, of_key, of_value = totals
    chosen = _Kernels.of(query, value)
    for call in plan.calls:
        parts = _gradients(chosen, call, grad, query, key, value, output, lse, scale)
        of_query.add(call.query, (of_query,), parts[:1])
        of_query.add(call.key, (of_key, of_value), parts[1:])
        del parts  # before the next call gathers


def _gradients(
    chosen: "_Kernels",
    call: Call,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> Gradients:
    q, grad_part, output_part = _take(call, call.query, query, grad, output)
    (k, v), (lse_part,) = _take(call, call.key, key, value), _take(call, call.query, lse)
    tensors = grad_part, q, k, v, output_part, lse_part
    if call.is_packed:
        return chosen.packed.backward(*tensors, call.packed_lengths(q.device), call.is_causal, scale)
    return chosen.for_call(call).backward(*tensors, call.is_causal, scale)


@dataclass(frozen=True)
class _Kernels:
    """The kernels of one pass: for sizes that recur, for others, and for sequences of different lengths."""

    recurring: kernels.Kernel
    other: kernels.Kernel
    any_lengths: kernels.Packed | None

    @classmethod
    def of(cls, query: Tensor, value: Tensor) -> "_Kernels":
        case = kernels.Case.of(query, value)
        recurring = dataclasses.replace(case, recurs=True)
        return cls(kernels.choose(recurring), kernels.choose(case), kernels.choose_packed(case))

    def for_call(self, call: Call) -> kernels.Kernel:
        return self.recurring if call.recurs else self.other

    @property
    def packed(self) -> kernels.Packed:
        assert self.any_lengths is not None, "the plan has asked whether sequences of different lengths share a call"
        return self.any_lengths


def _take(call: Call, selection: Selection, *tensors: Tensor) -> list[Tensor]:
    """Return (n, h, L, …) of every x (B, H, N, …), or (T, h, …) for a packed call."""
    if selection.view is not None:
        return [selection.view.of(x).flatten(0, 1).transpose(1, 2) for x in tensors]
    if not runs_fused(tensors[0]) or tensors[0].ndim < 4:
        gathered = [buffers.gathered(x, selection.index(x.device)) for x in tensors]
    elif len({x.shape[3] for x in tensors}) == 1:
        gathered = list(gather(selection, *tensors))
    else:  # values of another size
        gathered = [gather(selection, x)[0] for x in tensors]
    return gathered if call.is_packed else [selection.batched(x) for x in gathered]


def runs_fused(x: Tensor) -> bool:
    """Whether results are gathered and merged by Triton kernels."""
    return HAS_TRITON and x.is_cuda and x.element_size() <= 4
