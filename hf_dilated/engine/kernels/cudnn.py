"""cuDNN's attention, by way of torch: the fastest stock kernel for sizes that recur."""

import torch
from torch import Tensor

from hf_dilated.engine.kernels.case import HALF, Case, Gradients, Kernel, needs_capability, no_seed, one_of

aten = torch.ops.aten


def _refuses(case: Case) -> str | None:
    if case.deterministic:
        return "its backward pass is not deterministic"
    if not case.recurs:
        return "compiles for every new shape (0.04 s forward, 0.05 s backward), and this one is unlikely to recur"
    if reason := needs_capability(case, (8, 0)):
        return reason
    largest = 256 if case.capability[0] == 9 else 128
    return one_of(case, device="cuda", dtypes=HALF, multiple=8, largest=largest)


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    return output, lse.view(output.shape[:-1])


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed = no_seed(q)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, output, lse.contiguous().unsqueeze(-1), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, is_causal, scale=scale,
    )  # fmt: skip


CUDNN = Kernel("cudnn", _refuses, _forward, _backward)
