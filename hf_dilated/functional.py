"""Attention functions on tensors, for models that do not come from Transformers."""

import torch
from torch import Tensor

from hf_dilated import reference
from hf_dilated.config import DilatedConfig
from hf_dilated.patterns import DensePattern, DilatedPattern


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: DilatedConfig,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
    layer: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if key_positions is None:
        key_positions = reference.positions(query.shape[0], query.shape[2], key.shape[2], attention_mask, position_ids)
    return attend(
        query, key, value, DilatedPattern(config=config, layer=layer), is_causal=is_causal, scale=scale,
        key_positions=key_positions, return_lse=return_lse,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DensePattern | DilatedPattern,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    key_positions: Tensor | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stand-in until the engine lands."""
    B, H, N, D = query.shape
    G, M = key.shape[1:3]
    if key_positions is None:
        key_positions = reference.positions(B, N, M, None, None)
    config = getattr(pattern, "config", DilatedConfig(segment_lengths=(1 << 40,), dilation_rates=(1,)))
    rows = []
    for row in key_positions:
        m = reference.multiplicity(row, N, config, heads=H, kv_heads=G, is_causal=is_causal, layer=getattr(pattern, "layer", 0))
        if window := getattr(pattern, "window", None):
            written = int((row != -2).sum())
            distance = (row[None, :] - row[written - N : written, None]).abs()
            m = m * (distance < window)
        rows.append(m)
    m = torch.stack(rows).to(query.device)
    k, v = (x.repeat_interleave(H // G, 1).double() for x in (key, value))
    scores = query.double() @ k.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(m == 0, float("-inf")) + m.clamp(min=1).double().log()
    lse = scores.logsumexp(-1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.double()[None, :, None].expand_as(lse))
    weights = torch.where(m > 0, (scores - lse.unsqueeze(-1).clamp(min=-1e300)).exp(), 0)
    out = (weights @ v).to(query.dtype)
    return (out, lse.float()) if return_lse else out
