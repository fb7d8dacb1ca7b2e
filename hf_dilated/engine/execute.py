"""Run a plan: every call on a stock kernel, merged by log-sum-exp; gradients with the global output and LSE."""

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
    for call in plan.calls:
        q, k, v = _take(call, call.query, query), _take(call, call.key, key), _take(call, call.key, value)
        if call.is_packed:
            part, lse = _packed(q, v).forward(q, k, v, call.packed_lengths(q.device), call.is_causal, scale)
        else:
            part, lse = _kernel(call, q, v).forward(q, k, v, call.is_causal, scale)
        total.add(call.query, part, lse, call.is_first)
    return total.result()


def backward(
    plan: Plan, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> Gradients:
    """Gradients of :func:`forward`; ``output`` and ``lse`` are what it returned."""
    total = FusedGradient if runs_fused(query) else StreamedGradient
    totals = total(query), total(key), total(value)
    for call in plan.calls:
        parts = _call_backward(call, grad, query, key, value, output, lse, scale)
        for selection, sum_, part in zip((call.query, call.key, call.key), totals, parts, strict=True):
            sum_.add(selection, part)
        del parts, part
    return totals[0].result(), totals[1].result(), totals[2].result()


def _call_backward(
    call: Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> Gradients:
    q, k, v = _take(call, call.query, query), _take(call, call.key, key), _take(call, call.key, value)
    grad, output, lse = (_take(call, call.query, x) for x in (grad, output, lse))
    if call.is_packed:
        lengths = call.packed_lengths(q.device)
        return _packed(q, v).backward(grad, q, k, v, output, lse, lengths, call.is_causal, scale)
    return _kernel(call, q, v).backward(grad, q, k, v, output, lse, call.is_causal, scale)


def _kernel(call: Call, query: Tensor, value: Tensor) -> kernels.Kernel:
    return kernels.choose(kernels.Case.of(query, value, recurs=call.recurs))


def _packed(query: Tensor, value: Tensor) -> kernels.Packed:
    packed = kernels.choose_packed(kernels.Case.of(query, value))
    assert packed is not None, "the plan has asked whether sequences of different lengths share a call"
    return packed


def _take(call: Call, selection: Selection, x: Tensor) -> Tensor:
    """Return (n, h, L, …) of x (B, H, N, …), or (T, h, …) for a packed call."""
    if selection.view is not None:
        return selection.view.of(x).flatten(0, 1).transpose(1, 2)
    gathered = gather(selection, x) if x.ndim == 4 and runs_fused(x) else x[selection.index(x.device)]
    return gathered if call.is_packed else selection.batched(gathered)


def runs_fused(x: Tensor) -> bool:
    """Whether results are gathered and merged by Triton kernels."""
    return HAS_TRITON and x.is_cuda and x.element_size() <= 4
