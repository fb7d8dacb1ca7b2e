"""Where the documents of a batch lie: which key slots and which queries belong to which document."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """Documents of a batch of ``rows`` rows with ``queries`` queries and ``keys`` key slots each.

    A flat query index is ``row * queries + n``, a flat key index ``row * keys + slot``. A token's position
    ``p`` counts from 0 within its document; the queries of a document are its last tokens.

    Attributes:
        key_base: Flat key index of the token ``p = 0``, per document.
        query_base: Flat query index that ``p = 0`` has, or would have if it were a query.
        first_query: Position of the first query.
        length: Number of tokens.
    """

    rows: int
    queries: int
    keys: int
    key_base: tuple[int, ...]
    query_base: tuple[int, ...]
    first_query: tuple[int, ...]
    length: tuple[int, ...]

    @classmethod
    def whole_rows(cls, rows: int, queries: int, keys: int) -> "Documents":
        """One document a row, without padding; the queries are its last tokens.

        Example:
            >>> Documents.whole_rows(1, 2, 5).first_query
            (3,)
        """
        earlier = keys - queries
        return cls(
            rows,
            queries,
            keys,
            key_base=tuple(row * keys for row in range(rows)),
            query_base=tuple(row * queries - earlier for row in range(rows)),
            first_query=(earlier,) * rows,
            length=(keys,) * rows,
        )

    @property
    def are_whole_rows(self) -> bool:
        """Whether every row is one document without padding."""
        return self == Documents.whole_rows(self.rows, self.queries, self.keys)


@dataclass(frozen=True)
class Layout:
    """Documents and, where their tokens do not lie side by side, the tokens to bring together first.

    Attributes:
        documents: The documents, after bringing tokens together if that is needed.
        query_index: Flat indices of the real queries of the batch, or None if documents lie side by side.
        key_index: The same for the keys.
    """

    documents: Documents
    query_index: Integers | None = None
    key_index: Integers | None = None


def layout_from_positions(positions: Integers, queries: int) -> Layout:
    """Read documents off the positions of key slots.

    Args:
        positions: (B, M) index of each slot's token within its document; -1 padding, -2 not written.
        queries: N; the queries are the last N written slots of their row.

    Raises:
        ValueError: If slots that are not written lie between written ones, fewer than N slots of a row are written, or
            the positions of a document do not count up from 0.
    """
    rows, keys = positions.shape
    written = _written_slots(positions, queries)
    row, slot = np.nonzero(positions >= 0)
    position = positions[row, slot]
    first = np.flatnonzero(position == 0)
    _check_counting(position, row, first)
    length = np.diff(np.append(first, len(position)))
    query_slot = slot - (written[row] - queries)
    is_query = query_slot >= 0
    earlier = np.add.reduceat(~is_query, first) if len(first) else first
    together = np.flatnonzero(np.diff(slot) != 1) + 1
    if np.isin(together, first).all():
        key_base = row[first] * keys + slot[first]
        query_base = row[first] * queries + query_slot[first]
        shape, index = (rows, queries, keys), None
    else:
        key_base, query_base = first, (np.cumsum(is_query) - is_query)[first] - earlier
        shape = (1, int(is_query.sum()), len(position))
        index = (row * queries + query_slot)[is_query], row * keys + slot
    kept = length > earlier
    documents = Documents(
        *shape,
        key_base=tuple(key_base[kept].tolist()),
        query_base=tuple(query_base[kept].tolist()),
        first_query=tuple(earlier[kept].tolist()),
        length=tuple(length[kept].tolist()),
    )
    return Layout(documents, *index) if index else Layout(documents)


def _written_slots(positions: Integers, queries: int) -> Integers:
    """How many slots of each row are written."""
    is_written = positions != -2
    written = is_written.sum(1)
    if (is_written != (np.arange(positions.shape[1]) < written[:, None])).any():
        raise ValueError("key_positions: the slots that are not written (-2) must be the last ones of their row")
    if (written < queries).any():
        raise ValueError(f"key_positions: {queries} queries, but only {written.min()} slots are written")
    return written


def _check_counting(position: Integers, row: Integers, first: Integers) -> None:
    starts_row = np.diff(row, prepend=-1) != 0
    counts_up = np.diff(position, prepend=-1) == 1
    if not np.all((position == 0) | (counts_up & ~starts_row)):
        raise ValueError("key_positions: the tokens of every document must count 0, 1, 2, …; padding is -1")
