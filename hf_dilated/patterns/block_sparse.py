"""Block-sparse attention: rows of blocks."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_dilated.config import BlockParts, BlockSparseConfig
from hf_dilated.patterns.blocks import NONE, earlier_blocks, later_rows_see, stream_of, visited_pairs
from hf_dilated.patterns.dense import whole_documents
from hf_dilated.patterns.documents import Documents
from hf_dilated.patterns.partials import Gathered, Level, Spans, merge_levels, rectangle, staircase


class Group(NamedTuple):
    """Query heads that see the same blocks."""

    heads: range
    parts: BlockParts
    stream: int


class Tiles(NamedTuple):
    """Blocks of queries of all documents, and the blocks of keys that each of them sees.

    Attributes:
        document: (T,) index of the document.
        row: (T,) index of the block within its document.
        edge: (T,) the key block that not every query sees whole: the own one if causal, else the last one if it is
            shorter than the others; -1 if there is none.
        start: (T,) where its other key blocks, which are whole and seen by all of its queries, begin in ``blocks``.
        stop: (T,) where they end.
        blocks: (P,) indices of key blocks within their document, in order for each tile.
    """

    document: Tensor
    row: Tensor
    edge: Tensor
    start: Tensor
    stop: Tensor
    blocks: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockSparsePattern:
    """The pattern of one layer.

    Args:
        config: The parts of layers and heads.
        layer: Ordinal of the layer among those that run the pattern.
    """

    config: BlockSparseConfig
    layer: int = 0

    @property
    def spec(self) -> str:
        """The pattern as text, read by :func:`hf_dilated.patterns.parse`; layers of one pattern have one text."""
        return f"block_sparse ({self.config.text}, {self._turn})"

    @property
    def _turn(self) -> int:
        return self.layer % max(1, len(self.config.layers))

    @classmethod
    def from_fields(cls, fields: tuple[Any, ...]) -> "BlockSparsePattern":
        """Build a pattern from the fields of its :attr:`spec`."""
        config, layer = fields
        return cls(config=BlockSparseConfig.from_dict(config), layer=layer)

    def is_dense(self, length: int) -> bool:
        """Whether a document of a length certainly sees all of itself."""
        return length <= self.config.dense_length(self.layer)

    def check(self, heads: int, is_causal: bool) -> None:
        """Refuse heads that cannot be grouped, and a choice without causality."""
        self.groups(heads)
        if self.chosen_blocks and not is_causal:
            raise ValueError("topk_blocks: blocks are chosen among earlier ones, which needs causal attention")

    @property
    def chosen_blocks(self) -> int:
        """How many blocks a token chooses by their content, at most over the heads."""
        return max(parts.topk_blocks for parts in self.config.parts(self.layer))

    def groups(self, heads: int) -> list[Group]:
        """Split the query heads into those that see the same blocks.

        Raises:
            ValueError: If they cannot be split into equally large groups.
        """
        parts = self.config.parts(self.layer)
        if heads % len(parts):
            raise ValueError(f"layers: {len(parts)} groups of heads do not divide {heads} query heads")
        size = heads // len(parts)
        return [
            Group(range(n * size, (n + 1) * size), own, stream_of(self.config.seed, self._turn, n))
            for n, own in enumerate(parts)
        ]

    def density(self, length: int, is_causal: bool = True) -> float:
        """Fraction of the causal pairs of blocks (else of all) that a document visits, on average over the heads.

        Example:
            >>> BlockSparsePattern(config=BlockSparseConfig(block_size=4, local_blocks=2)).density(12)
            0.8333333333333334
        """
        size = self.config.block_size
        blocks, groups = -(-length // size), self.groups(len(self.config.parts(self.layer)))
        chosen = [group.parts.topk_blocks for group in groups]
        visited = [visited_pairs(group.parts, 0, blocks, is_causal, group.stream, "cpu") // blocks for group in groups]
        row = torch.arange(blocks)
        counts = [torch.bincount(rows, minlength=blocks) for rows in visited]
        counts = [(count + k).minimum(row + 1) if k else count for count, k in zip(counts, chosen, strict=True)]
        pairs = blocks * (blocks + 1) / 2 if is_causal else blocks**2
        return sum(int(count.sum()) for count in counts) / len(groups) / pairs

    def block_matrix(self, length: int, heads: int, is_causal: bool = True) -> Tensor:
        """Who sees whom, to look at: (heads, blocks, blocks) bool, without the blocks that tokens choose."""
        blocks = -(-length // self.config.block_size)
        seen = torch.zeros(heads, blocks * blocks, dtype=torch.bool)
        for group in self.groups(heads):
            check_mask(group.parts, blocks)
            pairs = visited_pairs(group.parts, 0, blocks, is_causal, group.stream, "cpu")
            seen[group.heads.start : group.heads.stop, pairs] = True
        return seen.unflatten(1, (blocks, blocks))

    def levels(self, documents: Documents, heads: int, kv_heads: int, is_causal: bool) -> list[Level]:
        """List the partial attentions (:class:`hf_dilated.patterns.partials.Pattern`)."""
        per_group = [self._levels(group, documents, is_causal) for group in self.groups(heads)]
        return merge_levels(per_group)

    def visible(self, position: Tensor, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """List the positions that one causal query sees (:class:`hf_dilated.patterns.partials.Pattern`)."""
        return self.visible_to(range(heads), position, keys, heads)

    def visible_to(self, some: range, position: Tensor, keys: int, heads: int) -> tuple[Tensor, Tensor]:
        """The same for some of the heads, which are whole groups."""
        size = self.config.block_size
        blocks = -(-keys // size)
        within = torch.arange(size, device=position.device)
        rows = []
        for group in self.groups(heads):
            if group.heads.start in some:
                check_mask(group.parts, blocks)
                seen = earlier_blocks(group.parts, position // size, blocks, group.stream)
                seen = (seen[:, :, None] * size + within).flatten(1)  # (B, K)
                rows.append(seen[:, None].expand(-1, len(group.heads), -1))
        longest = max(row.shape[2] for row in rows)
        rows = [torch.nn.functional.pad(row, (0, longest - row.shape[2]), value=NONE) for row in rows]
        positions = torch.cat(rows, 1)
        return positions, positions <= position[:, None, None]

    def classes(self, heads: int, kv_heads: int) -> list[tuple["BlockSparsePattern", int]]:
        """Split the heads where key-value heads begin to be read by other parts.

        See :class:`hf_dilated.patterns.partials.ForgettingPattern`.
        """
        groups, repeats = self.groups(heads), heads // kv_heads
        size = math.gcd(repeats, len(groups[0].heads))  # query heads that share both parts and keys
        parts = [group.parts for group in groups for _ in group.heads[::size]]
        readers = repeats // size
        per_key = [tuple(parts[first : first + readers]) for first in range(0, len(parts), readers)]
        runs = [list(run) for _, run in itertools.groupby(per_key, frozenset)]
        if len(runs) == 1:
            return [(self, heads)]
        return [(self._only(tuple(itertools.chain(*run))), len(run) * repeats) for run in runs]

    def _only(self, parts: tuple[BlockParts, ...]) -> "BlockSparsePattern":
        """The same blocks for equally many heads each; where blocks are drawn, others are."""
        own = parts[:1] if len(set(parts)) == 1 else parts
        return BlockSparsePattern(config=BlockSparseConfig(block_size=self.config.block_size, layers=(own,)))

    def kept(self, key_position: Tensor, following: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Say which keys later queries see (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        size = self.config.block_size
        block, row = key_position // size, (following // size)[:, None, None]
        kept = torch.zeros_like(key_position, dtype=torch.bool)
        for group in self.groups(heads):
            own = sorted({head * kv_heads // heads for head in group.heads})
            kept[:, own] |= later_rows_see(group.parts, row, block[:, own])
        return kept & (key_position >= 0)

    @property
    def longest(self) -> int | None:
        """Tokens of the smallest mask (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        rows = [len(parts.block_mask) for parts in self.config.parts(self.layer) if parts.block_mask is not None]
        return min(rows) * self.config.block_size if rows else None

    def marks(self, position: Tensor) -> Tensor:
        """Number the blocks of keys from 1; 0 is none (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        return position.unsqueeze(-2) // self.config.block_size + 1

    def sight(self, position: Tensor, length: int, heads: int, kv_heads: int) -> Tensor:
        """Which blocks a row shows to a group of heads, as bool; before them False for none."""
        size = self.config.block_size
        blocks = -(-length // size)
        query = position.flatten()
        groups = []
        for group in self.groups(heads):
            check_mask(group.parts, blocks)
            seen = earlier_blocks(group.parts, query.clamp(min=0) // size, blocks, group.stream)
            shown = torch.zeros(len(query), blocks + 2, dtype=torch.bool, device=position.device)
            shown.scatter_(1, seen.clamp(max=blocks) + 1, True)
            groups.append(shown[:, :-1] & (query >= 0)[:, None])
        return torch.stack(groups, 1).unflatten(0, position.shape)

    def counts(self, sight: Tensor, marks: Tensor, heads: int) -> Tensor:
        """Look the blocks of keys up (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        rows, G = max(len(sight), len(marks)), marks.shape[1]
        groups = sight.shape[1]
        per_head = sight.unsqueeze(2).expand(rows, -1, heads // groups, -1).reshape(rows, G, heads // G, -1)
        return per_head.gather(3, marks.expand(rows, -1, heads // G, -1))

    def tiles(self, group: Group, documents: Documents, is_causal: bool, device: str | torch.device) -> Tiles:
        """List the blocks of queries that lie in documents, with the blocks of keys that they see."""
        size = self.config.block_size
        longest = -(-max(documents.length, default=0) // size)
        check_mask(group.parts, longest)
        length, first = (
            torch.tensor(x, dtype=torch.long, device=device) for x in (documents.length, documents.first_query)
        )
        blocks = -(-length // size)
        count = blocks - first // size
        document = torch.arange(len(length), device=device).repeat_interleave(count)
        row = torch.arange(len(document), device=device) + (blocks - count.cumsum(0))[document]
        has_edge = torch.ones_like(row, dtype=torch.bool) if is_causal else (length % size != 0)[document]
        edge, start, stop = torch.full_like(row, -1), torch.zeros_like(row), torch.zeros_like(row)
        lists: list[Tensor] = []
        # causal rows see the same in every document, others depend on its length
        for total in [longest] if is_causal else sorted({-(-n // size) for n in documents.length}):
            ours = slice(None) if is_causal else (blocks == total)[document]
            i = row[ours]
            begin = min(
                f
                for f, n in zip(documents.first_query, documents.length, strict=True)
                if is_causal or -(-n // size) == total
            )
            pairs = visited_pairs(group.parts, begin // size, total, is_causal, group.stream, device)
            low, high = torch.searchsorted(pairs, i * total), torch.searchsorted(pairs, (i + 1) * total)
            last = i if is_causal else torch.full_like(i, total - 1)
            ends = torch.cat([pairs, pairs.new_full((1,), -1)])[high - 1]
            is_edge = has_edge[ours] & (high > low) & (ends == i * total + last)
            edge[ours] = torch.where(is_edge, last, -1)
            base = sum(map(len, lists))
            start[ours], stop[ours] = base + low, base + high - is_edge.long()
            lists.append(pairs % max(total, 1))
        return Tiles(document, row, edge, start, stop, torch.cat(lists) if lists else row)

    def _levels(self, group: Group, documents: Documents, is_causal: bool) -> list[Level]:
        if not documents.length:
            return []
        if group.parts.sees_all:
            return whole_documents(group.heads, documents, is_causal)
        tiles = self.tiles(group, documents, is_causal, "cpu")
        document, row, edges, start, stop, blocks = (x.numpy() for x in tiles)
        size = self.config.block_size
        length, first_query, key_base, query_base = (
            np.array(x)[document]
            for x in (documents.length, documents.first_query, documents.key_base, documents.query_base)
        )
        begin = row * size
        end, first = np.minimum(begin + size, length), np.maximum(begin, first_query)
        query = Spans(query_base + first, end - first, 1)
        edge = np.flatnonzero(edges >= 0)
        levels: list[Level] = []
        if is_causal:
            own = Spans(key_base + begin, end - begin, 1)
            levels += staircase(group.heads, query[edge], own[edge], (first - begin)[edge])
        tile = np.repeat(np.arange(len(document)), stop - start)
        block = blocks[Spans(start, stop - start, 1).tokens()]
        tokens = np.full(len(tile), size)
        if not is_causal:
            tile, block = np.append(tile, edge), np.append(block, edges[edge])
            tokens = np.append(tokens, (length - edges * size)[edge])
        key = Gathered.of_runs(tile, key_base[tile] + block * size, tokens, len(document))
        return levels + rectangle(group.heads, query, key)


def check_mask(parts: BlockParts, blocks: int) -> None:
    """Refuse documents of more blocks than a mask has."""
    if parts.block_mask is not None and blocks > len(parts.block_mask):
        raise ValueError(
            f"block_mask: has {len(parts.block_mask)} rows, but the input needs {blocks}; make the mask for the "
            "longest input (or cache)"
        )
