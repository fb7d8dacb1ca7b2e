"""Which rank holds which tokens of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_dilated.functional import token_positions
from hf_dilated.memory.bounded import bounded_cache
from hf_dilated.patterns.documents import Documents, Integers, layout_from_positions
from hf_dilated.patterns.shards import Shard

Kind = Literal["zigzag", "contiguous"]

SHORTEST_PIECE = 128  # tokens; documents that would fall into shorter pieces are not folded
EMPTY = -1
LAYOUT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The shards of a batch: every real token belongs to one rank, padding to none.

    Tokens are counted through the batch, real ones only. Every shard has ``slots`` slots a row; slots at the end of a
    row may stay empty.

    Attributes:
        rows: B.
        length: N, tokens and padding of a row of the whole batch.
        ranks: P.
        slots: Slots of a row of a shard.
        kind: ``"zigzag"`` or ``"contiguous"``.
        documents: Where documents lie among the real tokens.
        row: (T,) row of every real token in the batch.
        column: (T,) its column.
        position: (T,) its index within its document.
        shards: The tokens of every rank, at flat places ``row * slots + slot``.

    Example:
        >>> layout = SequenceLayout.of((1, 8), ranks=2)
        >>> layout.columns(0).tolist(), layout.columns(1).tolist()
        ([[0, 1, 2, 3]], [[4, 5, 6, 7]])
    """

    rows: int
    length: int
    ranks: int
    slots: int
    kind: Kind
    documents: Documents
    row: Integers
    column: Integers
    position: Integers
    shards: tuple[Shard, ...]

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        ranks: int,
        *,
        kind: Kind = "zigzag",
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> "SequenceLayout":
        """Lay out a batch.

        Args:
            shape: (B, N).
            ranks: P.
            kind: ``"zigzag"`` gives each rank two pieces of every document of at least ``256 P`` tokens, the p-th and
                the p-th from the end; shorter documents side by side are cut once. ``"contiguous"`` cuts rows once.
            attention_mask: (B, N), 0 or False for padding.
            position_ids: (B, N) integers; a document starts where one is not its predecessor's plus one.
        """
        positions = token_positions(*shape, shape[1], attention_mask, position_ids)
        host = np.tile(np.arange(shape[1]), (shape[0], 1)) if positions is None else positions.cpu().numpy()
        return _layout(host.astype(np.int64).tobytes(), shape, ranks, kind, SHORTEST_PIECE)

    def columns(self, rank: int) -> Tensor:
        """Column of the batch (B, slots) of every slot of a shard, -1 for empty ones."""
        return self._spread(self.column, rank)

    def positions(self, rank: int) -> Tensor:
        """Index within its document (B, slots) of every token of a shard, -1 for empty slots."""
        return self._spread(self.position, rank)

    def last_document(self, rank: int) -> Tensor:
        """The same for tokens of every row's last document, -1 for all others."""
        token = np.arange(len(self.row))
        first = np.zeros(self.rows, dtype=np.int64)
        starts = token[self.position == 0]
        np.maximum.at(first, self.row[starts], starts)
        return self._spread(np.where(token >= first[self.row], self.position, EMPTY), rank)

    def _spread(self, of_token: Integers, rank: int) -> Tensor:
        spread = np.full(self.rows * self.slots, EMPTY)
        shard = self.shards[rank]
        spread[shard.places] = of_token[shard.tokens]
        return torch.from_numpy(spread.reshape(self.rows, self.slots))

    def shard(self, x: Tensor, rank: int, empty: float = 0) -> Tensor:
        """Take a rank's slice (B, slots, …) of x (B, N, …).

        Args:
            x: One entry a token.
            rank: Whose slice.
            empty: What empty slots hold.
        """
        columns = self.columns(rank).to(x.device)
        taken = x.gather(1, _expanded(columns.clamp(min=0), x)) if x.shape[1] else x.new_empty(*columns.shape)
        return taken.masked_fill(_expanded(columns < 0, x), empty)

    def unshard(self, shards: Tensor, empty: float = 0) -> Tensor:
        """Put slices (P, B, slots, …) together to (B, N, …), the inverse of :meth:`shard`."""
        whole = shards.new_full((self.rows, self.length + 1, *shards.shape[3:]), empty)
        for rank, part in enumerate(shards):
            columns = self.columns(rank).to(part.device)
            whole.scatter_(1, _expanded(torch.where(columns < 0, self.length, columns), part), part)
        return whole[:, : self.length]

    @cached_property
    def last(self) -> tuple[tuple[int, int], ...]:
        """Rank and slot of every row's last real token; (0, 0) for a row of padding."""
        found = [(0, 0)] * self.rows
        latest = [EMPTY] * self.rows
        for rank, shard in enumerate(self.shards):
            for place, token in zip((shard.local + shard.count - 1).tolist(), (shard.begin + shard.count).tolist(),
                                    strict=True):  # fmt: skip
                row, slot = divmod(place, self.slots)
                if token > latest[row]:
                    found[row], latest[row] = (rank, slot), token
        return tuple(found)


def _expanded(index: Tensor, like: Tensor) -> Tensor:
    return index.view(*index.shape, *[1] * (like.ndim - 2)).expand(*index.shape, *like.shape[2:])


@bounded_cache(LAYOUT_BYTES, most=64)
def _layout(positions: bytes, shape: tuple[int, int], ranks: int, kind: Kind, shortest: int) -> SequenceLayout:
    """Layers and batches of the same documents share a layout, and with it their plans."""
    grid = np.frombuffer(positions, dtype=np.int64).reshape(shape)
    row, column = np.nonzero(grid >= 0)
    layout_from_positions(grid, shape[1])  # checks that documents count up
    position = grid[row, column]
    first = np.flatnonzero(position == 0)
    length = np.diff(np.append(first, len(position)))
    starts = tuple(first.tolist())
    documents = Documents(
        1, len(position), len(position), starts, starts, (0,) * len(starts), tuple(length.tolist())
    )  # fmt: skip
    fold = 2 * ranks * shortest if kind == "zigzag" else None
    runs = _runs(row[first], first, length, ranks, fold)
    held = np.zeros((ranks, shape[0]), dtype=np.int64)
    for rank, of_row, _, count in runs:
        held[rank, of_row] += count
    slots = max(int(held.max(initial=0)), 1)
    return SequenceLayout(
        shape[0], shape[1], ranks, slots, kind, documents, row, column, position, tuple(_shards(runs, ranks, slots))
    )


Run = tuple[int, int, int, int]  # rank, row, first token, tokens


def _runs(row: Integers, first: Integers, length: Integers, ranks: int, fold: int | None) -> list[Run]:
    runs: list[Run] = []
    for of_row, start, count, folds in _stretches(row, first, length, fold):
        pieces = 2 * ranks if folds else ranks
        cuts = [start + count * i // pieces for i in range(pieces + 1)]
        for number, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if end > begin:
                runs.append((min(number, 2 * ranks - 1 - number), of_row, begin, end - begin))
    return runs


def _stretches(
    row: Integers, first: Integers, length: Integers, fold: int | None
) -> Iterator[tuple[int, int, int, bool]]:
    """Row, first token and tokens of what is cut as a whole: long documents, and neighbouring short ones."""
    pending: list[int] = []
    for of_row, start, count in zip(row.tolist(), first.tolist(), length.tolist(), strict=True):
        is_long = fold is not None and count >= fold
        if pending and (is_long or of_row != pending[0]):
            yield pending[0], pending[1], pending[2], False
            pending = []
        if is_long:
            yield of_row, start, count, True
        elif pending:
            pending[2] += count
        else:
            pending = [of_row, start, count]
    if pending:
        yield pending[0], pending[1], pending[2], False


def _shards(runs: list[Run], ranks: int, slots: int) -> Iterator[Shard]:
    for rank in range(ranks):
        filled: dict[int, int] = {}
        columns: list[tuple[int, int, int]] = []
        for _, row, begin, count in sorted(run for run in runs if run[0] == rank):
            used = filled.get(row, 0)
            columns.append((begin, count, row * slots + used))
            filled[row] = used + count
        table: Any = np.array(columns, dtype=np.int64).reshape(-1, 3).T
        yield Shard(*table)
