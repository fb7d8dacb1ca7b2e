"""Attention with a bias for every score: forward only, where it costs one launch."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_dilated.engine.kernels.case import HALF

aten = torch.ops.aten


def attend_with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend: query (n, h, N, D), key (n, h, M, D), value (n, h, M, Dv), bias (n, h, N, M) give (n, h, N, Dv).

    On a GPU not by cuDNN, which plans for every new number of keys, but by the kernel that takes any; it wants M to be
    a multiple of 16.
    """
    sizes = query.shape[3], value.shape[3]
    if query.is_cuda and query.dtype in (*HALF, torch.float32) and not any(size % 8 for size in sizes):
        return aten._scaled_dot_product_efficient_attention(query, key, value, bias, False, scale=scale)[0]
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
