"""FlashAttention 4 (the package flash-attn-4), where it is installed."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_dilated.engine.kernels.case import (
    HALF,
    Case,
    Gradients,
    Kernel,
    Packed,
    PackedLengths,
    needs_capability,
    one_of,
)  # fmt: skip


@cache
def flash_attention_4() -> ModuleType | None:
    """The module with its functions, or None where it is not installed."""
    try:
        from flash_attn.cute import interface
    except ImportError:  # also where another package is called flash_attn
        return None
    return interface


def _refuses(case: Case) -> str | None:
    if reason := needs_capability(case, (9, 0)):
        return reason
    largest = 256 if case.capability[0] == 9 else 128
    if reason := one_of(case, device="cuda", dtypes=HALF, multiple=8, largest=largest):
        return reason
    return None if flash_attention_4() else "is not installed (`pip install flash-attn-4`)"


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, lse, *_ = _attend(q, k, v, softmax_scale=scale, causal=is_causal, return_lse=True)
    return output.transpose(1, 2), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    q, k, v, output, grad = (x.transpose(1, 2) for x in (q, k, v, output, grad))
    grads = _gradients(q, k, v, output, grad, lse, softmax_scale=scale, causal=is_causal)
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
    return grad_q, grad_k, grad_v


def _packed_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: PackedLengths, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse, *_ = _attend(q, k, v, **_starts(lengths), softmax_scale=scale, causal=is_causal, return_lse=True)
    return output, lse.transpose(0, 1)


def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, lengths: PackedLengths,
    is_causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    lse = lse.transpose(0, 1)
    return _gradients(q, k, v, output, grad, lse, **_starts(lengths), softmax_scale=scale, causal=is_causal)


def _starts(lengths: PackedLengths) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": lengths.query,
        "cu_seqlens_k": lengths.key,
        "max_seqlen_q": lengths.longest_query,
        "max_seqlen_k": lengths.longest_key,
    }


def _attend(*tensors: Tensor, **options: object) -> tuple[Tensor, ...]:
    interface: Any = flash_attention_4()
    return interface._flash_attn_fwd(*tensors, **options)


def _gradients(*tensors: Tensor, **options: object) -> Gradients:
    """Torch's own autograd function computes with its own output and LSE; ours are global."""
    interface: Any = flash_attention_4()
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_q, grad_k, grad_v = interface._flash_attn_bwd(*tensors, **options, deterministic=deterministic)
    return grad_q, grad_k, grad_v


FLASH_ATTENTION_4 = Kernel(
    "flash_attention_4", _refuses, _forward, _backward, Packed(_packed_forward, _packed_backward)
)
