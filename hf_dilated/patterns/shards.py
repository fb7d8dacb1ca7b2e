"""Patterns whose tokens are spread over ranks: the share of the partial attentions that one rank's queries have.

A rank holds runs of neighbouring tokens side by side. A progression of tokens becomes one progression for each run
that it crosses, or a single one where these continue one another, and a causal partial becomes squares, rectangles
and staircases between such pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hf_dilated.patterns.documents import Integers
from hf_dilated.patterns.partials import Gathered, Level, Partials, Spans, merge_levels, rectangle, staircase

Truths = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Shard:
    """Where some of a batch's tokens lie: runs of neighbours in the batch that are neighbours here.

    Attributes:
        begin: First token of each run in the batch, ascending.
        count: Its tokens.
        local: Where the first one lies here.
    """

    begin: Integers  # (n,)
    count: Integers  # (n,)
    local: Integers  # (n,)

    @classmethod
    def joined(cls, shards: Sequence["Shard"], distance: int) -> "Shard":
        """Put shards behind one another, each ``distance`` after the one before."""
        begin = np.concatenate([shard.begin for shard in shards])
        local = np.concatenate([shard.local + place * distance for place, shard in enumerate(shards)])
        order = np.argsort(begin, kind="stable")
        return cls(begin[order], np.concatenate([shard.count for shard in shards])[order], local[order])

    def within(self, first: int, count: int) -> "Shard":
        """Keep what lies at ``first … first + count``, counted from there.

        Example:
            >>> Shard(np.array([2]), np.array([9]), np.array([0])).within(4, 3).tokens.tolist()
            [6, 7, 8]
        """
        begin = np.clip(self.local, first, first + count)
        end = np.clip(self.local + self.count, first, first + count)
        kept = np.flatnonzero(end > begin)
        begin, end = begin[kept], end[kept]
        return Shard(self.begin[kept] + begin - self.local[kept], end - begin, begin - first)

    @property
    def tokens(self) -> Integers:
        """(T,) the tokens, run by run."""
        return Spans(self.begin, self.count, 1).tokens()

    @property
    def places(self) -> Integers:
        """(T,) where they lie."""
        return Spans(self.local, self.count, 1).tokens()


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The part of ``n`` progressions that lies in a shard, in at most ``m`` pieces each; missing ones are empty."""

    first: Integers  # (m, n) index within its progression of a piece's first element
    count: Integers  # (m, n)
    start: Integers  # (m, n) where that element lies
    step: int

    @cached_property
    def total(self) -> Integers:
        return self.count.sum(0)

    @cached_property
    def continues(self) -> Truths:
        """(n,) whether the pieces lie one behind the other, as one progression."""
        follows = self.start[1:] == self.start[:-1] + self.count[:-1] * self.step
        return np.logical_and.reduce(follows | (self.count[1:] == 0), 0)

    def piece(self, number: int, chosen: Integers) -> Spans:
        return Spans(self.start[number, chosen], self.count[number, chosen], self.step)

    def whole(self, chosen: Integers) -> Spans:
        return Spans(self.start[0, chosen], self.total[chosen], self.step)


def _pieces(spans: Spans, shard: Shard) -> _Pieces:
    n = len(spans.start)
    last = spans.start + (spans.count - 1) * spans.step
    low, high = np.minimum(spans.start, last), np.maximum(spans.start, last)
    from_run = np.searchsorted(shard.begin + shard.count, low, side="right")
    to_run = np.searchsorted(shard.begin, high, side="right")
    most = max(int((to_run - from_run).max(initial=0)), 1)
    number = np.arange(most)[:, None]
    run = from_run + number if spans.step > 0 else to_run - 1 - number
    valid = (run >= from_run) & (run < to_run) & (spans.count > 0)
    if not valid.any():
        nothing = np.zeros((1, n), dtype=np.int64)
        return _Pieces(nothing, nothing, nothing, spans.step)
    run = np.where(valid, run, 0)
    begin, end = shard.begin[run], shard.begin[run] + shard.count[run]
    if spans.step > 0:
        first, stop = -((spans.start - begin) // spans.step), -((spans.start - end) // spans.step)
    else:
        first, stop = -((end - 1 - spans.start) // -spans.step), (spans.start - begin) // -spans.step + 1
    first, stop = np.clip(first, 0, None), np.minimum(stop, spans.count)
    count = np.where(valid, np.clip(stop - first, 0, None), 0)
    start = shard.local[run] + spans.start + first * spans.step - begin
    order = np.argsort(count == 0, axis=0, kind="stable")  # runs that the step jumps over: missing pieces stand last
    first, count, start = (np.take_along_axis(x, order, 0) for x in (first, count, start))
    return _Pieces(first, count, start, spans.step)


def between(levels: Sequence[Level], queries: Shard, keys: Shard) -> list[Level]:
    """List the partial attentions of the queries in one shard to the keys in another.

    Args:
        levels: Partial attentions of the whole batch.
        queries: Where this rank's queries lie.
        keys: Where the keys lie.

    Example:
        >>> every = np.array([0])
        >>> whole = Spans(every, np.array([8]), 1)
        >>> early, late = Shard(every, np.array([4]), every), Shard(np.array([4]), np.array([4]), every)
        >>> [len(between(staircase((0,), whole, whole, every), *pair)) for pair in ((early, late), (late, early))]
        [0, 1]
    """
    parts = [[_between(part, queries, keys) for part in level] for level in levels]
    return [level for per_part in parts for level in merge_levels(per_part)]


def _between(part: Partials, queries: Shard, keys: Shard) -> list[Level]:
    assert isinstance(part.query, Spans), "patterns gather keys alone"
    query = _pieces(part.query, queries)
    if isinstance(part.key, Gathered):
        every, gathered = np.arange(len(part.key.count)), _gathered(part.key, keys)
        pieces = [rectangle(part.heads, query.piece(i, every), gathered) for i in range(len(query.count))]
        return [level for levels in pieces for level in levels]
    key = _pieces(part.key, keys)
    whole = query.continues & key.continues
    if not part.is_causal:
        chosen = np.flatnonzero(whole)
        sides = [rectangle(part.heads, query.whole(chosen), key.whole(chosen))]
        return merge_levels([*sides, _pairs(part.heads, query, key, np.flatnonzero(~whole), is_causal=False)])
    is_square = whole & _same(query, key)
    is_flat = whole & ~is_square & ~_has_diagonal(query, key)
    square, rest = np.flatnonzero(is_square & (query.total > 0)), np.flatnonzero(~is_square & ~is_flat)
    squares: list[Level] = []
    if len(square):
        squares = [[Partials(part.heads, query.whole(square), key.whole(square), is_causal=True)]]
    flat = _steps(part.heads, query, key, np.flatnonzero(is_flat))
    return merge_levels([squares, flat, _pairs(part.heads, query, key, rest, is_causal=True)])


def _gathered(keys: Gathered, shard: Shard) -> Gathered:
    """The part of each sequence that lies in a shard."""
    if not len(shard.begin):
        return Gathered(keys.index[:0], np.zeros_like(keys.count))
    run = np.searchsorted(shard.begin, keys.index, side="right") - 1
    place = keys.index - shard.begin[run]
    here = (run >= 0) & (place < shard.count[run])
    sequence = np.repeat(np.arange(len(keys.count)), keys.count)[here]
    return Gathered((shard.local[run] + place)[here], np.bincount(sequence, minlength=len(keys.count)))


def _same(query: _Pieces, key: _Pieces) -> Truths:
    """Whether queries and keys are the same elements of their progressions."""
    if len(query.count) > len(key.count):
        query, key = key, query
    few = len(query.count)
    equal = (query.first == key.first[:few]) | (query.count == 0)
    equal &= query.count == key.count[:few]
    return np.logical_and.reduce(equal, 0) & ~np.logical_or.reduce(key.count[few:] > 0, 0)


def _sees_all(query: _Pieces, key: _Pieces) -> Truths:
    """(mq, mk, n) whether the first query of a piece sees the last key of another."""
    return query.first[:, None] >= key.first + key.count - 1


def _has_diagonal(query: _Pieces, key: _Pieces) -> Truths:
    """Whether in some pair of pieces queries see different keys."""
    both = (query.count[:, None] > 0) & (key.count > 0)
    sees_nothing = (query.first + query.count - 1)[:, None] < key.first
    return np.logical_or.reduce(both & ~_sees_all(query, key) & ~sees_nothing, (0, 1))


def _steps(heads: Sequence[int], query: _Pieces, key: _Pieces, chosen: Integers) -> list[Level]:
    """Queries of a piece see all or nothing of a piece of keys: what each piece sees more than the one before."""
    seen = np.where(_sees_all(query, key), key.count, 0).sum(1)[:, chosen]  # (mq, n)
    before = np.zeros_like(seen[0])
    passed = np.zeros_like(before)
    queries, keys = query.whole(chosen), key.whole(chosen)
    levels: list[Level] = []
    for number, count in enumerate(query.count[:, chosen]):
        more = np.where(count > 0, seen[number] - before, 0)
        levels += rectangle(heads, queries.slice(passed, queries.count - passed), keys.slice(before, more))
        before, passed = before + more, passed + count
    return levels


def _pairs(heads: Sequence[int], query: _Pieces, key: _Pieces, chosen: Integers, *, is_causal: bool) -> list[Level]:
    levels: list[Level] = []
    for i in range(len(query.count)):
        for j in range(len(key.count)):
            queries, keys = query.piece(i, chosen), key.piece(j, chosen)
            kept = np.flatnonzero((queries.count > 0) & (keys.count > 0))
            queries, keys = queries[kept], keys[kept]
            if is_causal:
                levels += staircase(heads, queries, keys, (query.first[i, chosen] - key.first[j, chosen])[kept])
            else:
                levels += rectangle(heads, queries, keys)
    return levels


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of keys, each of a token and either one key-value head or all, in the order in which they travel.

    Attributes:
        token: (R,) where the token lies, counted through all shards of ``distance`` places each.
        head: (R,) its key-value head; 0 where a row holds all heads.
        levels: The partial attentions with rows for tokens.
    """

    token: Integers
    head: Integers
    levels: list[Level]


def rows_seen(levels: Sequence[Level], repeats: int, *, per_head: bool) -> Rows:
    """List the rows of keys that partial attentions read, progression by progression, each of these once.

    Args:
        levels: The partial attentions of a rank's queries.
        repeats: Query heads that share a key-value head.
        per_head: Whether a row holds one key-value head or all.
    """
    units = [[_units(part, repeats) if per_head else [(0, part)] for part in level] for level in levels]
    asked = [_described(unit, part) for level in units for parts in level for unit, part in parts]
    if not asked:
        nothing = np.zeros(0, dtype=np.int64)
        return Rows(nothing, nothing, [])
    distinct, which = np.unique(np.concatenate(asked), axis=0, return_inverse=True)
    start, unit, step, count = distinct.T
    place = np.split((np.cumsum(count) - count)[which.reshape(-1)], np.cumsum([len(x) for x in asked])[:-1])
    places = iter(place)
    moved = [
        [
            Partials(part.heads, part.query, _as_rows(part.key, next(places)), part.is_causal)
            for parts in level
            for _, part in parts
        ]
        for level in units
    ]
    return Rows(_progressions(start, step, count), np.repeat(unit, count), moved)


def _progressions(start: Integers, step: Integers, count: Integers) -> Integers:
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(start, count) + within * np.repeat(step, count)


def _as_rows(keys: Spans | Gathered, place: Integers) -> Spans | Gathered:
    return Gathered(place, keys.count) if isinstance(keys, Gathered) else Spans(place, keys.count, 1)


def _units(part: Partials, repeats: int) -> list[tuple[int, Partials]]:
    """Split a partial by key-value head."""
    kv_heads = sorted({head // repeats for head in part.heads})
    members = {g: tuple(head for head in part.heads if head // repeats == g) for g in kv_heads}
    return [(g, Partials(members[g], part.query, part.key, part.is_causal)) for g in kv_heads]


def _described(unit: int, part: Partials) -> Integers:
    """(n, 4) start, unit, step and count of progressions of keys; a gathered key is one by itself."""
    if isinstance(part.key, Gathered):
        start = part.key.index
        return np.stack([start, *(np.full(len(start), x) for x in (unit, 1, 1))], 1)
    n = len(part.key.start)
    return np.stack([part.key.start, np.full(n, unit), np.full(n, part.key.step), part.key.count], 1)


def with_heads(levels: Sequence[Level], first: int, count: int) -> list[Level]:
    """Keep the query heads ``first … first + count`` and number them from 0.

    Example:
        >>> one = Spans(np.array([0]), np.array([1]), 1)
        >>> with_heads([[Partials((0, 2, 4), one, one, False)]], 2, 2)[0][0].heads
        (0,)
    """
    kept = [[(tuple(h - first for h in part.heads if first <= h < first + count), part) for part in x] for x in levels]
    parts = [[Partials(heads, p.query, p.key, p.is_causal) for heads, p in level if heads] for level in kept]
    return [level for level in parts if level]
