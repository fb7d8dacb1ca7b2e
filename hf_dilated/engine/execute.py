"""Run a plan: every call on a stock kernel, merged by log-sum-exp; gradients with the global output and LSE."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_dilated.engine import kernels
from hf_dilated.engine.kernels import Gradients
from hf_dilated.engine.plan import Call, Plan, Selection
from hf_dilated.engine.streamed import StreamedGradient, StreamedOutput

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
    total = (FusedOutput if runs_fused(query) else StreamedOutput)(query, value.shape[3])
    chosen = _Kernels.of(query, value)
    for call in plan.calls:
        part, part_lse = _attend(call, chosen, query, key, value, scale)
        total.add(call.query, part, part_lse, call.is_first)
        del part, part_lse
    return total.result()


def backward(
    plan: Plan, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> Gradients:
    """Gradients of :func:`forward`; ``output`` and ``lse`` are what it returned."""
    total: Any = FusedGradient if runs_fused(query) else StreamedGradient
    of_query, of_key, of_value = total(query), total(key), total(value)
    chosen = _Kernels.of(query, value)
    for call in plan.calls:
        parts = _gradients(call, chosen, grad, query, key, value, output, lse, scale)
        total.add(call.query, (of_query,), parts[:1])
        total.add(call.key, (of_key, of_value), parts[1:])
        del parts
    return of_query.result(), of_key.result(), of_value.result()


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


def _attend(
    call: Call, chosen: _Kernels, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (q,), (k, v) = _take(call, call.query, query), _take(call, call.key, key, value)
    if call.is_packed:
        return chosen.packed.forward(q, k, v, call.packed_lengths(q.device), call.is_causal, scale)
    return chosen.for_call(call).forward(q, k, v, call.is_causal, scale)


def _gradients(
    call: Call, chosen: _Kernels, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    scale: float,
) -> Gradients:  # fmt: skip
    q, grad, output = _take(call, call.query, query, grad, output)
    (lse,), (k, v) = _take(call, call.query, lse), _take(call, call.key, key, value)
    if call.is_packed:
        lengths = call.packed_lengths(q.device)
        return chosen.packed.backward(grad, q, k, v, output, lse, lengths, call.is_causal, scale)
    return chosen.for_call(call).backward(grad, q, k, v, output, lse, call.is_causal, scale)


def _take(call: Call, selection: Selection, *tensors: Tensor) -> list[Tensor]:
    """Return (n, h, L, …) of every x (B, H, N, …), or (T, h, …) for a packed call."""
    if selection.view is not None:
        return [selection.view.of(x).flatten(0, 1).transpose(1, 2) for x in tensors]
    if not runs_fused(tensors[0]) or tensors[0].ndim < 4:
        gathered = [x[selection.index(x.device)] for x in tensors]
    elif len({x.shape[3] for x in tensors}) == 1:
        gathered = list(gather(selection, *tensors))
    else:  # values of another size
        gathered = [gather(selection, x)[0] for x in tensors]
    return gathered if call.is_packed else [selection.batched(x) for x in gathered]


def runs_fused(x: Tensor) -> bool:
    """Whether results are gathered and merged by Triton kernels."""
    return HAS_TRITON and x.is_cuda and x.element_size() <= 4
