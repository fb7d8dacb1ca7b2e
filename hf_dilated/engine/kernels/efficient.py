"""Memory-efficient attention, as it comes with torch: also float32 and unequal head sizes."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_dilated.engine.kernels.case import HALF, Case, Gradients, Kernel, no_seed, one_of, per_key_head, per_query_head

aten = torch.ops.aten


def _refuses(case: Case) -> str | None:
    if case.deterministic:
        return "its backward pass is not deterministic"
    multiple = 8 if case.dtype in HALF else 4
    return one_of(case, device="cuda", dtypes=(*HALF, torch.float32), multiple=multiple, largest=1 << 16)


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = per_query_head(k, q), per_query_head(v, q)
    output, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return output, lse[..., : q.shape[2]]


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed, kv_heads = no_seed(q), k.shape[1]
    k, v = per_query_head(k, q), per_query_head(v, q)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel takes rows to lie side by side
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, output, _padded_to_32(lse), seed, seed, 0.0, [True, True, True, False], is_causal,
        scale=scale,
    )  # fmt: skip
    return grad_q, per_key_head(grad_k, kv_heads), per_key_head(grad_v, kv_heads)


def _padded_to_32(lse: Tensor) -> Tensor:
    """As the efficient kernel wants it; it asks for no stride of the last dimension."""
    return pad(lse, (0, -lse.shape[2] % 32), value=math.inf).contiguous()


EFFICIENT = Kernel("efficient", _refuses, _forward, _backward)
