"""Blocks that tokens choose by their content: the largest products of query and mean key (MoBA, arXiv:2502.13189).

The choice itself has no gradient. A choice looks at whole blocks before the token's own one alone, so it is the same
in a long forward pass and in decoding.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_dilated.engine.streamed import wide
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.block_sparse import Group
from hf_dilated.patterns.blocks import earlier_blocks
from hf_dilated.patterns.documents import Documents
from hf_dilated.patterns.partials import Gathered, Level, Partials, Spans

SCORES_AT_ONCE = 1 << 24


def chosen_blocks(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, query: Tensor, key: Tensor
) -> Tensor:
    """Let every token choose.

    Args:
        pattern: How many blocks the heads choose, and which ones they see anyway.
        documents: Where the documents of the batch lie.
        is_causal: Must be True.
        query: (B, H, N, D).
        key: (B, G, M, D).

    Returns:
        (B, H, N, k) int32 indices of blocks within the token's document; -1 for none.
    """
    B, H, N, _ = query.shape
    pattern.check(H, is_causal)
    M, size = key.shape[2], pattern.config.block_size
    chosen = torch.full((B, H, N, pattern.chosen_blocks), -1, dtype=torch.int32, device=query.device)
    for key_base, query_base, first_query, length in zip(
        documents.key_base, documents.query_base, documents.first_query, documents.length, strict=True
    ):
        row, slot = divmod(key_base, M)
        blocks = (length - 1) // size  # that can lie before a token's own one
        if not blocks:
            continue
        means = _means(key[row, :, slot : slot + blocks * size], size)
        at_once = max(1, SCORES_AT_ONCE // (H * blocks * size)) * size
        for begin in range(first_query // size * size, length, at_once):
            first, end = max(begin, first_query), min(begin + at_once, length)
            where = slice(query_base + first - row * N, query_base + end - row * N)
            position = torch.arange(first, end, device=query.device)
            scores = _scores(query[row, :, where], means)
            for group in pattern.groups(H):
                own = _candidates(group, position // size, scores[group.heads.start : group.heads.stop])
                for turn, best in enumerate(_best(own, group.parts.topk_blocks)):
                    chosen[row, group.heads.start : group.heads.stop, where, turn] = best
    return chosen


def chosen_levels(documents: Documents, chosen: Tensor, size: int, kv_heads: int) -> list[Level]:
    """List the partial attentions of the blocks that tokens chose: those who chose the same one attend together.

    Args:
        documents: Where the documents of the batch lie.
        chosen: What :func:`chosen_blocks` returned.
        size: Tokens in a block.
        kv_heads: Key-value heads G.
    """
    H = chosen.shape[1]
    host = chosen.cpu().numpy()
    base = np.zeros(host.shape[0] * host.shape[2], dtype=np.int64)  # of the keys of every query's document
    for key_base, query_base, first_query, length in zip(
        documents.key_base, documents.query_base, documents.first_query, documents.length, strict=True
    ):
        base[query_base + first_query : query_base + length] = key_base
    levels: list[Level] = []
    for rank in range(host.shape[3]):
        for turn in range(H // kv_heads):  # heads that share keys take turns
            heads = range(turn, H, H // kv_heads)
            levels.append(
                [part for head in heads for part in _of_head(head, host[:, head, :, rank].ravel(), base, size)]
            )
    return [level for level in levels if level]


def chosen_positions(
    pattern: BlockSparsePattern, position: Tensor, query: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Let one query choose, on the device without synchronising.

    Args:
        pattern: As above.
        position: (B,) of the queries.
        query: (B, H, 1, D).
        keys: (B, G, M, D) in the order of their positions.

    Returns:
        Positions (B, H, k * block size), and which of them count.
    """
    size, H = pattern.config.block_size, query.shape[1]
    blocks = keys.shape[2] // size
    seen = torch.full((len(position), H, pattern.chosen_blocks), -1, device=query.device)
    if blocks:
        means = _means(keys[:, :, : blocks * size].flatten(0, 1), size).unflatten(0, keys.shape[:2])
        scores = torch.cat([_scores(q, mean)[None] for q, mean in zip(query, means, strict=True)])  # (B, H, 1, blocks)
        for group in pattern.groups(H):
            heads = slice(group.heads.start, group.heads.stop)
            own = _candidates(group, position // size, scores[:, heads, 0].transpose(0, 1))
            for turn, best in enumerate(_best(own, group.parts.topk_blocks)):
                seen[:, heads, turn] = best.T
    positions = seen.clamp(min=0)[..., None] * size + torch.arange(size, device=query.device)
    return positions.flatten(2), (seen >= 0).repeat_interleave(size, 2)


def _means(keys: Tensor, size: int) -> Tensor:
    """Mean keys (G, blocks, D) of whole blocks (G, blocks * size, D)."""
    return keys.to(wide(keys.dtype)).unflatten(1, (-1, size)).mean(2)


def _scores(query: Tensor, means: Tensor) -> Tensor:
    """Products (H, n, blocks) of queries (H, n, D) and mean keys (G, blocks, D)."""
    grouped = query.to(means.dtype).unflatten(0, (len(means), -1)).flatten(1, 2)
    return (grouped @ means.transpose(1, 2)).view(len(query), query.shape[1], means.shape[1])


def _candidates(group: Group, row: Tensor, scores: Tensor) -> Tensor:
    """Leave the scores (h, n, blocks) of earlier blocks that no other part shows; the others become -inf."""
    blocks = scores.shape[2]
    seen = earlier_blocks(group.parts, row, blocks + 1, group.stream)
    taken = torch.zeros(len(row), blocks + 1, dtype=torch.bool, device=row.device)
    taken.scatter_(1, seen.clamp(max=blocks), True)
    taken = taken[:, :blocks] | (torch.arange(blocks, device=row.device) >= row[:, None])
    return scores.masked_fill(taken, -math.inf)


def _best(scores: Tensor, count: int) -> Iterator[Tensor]:
    """Indices (h, n) of the largest scores, one after the other, the first of equals; -1 where none is left."""
    for _ in range(count):
        best = scores.argmax(-1, keepdim=True)
        value = scores.gather(-1, best)
        yield torch.where(value == -math.inf, -1, best)[..., 0]
        scores = scores.scatter(-1, best, -math.inf)


def _of_head(head: int, block: np.ndarray, base: np.ndarray, size: int) -> Iterator[Partials]:
    """What one head's queries see of the blocks (B * N,) that they chose."""
    token = np.flatnonzero(block >= 0)
    if not len(token):
        return
    start = base[token] + block[token].astype(np.int64) * size
    order = np.argsort(start, kind="stable")
    first, count = np.unique(start, return_counts=True)
    keys = Spans(first, np.full(len(first), size), 1)
    yield Partials((head,), Gathered(token[order], count), keys, is_causal=False)
