"""Who sees whom, to look at: the keys of some queries, from the partial attentions of any pattern."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_dilated.patterns.documents import Documents, Integers
from hf_dilated.patterns.partials import Level, Pattern

LONGEST_BOTH_WAYS = 8192  # tokens; there every pair is written down


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What some queries of one document see.

    Attributes:
        length: Tokens in the document.
        queries: Positions of the queries.
        seen: What each of them sees through one head, each key once.
        read: Keys that each of them reads on average over all heads; one counts for every time that it is read.
        is_causal: Whether tokens see only earlier ones.
    """

    length: int
    queries: Integers
    seen: list[Integers]
    read: NDArray[np.float64]
    is_causal: bool

    @property
    def possible(self) -> Integers:
        """Keys that dense attention shows to each query."""
        return self.queries + 1 if self.is_causal else np.full_like(self.queries, self.length)

    def map(self, cells: int) -> np.ndarray:
        """Share of the pairs of tokens that see each other, in ``cells`` by ``cells`` squares; rows are queries.

        Squares without a possible pair, or without a query, are NaN.
        """
        side = -(-self.length // cells)
        seen, possible = np.zeros((cells, cells)), np.zeros((cells, cells))
        edges = np.arange(cells) * side
        for query, keys, most in zip(self.queries, self.seen, self.possible, strict=True):
            seen[query // side] += np.bincount(keys // side, minlength=cells)
            possible[query // side] += np.clip(most - edges, 0, side)
        with np.errstate(invalid="ignore"):
            return np.where(possible > 0, seen / possible, np.nan)


def look(
    pattern: Pattern, length: int, *, head: int, heads: int, kv_heads: int, is_causal: bool, queries: int = 512
) -> Sight:
    """Look at what evenly spaced queries of a document see.

    Args:
        pattern: Who attends to whom.
        length: Tokens in the document.
        head: Query head to look through.
        heads: Query heads H.
        kv_heads: Key-value heads G.
        is_causal: Whether tokens see only earlier ones.
        queries: How many queries to look at; all, if there are fewer.

    Raises:
        ValueError: If the document is too long to look at in both directions, or there is no such head.

    Example:
        >>> from hf_dilated.patterns import DensePattern
        >>> look(DensePattern(window=2), 4, head=0, heads=1, kv_heads=1, is_causal=True).map(2)
        array([[1.  ,  nan],
               [0.25, 1.  ]])
    """
    if not 0 <= head < heads:
        raise ValueError(f"head: expected 0 to {heads - 1}, got {head}")
    position = np.unique(np.linspace(0, length - 1, min(queries, length)).round().astype(np.int64))
    if is_causal:
        per_query = [
            _keys(pattern.levels(Documents.whole_rows(1, 1, int(p) + 1), heads, kv_heads, True), 1, int(p) + 1, head)
            for p in position
        ]
        seen, read = [np.flatnonzero(keys[0]) for keys, _ in per_query], [float(count[0]) for _, count in per_query]
        return Sight(length=length, queries=position, seen=seen, read=np.array(read) / heads, is_causal=True)
    if length > LONGEST_BOTH_WAYS:
        raise ValueError(f"length: {length:,} tokens are too many to look at in both directions; at most 8,192")
    levels = pattern.levels(Documents.whole_rows(1, length, length), heads, kv_heads, False)
    keys, count = _keys(levels, length, length, head)
    seen = [np.flatnonzero(keys[p]) for p in position]
    return Sight(length=length, queries=position, seen=seen, read=count[position] / heads, is_causal=False)


def _keys(levels: list[Level], queries: int, keys: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Which keys every query sees through a head, and how many it reads through all heads."""
    seen, read = np.zeros((queries, keys), dtype=bool), np.zeros(queries)
    for part in (part for level in levels for part in level):
        query, key = part.query.tokens(), part.key.tokens()
        query_end, key_end = np.cumsum(part.query.count), np.cumsum(part.key.count)
        for end, rows, key_stop, columns in zip(query_end, part.query.count, key_end, part.key.count, strict=True):
            own_queries, own_keys = query[end - rows : end], key[key_stop - columns : key_stop]
            read[own_queries] += (np.arange(rows) + 1 if part.is_causal else columns) * len(part.heads)
            if head in part.heads:
                shown = np.tri(rows, columns, dtype=bool) if part.is_causal else np.ones((rows, columns), dtype=bool)
                seen[np.ix_(own_queries, own_keys)] |= shown
    return seen, read
