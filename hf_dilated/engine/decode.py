"""One causal query against a cache: read only the keys that the pattern sees, without asking the host."""

import math
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dilated.engine import kernels
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
    slots = LastDocument.of(key_positions, len(key), key.shape[2], query.device)
    output, lse = attend_last(query, key, value, slots, pattern, scale)
    return output.to(query.dtype), lse


class LastDocument(NamedTuple):
    """Where the tokens of each row's last document lie among the key slots.

    Attributes:
        position: (B,) position of the query.
        longest: More than every position.
        is_own: (B, M) slots of its document up to itself; None for all.
        slots: (B, longest + 1) slots of the positions, -1 where there is none; None if they are the same.
    """

    position: Tensor
    longest: int
    is_own: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, key_positions: Tensor | None, rows: int, keys: int, device: torch.device) -> "LastDocument":
        """Read them off the positions of the key slots."""
        if key_positions is None:
            return cls(torch.full((rows,), keys - 1, device=device), keys)
        key_positions = key_positions.to(device)
        last = (key_positions != -2).sum(1, keepdim=True) - 1
        slot = torch.arange(keys, device=device)
        start = torch.where((key_positions == 0) & (slot <= last), slot, 0).amax(1, keepdim=True)
        is_own = (key_positions >= 0) & (slot >= start) & (slot <= last)
        place = torch.where(is_own, key_positions, keys)
        return cls(key_positions.gather(1, last).squeeze(1), keys, is_own, slots_of(place, keys))

    def of_positions(self, position: Tensor, is_any: Tensor) -> Tensor:
        """LastDocument (B, …) of positions, -1 for those that are not any."""
        if self.slots is None:
            return torch.where(is_any, position, -1)
        place = torch.where(is_any, position, self.longest).expand(len(self.slots), *position.shape[1:])
        return self.slots.gather(1, place.flatten(1)).view_as(place)


def slots_of(position: Tensor, longest: int) -> Tensor:
    """Turn the position (B, M) of each slot, ``longest`` for none, into the slot (B, longest + 1) of each position."""
    slot = torch.arange(position.shape[1], device=position.device).expand_as(position)
    slots = position.new_full((len(position), longest + 1), -1).scatter_(1, position, slot)
    slots[:, longest] = -1
    return slots


def attend_last(
    query: Tensor, key: Tensor, value: Tensor, slots: LastDocument, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from the last token to the keys that are here; tensors as in :func:`decode`, other than their dtypes."""
    parts = [
        _attend_all(heads, query, key, value, slots, scale)
        if sees_all
        else _attend_seen(heads, query, key, value, slots, pattern, scale)
        for heads, sees_all in _runs(pattern, query.shape[1], slots.longest)
    ]
    return _side_by_side(parts)


def _side_by_side(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put the heads of outputs and LSEs together."""
    return parts[0] if len(parts) == 1 else (torch.cat([x for x, _ in parts], 1), torch.cat([x for _, x in parts], 1))


def _attend(query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend in float32 at least: query (B, h, r, D), key (B, h, K, D), value (B, h, K, Dv), is_seen (B, h or 1, K)."""
    dtype = wide(key.dtype)
    scores = (query.to(dtype) @ key.to(dtype).transpose(2, 3)) * scale
    scores = scores.masked_fill(~is_seen.unsqueeze(2), -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(is_seen.unsqueeze(2), (scores - lse).exp(), 0)
    value = torch.where(is_seen.unsqueeze(3), value.to(dtype), 0)
    return weights @ value, lse.squeeze(3)


def _runs(pattern: Pattern, heads: int, keys: int) -> list[tuple[range, bool]]:
    """Query heads side by side, and whether they see every key of their document."""
    if pattern.is_dense(keys) or not isinstance(pattern, BlockSparsePattern):
        return [(range(heads), pattern.is_dense(keys))]
    runs = []
    for sees_all, run in groupby(pattern.groups(heads), key=lambda group: group.parts.sees_all):
        groups = list(run)
        runs.append((range(groups[0].heads.start, groups[-1].heads.stop), sees_all))
    return runs


def _attend_seen(
    heads: range, query: Tensor, key: Tensor, value: Tensor, slots: LastDocument, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Some heads read what they see."""
    H, G = query.shape[1], key.shape[1]
    if isinstance(pattern, BlockSparsePattern):
        seen, is_seen = pattern.visible_to(heads, slots.position, slots.longest, H)
        if pattern.chosen_blocks:
            chosen, is_chosen = chosen_positions(pattern, slots.position, query, _in_order(key, slots))
            mine = slice(heads.start, heads.stop)
            seen, is_seen = torch.cat([seen, chosen[:, mine]], 2), torch.cat([is_seen, is_chosen[:, mine]], 2)
    else:
        seen, is_seen = pattern.visible(slots.position, slots.longest, H, G)  # (B, H or 1, K)
    slot = slots.of_positions(seen, is_seen)
    row = torch.arange(len(query), device=query.device)[:, None, None]
    kv_head = torch.arange(heads.start, heads.stop, device=query.device)[:, None] // (H // G)
    k, v = (x[row, kv_head, slot.clamp(min=0)] for x in (key, value))
    return _attend(query[:, heads.start : heads.stop], k, v, slot >= 0, scale)


def _attend_all(
    heads: range, query: Tensor, key: Tensor, value: Tensor, slots: LastDocument, scale: float
) -> tuple[Tensor, Tensor]:
    """Some heads read every key of the document, where it lies; those that share keys come as queries."""
    B, H, _, D = query.shape
    repeats = H // key.shape[1]
    parts = []
    for run in _sharing(heads, repeats):
        kv_heads = slice(run.start // repeats, (run.stop - 1) // repeats + 1)
        k, v = key[:, kv_heads], value[:, kv_heads]
        q = query[:, run.start : run.stop].reshape(B, k.shape[1], -1, D)
        if slots.is_own is None:
            output, lse = kernels.choose_for_one(kernels.Case.of(q, v)).forward(q, k, v, False, scale)
        else:
            output, lse = _attend(q, k, v, slots.is_own[:, None], scale)
        parts.append((output.reshape(B, len(run), 1, -1), lse.reshape(B, len(run), 1)))
    return _side_by_side(parts)


def _sharing(heads: range, repeats: int) -> list[range]:
    """Cut query heads so that equally many of each part share a key-value head.

    Example:
        >>> _sharing(range(2, 10), 4)
        [range(2, 4), range(4, 8), range(8, 10)]
    """
    first = min(-(-heads.start // repeats) * repeats, heads.stop)
    last = max(heads.stop // repeats * repeats, first)
    return [part for part in (range(heads.start, first), range(first, last), range(last, heads.stop)) if part]


def _in_order(key: Tensor, slots: LastDocument) -> Tensor:
    """Keys (B, G, M, D) in the order of their positions; those that a document does not have mean nothing."""
    if slots.slots is None:
        return key
    B, G, M, _ = key.shape
    position = torch.arange(M, device=key.device).expand(B, 1, M)
    slot = slots.of_positions(position, position >= 0).clamp(min=0)
    row, head = torch.arange(B, device=key.device)[:, None, None], torch.arange(G, device=key.device)[:, None]
    return key[row, head, slot]
