"""Which pieces of other ranks' shards a rank's queries see, where they arrive, and what attends to them.

A piece is a run of neighbouring tokens, cut to what is seen of it. Pieces arrive side by side in the order of their
tokens, so that attention reads them where they lie: with one document a rank, folded or not, nothing is copied. Between
two ranks whose tokens are scattered over many runs one large piece travels instead, and calls gather from it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_dilated.distributed.communication import Piece, Route
from hf_dilated.distributed.shares import KEPT, KEPT_BYTES, Problem, levels_of, pair_levels, plan_for
from hf_dilated.engine.plan import Call, Plan, Selection
from hf_dilated.memory.bounded import bounded_cache
from hf_dilated.patterns.documents import Integers
from hf_dilated.patterns.shards import Shard, between

MOST_PIECES = 4  # between two ranks; every piece is a message

Group = tuple[int, ...]  # distances: of a rank r the ranks (r - distance) % P


@dataclass(frozen=True, eq=False)
class Trade:
    """What a rank receives of a group of others and attends to, and what it sends to those that ask for its own.

    Attributes:
        plan: Attends with what arrives for keys.
        out: How keys and values travel.
        home: How their gradients travel back: to one layer of a shard's tokens for every rank of the group, behind a
            first layer for the rank's own.
    """

    plan: Plan
    out: Route
    home: Route


@bounded_cache(KEPT_BYTES, 8 * KEPT)
def trade_of(problem: Problem, rank: int, group: Group) -> Trade:
    """Describe what a rank exchanges with the ranks at some distances from it."""
    ranks, T = problem.layout.ranks, problem.tokens
    everywhere = [_receives(problem, r, group) for r in range(ranks)]
    sends = tuple(
        dataclasses.replace(piece, rank=other)
        for distance in group
        for other in [(rank + distance) % ranks]
        for piece in everywhere[other]
        if piece.rank == rank
    )
    rows = [sum(piece.count for piece in pieces) for pieces in everywhere]
    home = Route(
        sends=tuple(_turned(piece, T, group, (rank - piece.rank) % ranks) for piece in everywhere[rank]),
        receives=tuple(_turned(piece, T, group, (piece.rank - rank) % ranks) for piece in sends),
        rows=(1 + len(group)) * T,
        most=max(rows),
        gaps=sum(piece.count for piece in sends) < len(group) * T,
    )
    return Trade(_plan(problem, rank, everywhere[rank]), Route(sends, everywhere[rank], rows[rank], T), home)


def _turned(piece: Piece, tokens: int, group: Group, distance: int) -> Piece:
    """The way back of a piece that has travelled a distance."""
    layer = 1 + group.index(distance)
    return Piece(piece.rank, held=piece.place, place=layer * tokens + piece.held, count=piece.count)


@bounded_cache(KEPT_BYTES, 64 * KEPT)
def _receives(problem: Problem, rank: int, group: Group) -> tuple[Piece, ...]:
    """The pieces that a rank asks of a group, in the order in which they arrive."""
    ranks = problem.layout.ranks
    pieces = [
        (token, other, held, count)
        for distance in group
        for other in [(rank - distance) % ranks]
        for token, held, count in _seen(problem, rank, other)
    ]
    pieces.sort()
    place = np.cumsum([0, *(count for *_, count in pieces)]).tolist()
    return tuple(Piece(other, held, at, count) for (_, other, held, count), at in zip(pieces, place, strict=False))


def _seen(problem: Problem, rank: int, other: int) -> list[tuple[int, int, int]]:
    """First token, place and length of what a rank's queries see of another's shard."""
    is_seen = np.zeros(problem.tokens + 1, dtype=np.int64)
    for level in pair_levels(problem, rank, other):
        for part in level:
            is_seen[part.key.tokens() + 1] = 1
    if not is_seen.any():
        return []
    before = np.cumsum(is_seen)  # tokens seen before each place
    shard = problem.layout.shards[other]
    where = np.flatnonzero(is_seen) - 1
    low, high = before[shard.local], before[shard.local + shard.count]
    some = np.flatnonzero(high > low)
    first, end = where[low[some]], where[high[some] - 1] + 1
    token = shard.begin[some] + first - shard.local[some]
    goes_on = (first[1:] == end[:-1]) & (token[1:] - token[:-1] == first[1:] - first[:-1])
    starts, ends = np.append(True, ~goes_on), np.append(~goes_on, True)
    token, first, end = token[starts], first[starts], end[ends]
    if len(token) > MOST_PIECES:
        token, first, end = token[:1], first[:1], end[-1:]
    return list(zip(token.tolist(), first.tolist(), (end - first).tolist(), strict=True))


def _plan(problem: Problem, rank: int, receives: tuple[Piece, ...]) -> Plan:
    runs = sorted(run for piece in receives for run in _runs(problem.layout.shards[piece.rank], piece))
    begin, count, place = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    in_order = Shard(begin, count, np.cumsum(count) - count)
    levels = between(levels_of(problem), problem.layout.shards[rank], in_order)
    plan = plan_for(problem, levels, int(count.sum()), goes_on=True)
    places = Shard(begin, count, place).places
    if np.array_equal(places, np.arange(len(places))):
        return plan
    rows = sum(piece.count for piece in receives)
    return Plan(tuple(_moved(call, places, rows) for call in plan.calls))


def _runs(shard: Shard, piece: Piece) -> Iterator[tuple[int, int, int]]:
    """Token, length and place of the runs of tokens in a piece."""
    inside = shard.within(piece.held, piece.count)
    yield from zip(
        inside.begin.tolist(), inside.count.tolist(), (inside.local + piece.place).tolist(), strict=True
    )  # fmt: skip


def _moved(call: Call, places: Integers, rows: int) -> Call:
    """The same call where keys lie at other places: in order where it reads a view, or else it gathers."""
    key: Selection = call.key
    tokens = places[key.tokens]
    shift = tokens - key.tokens
    view = key.view
    if view is not None and len(shift):
        is_shifted = bool((shift == shift[0]).all())
        view = dataclasses.replace(view, first=view.first + int(shift[0])) if is_shifted else None
    moved = dataclasses.replace(key, tokens=tokens, view=view, length=rows, _on_device={})
    return dataclasses.replace(call, key=moved, _lengths={})
