"""Dilated attention straight from its definition."""

import math

import torch
from torch import Tensor

from hf_dilated.config import DilatedConfig
from hf_dilated.reference.dense import positions, softmax_over


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
    """Dense softmax with the bias ``log m``; arguments as in :func:`hf_dilated.dilated_attention`.

    Returns:
        Output (B, H, N, Dv) in float64 and, if asked for, the log-sum-exp (B, H, N). Differentiable.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
        >>> pattern = DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2))
        >>> dilated_attention(q, k, v, pattern).shape
        torch.Size([1, 2, 8, 4])
    """
    B, H, N, _ = query.shape
    G, M = key.shape[1:3]
    if key_positions is None:
        key_positions = positions(B, N, M, attention_mask, position_ids).to(query.device)
    m = torch.stack(
        [multiplicity(row, N, config, heads=H, kv_heads=G, is_causal=is_causal, layer=layer) for row in key_positions]
    )  # (B, H, N, M)
    return softmax_over(m, query, key, value, scale, return_lse)


def multiplicity(
    positions: Tensor,
    queries: int,
    config: DilatedConfig,
    *,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    layer: int = 0,
) -> Tensor:
    """Count the branches in which query i and key j meet, for one row of the batch.

    Args:
        positions: (M,) index of each key slot's token within its document; -1 padding, -2 not written.
            A document starts at every 0.
        queries: N; the queries are the last N written slots.
        layer: Ordinal among the layers that run the pattern.

    Returns:
        m (H, N, M), integers; 1 where a sink is involved.
    """
    written = int((positions != -2).sum())
    document = (positions == 0).cumsum(0)
    p_j, document_j = positions[None, :], document[None, :]
    p_i, document_i = positions[written - queries : written, None], document[written - queries : written, None]
    S = config.sink_tokens
    phase = config.segment_lengths[0] // 2 * (layer % 2) if config.phase == "alternate" else 0
    g_i, g_j = p_i - S + phase, p_j - S + phase

    allowed = (p_i >= 0) & (p_j >= 0) & (document_i == document_j)
    if is_causal:
        allowed = allowed & (p_j <= p_i)
    on_grid = (p_i >= S) & (p_j >= S)
    per_head = []
    for h in range(heads):
        m = torch.zeros_like(allowed, dtype=torch.long)
        for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True):
            s = residue(h, r, config, heads=heads, kv_heads=kv_heads, layer=layer)
            m += on_grid & (g_i // w == g_j // w) & (g_i % w % r == s) & (g_j % w % r == s)
        if config.overlap == "once":
            m = m.clamp(max=1)
        m = torch.where(on_grid, m, 1)
        per_head.append(m * allowed)
    return torch.stack(per_head)


def residue(head: int, rate: int, config: DilatedConfig, *, heads: int, kv_heads: int, layer: int) -> int:
    """Return s_b(h), the residue that a query head keeps at one dilation rate."""
    base = {
        "head": head,
        "kv_head": head // (heads // kv_heads),
        "grouped": head // math.ceil(heads / rate),
    }[config.offset]
    return (base + (layer if config.rotate else 0)) % rate
