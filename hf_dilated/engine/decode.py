"""One causal query against a cache: read only the keys that the pattern sees, without asking the host."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_dilated.engine.chosen import chosen_positions
from hf_dilated.engine.execute import HAS_TRITON, runs_fused
from hf_dilated.engine.streamed import wide
from hf_dilated.patterns import BlockSparsePattern, DilatedPattern, Pattern

if HAS_TRITON:
    from hf_dilated.engine.fused_decode import fused_decode


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    pattern: Pattern,
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
    if isinstance(pattern, DilatedPattern) and runs_fused(query):
        return fused_decode(query, key, value, key_positions, pattern, scale)
    B, H, _, _ = query.shape
    G, M = key.shape[1:3]
    position, slot_of = _slots(key_positions, B, M, query.device)
    seen, is_seen = pattern.visible(position, M, H, G)  # (B, H or 1, K)
    if isinstance(pattern, BlockSparsePattern) and pattern.chosen_blocks:
        chosen, is_chosen = chosen_positions(pattern, position, query, _in_order(key, key_positions, slot_of))
        seen, is_seen = torch.cat([seen, chosen], 2), torch.cat([is_seen, is_chosen], 2)
    output, lse = attend_slots(query, key, value, slot_of(seen.clamp(0, M - 1)), is_seen, scale)
    return output.to(query.dtype), lse


def attend_slots(
    query: Tensor, key: Tensor, value: Tensor, slot: Tensor, is_seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to chosen slots of a cache, and read no others.

    Args:
        query: (B, H, 1, D).
        key: (B, G, M, D).
        value: (B, G, M, Dv).
        slot: (B, H or 1, K) slots; one that is listed several times counts as often.
        is_seen: (B, H or 1, K), False where an entry of ``slot`` means nothing.
        scale: Factor of the scores.

    Returns:
        Output (B, H, 1, Dv) and LSE (B, H, 1), both in float32 (float64 for float64).
    """
    (B, H), G = query.shape[:2], key.shape[1]
    kv_head = torch.arange(H, device=query.device)[:, None] // (H // G)
    row = torch.arange(B, device=query.device)[:, None, None]
    k, v = key[row, kv_head, slot], value[row, kv_head, slot]  # (B, H, K, D)
    scores = (k.to(wide(k.dtype)) @ query.to(wide(k.dtype)).transpose(2, 3)).squeeze(3) * scale
    scores = scores.masked_fill(~is_seen, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(is_seen, (scores - lse).exp(), 0)
    v = torch.where(is_seen.unsqueeze(-1), v.to(wide(v.dtype)), 0)
    return weights.unsqueeze(2) @ v, lse


def _in_order(key: Tensor, key_positions: Tensor | None, slot_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Keys (B, G, M, D) in the order of their positions; those that a document does not have mean nothing."""
    if key_positions is None:
        return key
    B, G, M, _ = key.shape
    slot = slot_of(torch.arange(M, device=key.device).expand(B, 1, M))
    row, head = torch.arange(B, device=key.device)[:, None, None], torch.arange(G, device=key.device)[:, None]
    return key[row, head, slot]


def _slots(
    key_positions: Tensor | None, rows: int, keys: int, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Position (B,) of each row's query, and the map from positions in its document to slots."""
    if key_positions is None:
        return torch.full((rows,), keys - 1, device=device), lambda position: position
    key_positions = key_positions.to(device)
    last = (key_positions != -2).sum(1, keepdim=True) - 1
    slot = torch.arange(keys, device=device)
    start = torch.where((key_positions == 0) & (slot <= last), slot, 0).amax(1, keepdim=True)
    is_own = (key_positions >= 0) & (slot >= start) & (slot <= last)
    slots = torch.zeros(rows, keys + 1, dtype=torch.long, device=device)
    slots.scatter_(1, torch.where(is_own, key_positions, keys), slot.expand(rows, keys))

    def slot_of(position: Tensor) -> Tensor:
        return slots.gather(1, position.expand(rows, -1, -1).flatten(1)).view(rows, *position.shape[1:])

    return key_positions.gather(1, last).squeeze(1), slot_of
