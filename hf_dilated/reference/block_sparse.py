"""Block-sparse attention straight from its definition."""

import torch
from torch import Tensor

from hf_dilated.config import BlockParts, BlockSparseConfig
from hf_dilated.reference.dense import positions, softmax_over

WRAP = 1 << 64


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: BlockSparseConfig,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
    layer: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense softmax over a mask; arguments as in :func:`hf_dilated.block_sparse_attention`.

    Returns:
        Output (B, H, N, Dv) in float64 and, if asked for, the log-sum-exp (B, H, N). Differentiable.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
        >>> block_sparse_attention(q, k, v, BlockSparseConfig(block_size=2, global_blocks=1)).shape
        torch.Size([1, 2, 8, 4])
    """
    B, H, N, _ = query.shape
    G, M = key.shape[1:3]
    if key_positions is None:
        key_positions = positions(B, N, M, attention_mask, position_ids).to(query.device)
    groups = config.layers[layer % len(config.layers)] if config.layers else (config,)
    turn = layer % len(config.layers) if config.layers else 0
    m = torch.zeros(B, H, N, M, dtype=torch.long, device="cpu")
    for b in range(B):
        for h in range(H):
            group = h // (H // len(groups))
            seen = (config.seed, turn, group)
            m[b, h] = _row_mask(
                groups[group],
                config.block_size,
                key_positions[b],
                query[b, h].detach(),
                key[b, h // (H // G)].detach(),
                is_causal,
                seen,
            )
    return softmax_over(m.to(query.device), query, key, value, scale, return_lse)


def _row_mask(
    parts: BlockParts, size: int, position: Tensor, query: Tensor, key: Tensor, is_causal: bool, seed: tuple[int, ...]
) -> Tensor:
    """Who sees whom (N, M), for one row of the batch and one head."""
    N, M = len(query), len(key)
    earlier = int((position != -2).sum()) - N  # slots before the first query
    document = (position == 0).cumsum(0)
    mask = torch.zeros(N, M, dtype=torch.long, device="cpu")
    for d in document[position >= 0].unique().tolist():
        slots = ((document == d) & (position >= 0)).nonzero()[:, 0].cpu()
        p_j = torch.arange(len(slots), device="cpu")
        p_i = p_j[slots >= earlier]
        seen = visible_blocks(parts, -(-len(slots) // size), is_causal, seed)
        shown = torch.tensor([[j in row for j in range(len(seen))] for row in seen], device="cpu")
        sees = shown[p_i // size][:, p_j // size]
        if parts.topk_blocks:
            for n, p in enumerate(p_i.tolist()):
                chosen = _chosen(parts, size, slots.tolist(), p, seen[p // size], query[slots[p] - earlier], key)
                sees[n] |= torch.tensor([j // size in chosen for j in p_j.tolist()], device="cpu")
        if is_causal:
            sees &= p_j <= p_i[:, None]
        mask[(slots[p_i] - earlier)[:, None], slots] = sees.long()
    return mask


def _chosen(
    parts: BlockParts, size: int, slots: list[int], p: int, seen: set[int], query: Tensor, key: Tensor
) -> set[int]:
    """The blocks that a token chooses: those with the largest product of query and mean key, the first of equals."""
    candidates = [j for j in range(p // size) if j not in seen]
    score = {j: float(query.double() @ key[slots[j * size : (j + 1) * size]].double().mean(0)) for j in candidates}
    return set(sorted(candidates, key=lambda j: -score[j])[: parts.topk_blocks])


def visible_blocks(
    parts: BlockParts, blocks: int, is_causal: bool, seed: tuple[int, ...] = (0, 0, 0)
) -> list[set[int]]:
    """List the blocks that every block of queries sees, without those that tokens choose.

    Args:
        parts: What is seen.
        blocks: Blocks of the document.
        is_causal: Whether blocks see only earlier ones.
        seed: The seed, the index of the layer's entry in ``layers``, and the group of heads.

    Example:
        >>> visible_blocks(BlockParts(local_blocks=1, stride_blocks=2), 4, is_causal=True)
        [{0}, {1}, {1, 2}, {1, 3}]
    """
    distances = {1 << power for power in range(parts.dilated_blocks)}

    def shows(i: int, j: int) -> bool:
        return (
            abs(i - j) < parts.local_blocks
            or j < parts.global_blocks
            or (i < parts.global_blocks and not is_causal)
            or (parts.stride_blocks > 0 and j % parts.stride_blocks == parts.stride_blocks - 1)
            or abs(i - j) in distances
            or (parts.block_mask is not None and int(parts.block_mask[i], 16) >> j & 1 == 1)
        )

    seen = [{j for j in range(blocks) if shows(i, j) and (j <= i or not is_causal)} for i in range(blocks)]
    drawn = [
        (i, j)
        for i in range(blocks)
        for j in _drawn(parts.random_blocks, [j for j in range(i) if j not in seen[i]], i, seed)
    ]
    for i, j in drawn:
        seen[i].add(j)
        if not is_causal:
            seen[j].add(i)
    return seen


def _drawn(count: int, candidates: list[int], row: int, seed: tuple[int, ...]) -> list[int]:
    """Draw without replacement by Floyd's algorithm, with SplitMix64 as a hash of row and turn."""
    state = 0
    for number in seed:
        state = _mix(state + number * 0x9E3779B97F4A7C15 + 0xBF58476D1CE4E5B9)
    chosen: list[int] = []
    for turn in range(min(count, len(candidates))):
        last = max(len(candidates) - count, 0) + turn
        bits = _mix(row * 0x9E3779B97F4A7C15 + turn * 0x94D049BB133111EB + state) >> 33
        rank = bits * (last + 1) >> 31
        chosen.append(last if rank in chosen else rank)
    return [candidates[rank] for rank in chosen]


def _mix(x: int) -> int:
    x %= WRAP
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WRAP
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WRAP
    return x ^ x >> 31
