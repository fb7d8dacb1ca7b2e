"""Partial attentions: the language in which a pattern says who attends to whom.

A partial is dense: its queries and keys are sequences of tokens, mostly arithmetic progressions, and every query sees
every key, or (causal) query ``i`` sees the keys ``0 … i``. Partials merge exactly by their log-sum-exp.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from hf_dilated.patterns.documents import Documents, Integers


@dataclass(frozen=True)
class Spans:
    """``n`` arithmetic progressions of flat token indices, all with the same step, which may be negative."""

    start: Integers  # (n,)
    count: Integers  # (n,)
    step: int

    def __getitem__(self, chosen: Integers) -> "Spans":
        return Spans(self.start[chosen], self.count[chosen], self.step)

    def slice(self, first: Integers, count: Integers) -> "Spans":
        """Elements ``first … first + count`` of every progression."""
        return Spans(self.start + first * self.step, count, self.step)

    def tokens(self) -> Integers:
        """The token indices, one progression after the other."""
        return np.repeat(self.start, self.count) + _within(self.count) * self.step


@dataclass(frozen=True)
class Gathered:
    """``n`` sequences of flat token indices in any order; a token may be in several of them."""

    index: Integers  # (sum of count,) one sequence after the other
    count: Integers  # (n,)

    @classmethod
    def of_runs(cls, sequence: Integers, start: Integers, count: Integers, sequences: int) -> "Gathered":
        """Put runs of ``count`` tokens from ``start`` side by side in the sequence to which each belongs."""
        order = np.argsort(sequence, kind="stable")
        runs = Spans(start[order], count[order], 1)
        return cls(runs.tokens(), np.bincount(sequence, count, sequences).astype(np.int64))

    def __getitem__(self, chosen: Integers) -> "Gathered":
        start, count = (np.cumsum(self.count) - self.count)[chosen], self.count[chosen]
        return Gathered(self.index[Spans(start, count, 1).tokens()], count)

    def tokens(self) -> Integers:
        """The token indices, one sequence after the other."""
        return self.index


def _within(count: Integers) -> Integers:
    """Number the elements of sequences from 0, one sequence after the other."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)


@dataclass(frozen=True)
class Partials:
    """``n`` partial attentions of the same heads; each query appears in at most one of them."""

    heads: tuple[int, ...]
    query: Spans | Gathered
    key: Spans | Gathered
    is_causal: bool

    def __post_init__(self) -> None:
        if self.is_causal:
            assert np.array_equal(self.query.count, self.key.count), "a causal partial is square"


# Partials of one level have disjoint queries (a query being a token and a head), and disjoint keys unless gathered.
Level = list[Partials]


class Pattern(Hashable, Protocol):
    """A rule for who attends to whom."""

    @property
    def spec(self) -> str:
        """The pattern as text, the inverse of :func:`hf_dilated.patterns.parse`."""
        ...

    def is_dense(self, length: int) -> bool:
        """Whether a document of a length sees all of itself."""
        ...

    def check(self, heads: int, is_causal: bool) -> None:
        """Raise the ValueError of :meth:`levels`, if there is one, also where a document sees all of itself."""
        ...

    def levels(self, documents: Documents, heads: int, kv_heads: int, is_causal: bool) -> list[Level]:
        """List the partial attentions, level by level."""
        ...

    def visible(self, position: Tensor, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """List the positions (B, H or 1, K) that a causal query at position (B,) sees.

        The second result is False where an entry is none; an entry may stand for a key several times.
        Runs on the device without synchronising. ``keys`` is the number of key slots.
        """
        ...


class ForgettingPattern(Pattern, Protocol):
    """A rule under which later tokens no longer see some keys, so that a cache may drop them."""

    def classes(self, heads: int, kv_heads: int) -> list[tuple["ForgettingPattern", int]]:
        """Split the heads into runs of whole key-value heads, of which each needs other keys than its neighbours.

        Returns:
            The pattern of every run's heads alone, and how many query heads it has.
        """
        ...

    def kept(self, key_position: Tensor, following: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Say which keys a causal query at ``following`` or later sees.

        Args:
            key_position: (B, G, M) positions of the keys, which may differ between key-value heads; -1 for none.
            following: (B,) position of the next token.

        Returns:
            (B, G, M) bool.

        Raises:
            ValueError: If the pattern never forgets, with the option that is the reason.
        """
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of the longest document; None for no limit."""
        ...

    def marks(self, position: Tensor) -> Tensor:
        """What decides which queries see the keys at positions (…, M), -1 for none: (…, K, M)."""
        ...

    def sight(self, position: Tensor, length: int, heads: int, kv_heads: int) -> Tensor:
        """What causal queries look for among the marks of keys.

        Args:
            position: (B, T) of the queries; -1 for padding, which sees nothing.
            length: Larger than every position.

        Returns:
            (B, T, H', K'); heads may share an entry.
        """
        ...

    def counts(self, sight: Tensor, marks: Tensor, heads: int) -> Tensor:
        """Say how often keys, none of which comes after the query, count for one query.

        Args:
            sight: (B, H', K') of the query.
            marks: (B, G, K, M) of the keys.
            heads: Query heads H.

        Returns:
            (B, G, H / G, M) integers or bool. Runs on the device without synchronising, in very few operators.
        """
        ...


def rectangle(heads: Sequence[int], query: Spans, key: Spans | Gathered) -> list[Level]:
    """Every query sees every key of its progression; empty ones are left out."""
    kept = np.flatnonzero((query.count > 0) & (key.count > 0))
    if not len(kept):
        return []
    return [[Partials(tuple(heads), query[kept], key[kept], is_causal=False)]]


def staircase(heads: Sequence[int], query: Spans, key: Spans, offset: Integers) -> list[Level]:
    """Query ``i`` sees the keys ``0 … i + offset``: a rectangle of ``offset`` keys and a causal square.

    With a negative offset the first queries see nothing. Keys beyond the last query's are not seen.
    """
    skipped = np.clip(-offset, 0, query.count)
    query = query.slice(skipped, query.count - skipped)
    offset = np.clip(offset, 0, key.count)
    side = np.minimum(query.count, key.count - offset)
    square = np.flatnonzero(side > 0)
    below = rectangle(heads, query, key.slice(np.zeros_like(offset), offset))
    if not len(square):
        return below
    diagonal = Partials(
        tuple(heads),
        query.slice(np.zeros_like(side), side)[square],
        key.slice(offset, side)[square],
        is_causal=True,
    )
    # queries past the end of the keys see all of them
    beyond = rectangle(heads, query.slice(side, query.count - side), key.slice(offset, side))
    return [[diagonal], *below, *beyond]


def merge_levels(per_class: Sequence[list[Level]]) -> list[Level]:
    """Put side by side the levels of head classes, whose heads are disjoint."""
    depth = max((len(levels) for levels in per_class), default=0)
    return [[part for levels in per_class if i < len(levels) for part in levels[i]] for i in range(depth)]
