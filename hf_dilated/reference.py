"""The oracle: dilated attention straight from its definition, dense and in float64.

Nothing here is shared with the engine, and nothing is fast. Every backend is tested against this file.
"""

import math

import torch
from torch import Tensor

from hf_dilated.config import DilatedConfig


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
    B, H, N, D = query.shape
    G, M = key.shape[1:3]
    query, key, value = query.double(), key.double(), value.double()
    if key_positions is None:
        key_positions = positions(B, N, M, attention_mask, position_ids).to(query.device)
    m = torch.stack(
        [multiplicity(row, N, config, heads=H, kv_heads=G, is_causal=is_causal, layer=layer) for row in key_positions]
    )  # (B, H, N, M)
    key, value = key.repeat_interleave(H // G, dim=1), value.repeat_interleave(H // G, dim=1)
    value = torch.where(m.any(2).unsqueeze(-1), value, 0)  # whatever lies in slots that nobody sees
    scores = query @ torch.where(m.any(2).unsqueeze(-1), key, 0).transpose(2, 3)
    scores = scores * (1 / math.sqrt(D) if scale is None else scale) + m.double().log()
    sees = m.any(-1, keepdim=True)  # a row that sees no key has output 0 and LSE -inf
    weights = torch.where(sees, torch.where(sees, scores, 0).softmax(-1), 0)
    output = weights @ value
    if not return_lse:
        return output
    return output, torch.where(sees[..., 0], torch.where(sees, scores, 0).logsumexp(-1), -math.inf)


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


def positions(
    batch: int, queries: int, keys: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Number the real tokens of every document from 0; padding is -1. Returns (B, M) integers.

    A document starts at a real token whose ``position_ids`` entry is not its predecessor's plus one.
    ``position_ids`` of shape (B, N) belong to the last N slots; nothing starts before them.
    """
    result = torch.full((batch, keys), -1)
    for b in range(batch):
        count = 0
        for slot in range(keys):
            if attention_mask is not None and not attention_mask[b, slot]:
                continue
            if position_ids is not None:
                t = slot - (keys - position_ids.shape[1])
                if t >= 1 and position_ids[b, t] != position_ids[b, t - 1] + 1:
                    count = 0
            result[b, slot] = count
            count += 1
    return result
