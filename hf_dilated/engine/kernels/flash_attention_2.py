"""FlashAttention 2, as it comes with torch."""

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
    no_seed,
    one_of,
    same_sizes,
)

aten = torch.ops.aten


def _refuses(case: Case) -> str | None:
    if reason := needs_capability(case, (8, 0)):
        return reason
    return one_of(case, device="cuda", dtypes=HALF, multiple=8, largest=256) or same_sizes(case)


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    return output, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed = no_seed(q)
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, output, lse.contiguous(), None, None,
        q.shape[2], k.shape[2], 0.0, is_causal, seed, seed, scale=scale,
    )  # fmt: skip


def _packed_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: PackedLengths, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse, *_ = aten._flash_attention_forward(
        q, k, v, *lengths.arguments(), 0.0, is_causal, False, scale=scale
    )  # fmt: skip
    return output, lse.transpose(0, 1)


def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, lengths: PackedLengths,
    is_causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    seed = no_seed(q)
    return aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        output,
        lse.transpose(0, 1).contiguous(),
        *lengths.arguments(),
        0.0,
        is_causal,
        seed,
        seed,
        scale=scale,
    )


FLASH_ATTENTION_2 = Kernel(
    "flash_attention_2", _refuses, _forward, _backward, Packed(_packed_forward, _packed_backward)
)
