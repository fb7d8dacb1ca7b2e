"""One causal query against a cache: read only the keys that the pattern sees, without asking the host."""

import math

import torch
from torch import Tensor

from hf_dilated.patterns import DensePattern, DilatedPattern


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    pattern: DensePattern | DilatedPattern,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from the last written token.

    Args:
        query: (B, H, 1, D).
        key: (B, G, M, D).
        value: (B, G, M, Dv).
        key_positions: (B, M) as in :func:`hf_dilated.dilated_attention`, on the device; None if the M slots
            hold one document without padding.
        pattern: Who attends to whom.
        scale: Factor of the scores.

    Returns:
        Output (B, H, 1, Dv) and LSE (B, H, 1).
    """
    B, H, _, _ = query.shape
    G, M = key.shape[1:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    position, slot_of = _slots(key_positions, B, M, query.device)
    seen_position, is_seen = pattern.visible(position, M, H, G)  # (B, H or 1, K)
    slot = slot_of(seen_position)
    kv_head = torch.arange(H, device=query.device)[:, None] // (H // G)
    row = torch.arange(B, device=query.device)[:, None, None]
    k, v = key[row, kv_head, slot], value[row, kv_head, slot]  # (B, H, K, D)
    scores = (k.to(wide) @ query.to(wide).transpose(2, 3)).squeeze(3) * scale
    scores = scores.masked_fill(~is_seen, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(is_seen & lse.isfinite(), (scores - lse).exp(), 0)
    v = torch.where(is_seen.unsqueeze(-1), v, 0).to(wide)
    output = (weights.unsqueeze(2) @ v).to(query.dtype)
    return output, lse


def _slots(key_positions, B, M, device):
    """Position (B,) of each row's query, and the map from positions of its document to slots."""
    if key_positions is None:
        return torch.full((B,), M - 1, device=device), lambda position: position.clamp(0, M - 1)
    key_positions = key_positions.to(device)
    last = (key_positions != -2).sum(1, keepdim=True) - 1
    position = key_positions.gather(1, last)
    slot = torch.arange(M, device=device)
    starts = torch.where((key_positions == 0) & (slot <= last), slot, 0).amax(1, keepdim=True)
    own = (key_positions >= 0) & (slot >= starts) & (slot <= last)
    slots = torch.zeros(B, M + 1, dtype=torch.long, device=device)
    slots.scatter_(1, torch.where(own, key_positions, M), slot.expand(B, M))
    return position.squeeze(1), lambda wanted: slots.gather(
        1, wanted.clamp(0, M - 1).expand(B, -1, -1).flatten(1)
    ).view(B, *wanted.shape[1:])
