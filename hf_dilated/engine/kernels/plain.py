"""Plain torch operations: any device, any dtype, all scores in memory."""

import math

import torch
from torch import Tensor

from hf_dilated.engine.kernels.case import Gradients, Kernel, per_key_head, per_query_head


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ per_query_head(k, q).to(wide).transpose(2, 3) * scale
    if is_causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, is_causal, scale)
    lse = scores.logsumexp(-1)
    output = (scores - lse.unsqueeze(-1)).exp() @ per_query_head(v, q).to(scores.dtype)
    return output.to(q.dtype), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    weights = (_scores(q, k, is_causal, scale) - lse.unsqueeze(-1)).exp()
    grad_wide = grad.to(weights.dtype)
    delta = (grad_wide * output).sum(-1, keepdim=True)
    grad_scores = weights * (grad_wide @ per_query_head(v, q).to(weights.dtype).transpose(2, 3) - delta) * scale
    grad_q = grad_scores @ per_query_head(k, q).to(weights.dtype)
    grad_k = per_key_head(grad_scores.transpose(2, 3) @ q.to(weights.dtype), k.shape[1])
    grad_v = per_key_head(weights.transpose(2, 3) @ grad_wide, k.shape[1])
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


PLAIN = Kernel("math", lambda case: None, _forward, _backward)
