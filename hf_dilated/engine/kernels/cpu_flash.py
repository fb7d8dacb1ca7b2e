"""Torch's flash kernel for the CPU."""

import torch
from torch import Tensor

from hf_dilated.engine.kernels.case import HALF, Case, Gradients, Kernel, one_of, same_sizes

aten = torch.ops.aten


def _refuses(case: Case) -> str | None:
    dtypes = (*HALF, torch.float32, torch.float64)
    return one_of(case, device="cpu", dtypes=dtypes, multiple=1, largest=1 << 16) or same_sizes(case)


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, output, lse, 0.0, is_causal, scale=scale
    )


CPU_FLASH = Kernel("cpu_flash", _refuses, _forward, _backward)
