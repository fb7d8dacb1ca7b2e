"""Block-sparse attention on a GPU: tables for the kernels, made on the device and kept for the next layer."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dilated.engine import flash_block_sparse
from hf_dilated.engine.execute import HAS_TRITON, runs_fused
from hf_dilated.engine.flash_block_sparse import Lists
from hf_dilated.patterns import BlockSparsePattern, Pattern
from hf_dilated.patterns.block_sparse import Tiles
from hf_dilated.patterns.documents import Documents

if HAS_TRITON:
    from hf_dilated.engine import fused_block_sparse as fused
    from hf_dilated.engine import fused_block_sparse_backward as fused_backward
    from hf_dilated.engine.fused_block_sparse import FIELDS, Tables

LONGEST_LIST = 32  # query blocks that one program adds up for a key block
KEPT = 16


class BlockSparse(NamedTuple):
    """A call of block-sparse attention on a GPU, without the blocks that tokens choose."""

    pattern: BlockSparsePattern
    documents: Documents
    is_causal: bool

    @classmethod
    def of(cls, pattern: Pattern, documents: Documents, is_causal: bool, query: Tensor) -> "BlockSparse | None":
        """Describe a call; None if it does not run on these kernels."""
        if isinstance(pattern, BlockSparsePattern) and runs_fused(query) and documents.length:
            return cls(pattern, documents, is_causal)
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend; arguments and results as in :func:`hf_dilated.engine.execute.forward`."""
        if flash_block_sparse.refuses(*self, q, v) is None:
            lists = flash_lists(*self, q.shape[1], k.shape[1], q.device)
            return flash_block_sparse.forward(lists[0], self.is_causal, q, k, v, scale)
        tables = make_tables(*self, q.shape[1], k.shape[1], q.device)
        return fused.forward(tables, self.pattern.config.block_size, self.is_causal, q, k, v, scale)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients; ``output`` and ``lse`` may be those of more than this call."""
        if flash_block_sparse.refuses(*self, q, v) is None:
            lists = flash_lists(*self, q.shape[1], k.shape[1], q.device)
            return flash_block_sparse.backward(lists[1], self.is_causal, grad, q, k, v, output, lse, scale)
        tables = make_tables(*self, q.shape[1], k.shape[1], q.device)
        size = self.pattern.config.block_size
        return fused_backward.backward(tables, size, self.is_causal, grad, q, k, v, output, lse, scale)


@lru_cache(maxsize=KEPT)
def flash_lists(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, heads: int, kv_heads: int, device: torch.device
) -> tuple[Lists, Lists]:
    """The same tables for FlashAttention 4: by queries and by keys."""
    one = Documents.whole_rows(1, documents.queries, documents.keys)
    tables = make_tables(pattern, one, is_causal, heads, kv_heads, device)
    rows = -(-documents.keys // pattern.config.block_size)
    return (
        flash_block_sparse.lists_of(tables.queries, tables.query_lists, heads, rows, is_causal),
        flash_block_sparse.lists_of(tables.keys, tables.key_lists, heads, rows, is_causal),
    )


@lru_cache(maxsize=KEPT)
def make_tables(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, heads: int, kv_heads: int, device: torch.device
) -> "Tables":
    """List the blocks of every block; nothing is computed on the host but how many there are."""
    size = pattern.config.block_size
    fields = (documents.key_base, documents.query_base, documents.first_query, documents.length)
    places = torch.tensor(fields, dtype=torch.long, device=device).T  # (documents, 4)
    groups = [pattern.tiles(group, documents, is_causal, device) for group in pattern.groups(heads)]
    queries, query_lists, base = [], [], 0
    for tiles in groups:
        entries = _entries(places, tiles.document, tiles.row, tiles.start + base, tiles.stop + base, tiles.edge)
        queries.append(entries[(tiles.start - tiles.stop).argsort(stable=True)])
        query_lists.append(tiles.blocks)
        base += len(tiles.blocks)
    keys = _Keys(groups, places, size, is_causal, crosses=(heads // len(groups)) % (heads // kv_heads) != 0)
    lengths = torch.tensor([documents.length, documents.first_query], dtype=torch.long)
    return Tables(
        queries=torch.stack(queries).int().contiguous(),
        query_lists=torch.cat(query_lists).int(),
        keys=keys.entries.int().contiguous(),
        key_lists=keys.lists.int(),
        split=keys.split.int().contiguous(),
        slots=keys.slots,
        is_even=bool((lengths % size == 0).all()),
        covers=sum(documents.length) - sum(documents.first_query) == documents.rows * documents.queries,
    )


def _entries(places: Tensor, document: Tensor, block: Tensor, start: Tensor, stop: Tensor, edge: Tensor) -> Tensor:
    fields = [block, start, stop, edge, torch.full_like(block, -1)]
    entries = torch.cat([places[document], torch.stack(fields, 1)], 1)
    assert entries.shape[1] == FIELDS
    return entries


class _Keys:
    """The blocks of queries that see a block of keys; long lists are cut, and their parts get slots."""

    def __init__(self, groups: list[Tiles], places: Tensor, size: int, is_causal: bool, crosses: bool) -> None:
        blocks = -(-places[:, 3] // size)
        first = blocks.cumsum(0) - blocks
        document = torch.arange(len(places), device=places.device).repeat_interleave(blocks)
        block = torch.arange(len(document), device=places.device) - first[document]
        lists, starts, counts, edges, base = [], [], [], [], 0
        for tiles in groups:
            rows, count, edge = _seen_by(tiles, first, len(block), is_causal)
            lists.append(rows)
            starts.append(base + count.cumsum(0) - count)
            counts.append(count)
            edges.append(edge)
            base += len(rows)
        self.lists = torch.cat(lists)
        parts = (-(-torch.stack(counts) // LONGEST_LIST)).amax(0).clamp(min=1)
        has_slots = (parts > 1) | crosses
        used = torch.where(has_slots, parts * len(groups), 0)
        slot = used.cumsum(0) - used
        self.slots = int(used.sum())
        split = [places[document, 0], places[document, 3], block, slot, slot + used]
        self.split = torch.stack(split, 1)[has_slots]
        which = torch.arange(len(block), device=places.device).repeat_interleave(parts)
        turn = torch.arange(len(which), device=places.device) - (parts.cumsum(0) - parts)[which]
        entries = []
        for number, (start, count, edge) in enumerate(zip(starts, counts, edges, strict=True)):
            begin = start[which] + (turn * LONGEST_LIST).minimum(count[which])
            end = start[which] + ((turn + 1) * LONGEST_LIST).minimum(count[which])
            own = torch.where(turn == 0, edge[which], -1)
            of_group = _entries(places, document[which], block[which], begin, end, own)
            of_group[:, -1] = torch.where(has_slots[which], (slot + number * parts)[which] + turn, -1)
            entries.append(of_group[(begin - end).argsort(stable=True)])
        self.entries = torch.stack(entries)


def _seen_by(tiles: Tiles, first: Tensor, key_blocks: int, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For every block of keys: the rows that see it whole (a flat list and counts), and the row that is its edge."""
    tile = torch.arange(len(tiles.row), device=first.device).repeat_interleave(tiles.stop - tiles.start)
    count = tiles.stop - tiles.start
    within = torch.arange(len(tile), device=first.device) - (count.cumsum(0) - count)[tile]
    key_block = first[tiles.document[tile]] + tiles.blocks[tiles.start[tile] + within]
    edge = torch.full((key_blocks,), -1, device=first.device)
    has_edge = (tiles.edge >= 0).nonzero()[:, 0]
    seen = (first[tiles.document] + tiles.edge)[has_edge]
    if is_causal:
        edge[seen] = tiles.row[has_edge]
    else:  # keys beyond the end have no gradient, so their block needs no mask
        tile, key_block = torch.cat([tile, has_edge]), torch.cat([key_block, seen])
    order = key_block.argsort(stable=True)
    return tiles.row[tile[order]], torch.bincount(key_block, minlength=key_blocks), edge


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two outputs (B, H, N, Dv) with their LSE (B, H, N)."""
    lse = torch.logaddexp(first[1], second[1])
    safe = lse.masked_fill(lse == -torch.inf, 0)
    output = sum(part * (part_lse - safe).exp().unsqueeze(-1) for part, part_lse in (first, second))
    assert isinstance(output, Tensor)
    return output.to(first[0].dtype), lse
