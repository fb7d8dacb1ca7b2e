"""The part of a pattern that one rank computes, and what has to reach it for that; index arithmetic, kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.engine.plan import Frame, Plan, plan_levels
from hf_dilated.memory import buffers
from hf_dilated.memory.bounded import bounded_cache
from hf_dilated.patterns import BlockSparsePattern, parse
from hf_dilated.patterns.documents import Integers
from hf_dilated.patterns.partials import Level
from hf_dilated.patterns.shards import Rows, Shard, between, rows_seen, with_heads

KEPT = 32
KEPT_BYTES = 256 << 20  # of each function, with the layouts that its problems hold
PAIRS_KEPT = 4096  # a pass over n chunks takes up to n * n plans, and needs all of them again in the next one


@dataclass(frozen=True)
class Problem:
    """What all ranks attend to together; every rank has the same."""

    layout: SequenceLayout
    pattern: str
    heads: int
    kv_heads: int
    is_causal: bool
    packs: bool  # whether sequences of different lengths can share a kernel call

    @property
    def tokens(self) -> int:
        """Slots of a shard, all rows together."""
        return self.layout.rows * self.layout.slots


@dataclass(frozen=True, eq=False)
class Index:
    """Places in a tensor of tokens: a slice where they are neighbours, so that taking them copies nothing."""

    places: Integers
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    @cached_property
    def _slice(self) -> slice | None:
        n = len(self.places)
        first = int(self.places[0]) if n else 0
        return slice(first, first + n) if np.array_equal(self.places, np.arange(first, first + n)) else None

    def of(self, x: Tensor) -> Tensor:
        """Take them from x."""
        return buffers.gathered(x, (self.tensor(x.device),)) if self._slice is None else x[self._slice]

    def tensor(self, device: torch.device) -> Tensor:
        """The places on a device."""
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self.places).to(device)
        return self._on_device[device]


@bounded_cache(KEPT_BYTES, KEPT)
def levels_of(problem: Problem) -> Sequence[Level]:
    """The partial attentions of the whole batch."""
    pattern = parse(problem.pattern)
    if isinstance(pattern, BlockSparsePattern) and pattern.chosen_blocks:
        raise ValueError("topk_blocks: a rank does not hold the keys among which tokens would choose; leave it out")
    return pattern.levels(problem.layout.documents, problem.heads, problem.kv_heads, problem.is_causal)


def plan_for(
    problem: Problem, levels: Sequence[Level], keys: int, *, goes_on: bool, kv_heads: int | None = None
) -> Plan:
    """Plan a rank's partial attentions to ``keys`` keys; ``goes_on`` after others of the same queries."""
    documents = problem.layout.documents
    recurs = len(documents.length) == problem.layout.rows and len(set(documents.length)) == 1
    frame = Frame(1, problem.tokens, keys, recurs)
    return plan_levels(levels, frame, problem.heads // (kv_heads or problem.kv_heads), problem.packs, goes_on=goes_on)


@bounded_cache(KEPT_BYTES, KEPT)
def own_plan(problem: Problem, rank: int) -> Plan:
    """A rank's queries and its own keys."""
    shard = problem.layout.shards[rank]
    return plan_for(problem, between(levels_of(problem), shard, shard), problem.tokens, goes_on=False)


@bounded_cache(KEPT_BYTES, PAIRS_KEPT)
def chunk_plan(problem: Problem, size: int, queries: int, keys: int) -> Plan:
    """Some queries and some keys of one process: of its chunks of ``size`` tokens those with these numbers."""
    shard = problem.layout.shards[0]
    own, other = (shard.within(number * size, size) for number in (queries, keys))
    tokens, seen = (min(size, problem.tokens - number * size) for number in (queries, keys))
    levels = between(levels_of(problem), own, other)
    frame = Frame(1, tokens, seen, recurs=problem.tokens % size == 0)
    return plan_levels(levels, frame, problem.heads // problem.kv_heads, problem.packs, goes_on=queries != keys)


@bounded_cache(KEPT_BYTES, 8 * KEPT)
def pair_levels(problem: Problem, rank: int, other: int) -> list[Level]:
    """The partial attentions of a rank's queries to the keys of another rank."""
    shards = problem.layout.shards
    return between(levels_of(problem), shards[rank], shards[other])


def _without(shard: Shard) -> Shard:
    return Shard(shard.begin[:0], shard.count[:0], shard.local[:0])


@dataclass(frozen=True, eq=False)
class Seen:
    """The rows of other ranks that a rank's queries see.

    Attributes:
        plan: Attends with rows for tokens.
        send: Rows for every rank.
        receive: Rows from every rank.
        per_head: Whether a row holds one key-value head or all.
        index: Place of every row that is sent, for rank after rank: ``token`` or ``token * kv_heads + head``.
    """

    plan: Plan
    per_head: bool
    send: tuple[int, ...]
    receive: tuple[int, ...]
    index: Index


@bounded_cache(KEPT_BYTES, KEPT)
def seen_plan(problem: Problem, rank: int) -> Seen:
    """A rank's queries and the rows of other ranks that they see."""
    ranks, distance = problem.layout.ranks, problem.tokens + 1
    wanted = [_rows(problem, r) for r in range(ranks)]
    own = wanted[rank]
    chosen = [rows.token // distance == rank for rows in wanted]
    token = np.concatenate([rows.token[mine] % distance for rows, mine in zip(wanted, chosen, strict=True)])
    head = np.concatenate([rows.head[mine] for rows, mine in zip(wanted, chosen, strict=True)])
    per_head = _differ(problem)
    kv_heads = 1 if per_head else problem.kv_heads
    return Seen(
        plan=plan_for(problem, own.levels, len(own.token), goes_on=True, kv_heads=kv_heads),
        per_head=per_head,
        send=tuple(int(mine.sum()) for mine in chosen),
        receive=tuple(np.bincount(own.token // distance, minlength=ranks).tolist()),
        index=Index(token * problem.kv_heads + head if per_head else token),
    )


@bounded_cache(KEPT_BYTES, KEPT)
def _rows(problem: Problem, rank: int) -> Rows:
    """What a rank asks of the others; all ranks compute it for all."""
    shards, distance = problem.layout.shards, problem.tokens + 1  # progressions end where shards do
    keys = Shard.joined([_without(s) if r == rank else s for r, s in enumerate(shards)], distance)
    levels = between(levels_of(problem), shards[rank], keys)
    return rows_seen(levels, problem.heads // problem.kv_heads, per_head=_differ(problem))


def _differ(problem: Problem) -> bool:
    """Whether heads see different keys."""
    return any(len(part.heads) < problem.heads for level in levels_of(problem) for part in level)


@dataclass(frozen=True, eq=False)
class Heads:
    """Some heads of all tokens, taken from (P · tokens) places in the batch's order."""

    plan: Plan
    index: Index


@bounded_cache(KEPT_BYTES, KEPT)
def heads_plan(problem: Problem, rank: int) -> Heads:
    """All queries and keys of a rank's share of the heads."""
    ranks, T = problem.layout.ranks, len(problem.layout.column)
    count = problem.heads // ranks
    levels = with_heads(levels_of(problem), rank * count, count)
    frame = Frame(1, T, T, problem.layout.documents.are_whole_rows)
    keys = Shard.joined(problem.layout.shards, problem.tokens)
    return Heads(plan_levels(levels, frame, problem.heads // problem.kv_heads, problem.packs), Index(keys.places))
