"""From the partial attentions of a pattern to as few kernel calls as possible.

Partials of equal size run as one batch. Where tokens of a batch have regular distances it reads and writes
strided views of the original tensors; otherwise its tokens are gathered side by side, and then partials of
all head classes, and on some devices of all lengths, share one call.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dilated.engine.kernels import PackedLengths
from hf_dilated.memory.bounded import bounded_cache
from hf_dilated.patterns.documents import Documents, Integers
from hf_dilated.patterns.partials import Gathered, Level, Partials, Pattern, Spans

LARGEST_VIEWED_RATE = 4  # rows further apart are gathered: the copy costs less than strided reads and many launches
SMALL_CALL = 1 << 15  # rows (token and head) up to which a launch costs more than gathering them
GATHERED_PART = 4  # of all rows a call gathers one in this many: query, key, value and output are then one query
LEAST_GATHERED = 1 << 15  # rows that a call may gather in any case
MOST_GATHERED = 1 << 16  # keys of a head that a call puts side by side where rows share them
REGULAR_SIZE = 128  # sizes that come from segments rather than from the end of a document
PLANS_KEPT = 16
PLAN_BYTES = 1 << 30  # a plan takes some 80 bytes a token, and every kind of layer has its own


@dataclass(frozen=True)
class View:
    """A selection as a strided view (rows, segments, tokens, heads, D) of a (B, H, N, D) tensor."""

    rows: int
    segments: int
    count: int
    first: int
    segment_step: int
    step: int
    heads: range

    def of(self, x: Tensor) -> Tensor:
        """Return the view (rows, segments, tokens, heads, …) of x (B, H, N, …)."""
        batch, head, token, *rest = x.stride()
        return x.as_strided(
            (self.rows, self.segments, self.count, len(self.heads), *x.shape[3:]),
            (batch, self.segment_step * token, self.step * token, self.heads.step * head, *rest),
            x.storage_offset() + self.first * token + self.heads.start * head,
        )


@dataclass(eq=False)
class Selection:
    """The queries (or keys) of a call: ``n`` sequences of tokens, and the heads of every sequence."""

    tokens: Integers  # (T,) flat indices row * length + slot, sequence by sequence
    heads: Integers  # (C, h) one row a head class
    head_class: Integers  # (T,) index into heads
    lengths: Integers  # (n,)
    length: int  # N or M: flat indices per row
    view: View | None = None
    repeats: bool = False  # whether a row may occur several times
    _on_device: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def equal_lengths(self) -> bool:
        return bool((self.lengths == self.lengths[0]).all())

    def index(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of (B, H, N) that broadcast to (T, h)."""
        if device not in self._on_device:
            tokens, heads = torch.from_numpy(self.tokens), torch.from_numpy(self.heads)
            heads = heads[torch.from_numpy(self.head_class)] if len(heads) > 1 else heads
            row, slot = (tokens // self.length)[:, None], (tokens % self.length)[:, None]
            self._on_device[device] = tuple(i.to(device) for i in (row, heads, slot))
        return self._on_device[device]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (T,), head classes (T,) and heads (C, h) as 32-bit integers on a device."""
        if (device, "tables") not in self._on_device:
            host = (self.tokens, self.head_class, self.heads)
            self._on_device[device, "tables"] = tuple(torch.from_numpy(t.astype(np.int32)).to(device) for t in host)
        return self._on_device[device, "tables"]

    def batched(self, packed: Tensor) -> Tensor:
        """Turn (T, h, …) into (n, h, L, …), if all lengths are equal."""
        return packed.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)


@dataclass(eq=False)
class Call:
    """One kernel call.

    Attributes:
        is_first: Whether no earlier call has queries in common with this one.
        recurs: Whether later batches are likely to bring calls of the same size.
    """

    query: Selection
    key: Selection
    is_causal: bool
    is_first: bool
    recurs: bool
    _lengths: dict[torch.device, PackedLengths] = field(default_factory=dict)

    @cached_property
    def is_packed(self) -> bool:
        """Whether its sequences have different lengths."""
        return not (self.query.equal_lengths and self.key.equal_lengths)

    def packed_lengths(self, device: torch.device) -> PackedLengths:
        """Cumulative lengths for a kernel that takes sequences side by side."""
        if device not in self._lengths:
            query, key = self.query.lengths, self.key.lengths
            self._lengths[device] = PackedLengths(
                _starts(query, device), _starts(key, device), int(query.max()), int(key.max())
            )
        return self._lengths[device]


def _starts(lengths: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).to(device)


@dataclass(frozen=True, eq=False)
class Plan:
    """The kernel calls of a pattern on a batch, in the order in which they merge."""

    calls: tuple[Call, ...]


@bounded_cache(PLAN_BYTES, PLANS_KEPT)
def make_plan(pattern: Pattern, documents: Documents, heads: int, kv_heads: int, is_causal: bool, packs: bool) -> Plan:
    """Plan the kernel calls of a pattern.

    Args:
        pattern: Who attends to whom.
        documents: Where the documents of the batch lie.
        heads: Query heads H.
        kv_heads: Key-value heads G.
        is_causal: Whether tokens see only earlier ones.
        packs: Whether one call can hold sequences of different lengths; small calls then share one, too.
    """
    frame = Frame(documents.rows, documents.queries, documents.keys, documents.are_whole_rows)
    return plan_levels(pattern.levels(documents, heads, kv_heads, is_causal), frame, heads // kv_heads, packs)


@dataclass(frozen=True)
class Frame:
    """The tensors that a plan reads: ``rows`` of ``queries`` queries and ``keys`` keys.

    Attributes:
        recurs: Whether later batches are likely to bring calls of the same sizes.
    """

    rows: int
    queries: int
    keys: int
    recurs: bool


def plan_levels(levels: Iterable[Level], frame: Frame, repeats: int, packs: bool, *, goes_on: bool = False) -> Plan:
    """Plan the kernel calls of partial attentions.

    Args:
        levels: The partial attentions, in flat indices of the frame's rows.
        frame: The tensors.
        repeats: Query heads that share a key-value head.
        packs: As for :func:`make_plan`.
        goes_on: Whether another plan has attended with the same queries before.
    """
    calls: list[Call] = []
    for depth, level in enumerate(levels):
        calls += _lower(level, frame, repeats, packs, is_first=depth == 0 and not goes_on)
    return Plan(tuple(calls))


@dataclass
class _Group:
    """Partials of one size, of heads of one class; calls take groups of one ``turn``."""

    turn: int
    heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    query: Spans | Gathered
    key: Spans | Gathered
    is_causal: bool


def _lower(level: Level, frame: Frame, repeats: int, packs: bool, is_first: bool) -> Iterator[Call]:
    gathered: dict[Any, list[_Group]] = defaultdict(list)
    for group in _groups(level, repeats):
        query = _view(group.query, group.heads, frame.rows, frame.queries)
        key = _view(group.key, group.key_heads, frame.rows, frame.keys)
        is_small = packs and len(level) > 1 and group.query.count.sum() * len(group.heads) <= SMALL_CALL
        if query and key and not is_small:
            yield _call([group], frame, is_first, query, key)
        else:
            size = int(group.query.count[0]), int(group.key.count[0])
            gathered[group.is_causal, group.turn, len(group.heads), len(group.key_heads), size].append(group)
    if packs:
        gathered = _pack(gathered, _most_gathered(level, frame))
    for groups in gathered.values():
        yield _call(groups, frame, is_first)


def _most_gathered(level: Level, frame: Frame) -> int:
    heads = {head for part in level for head in part.heads}
    return max(LEAST_GATHERED, frame.rows * frame.queries * len(heads) // GATHERED_PART)


def _groups(level: Level, repeats: int) -> Iterator[_Group]:
    for part in level:
        sizes = np.stack([part.query.count, part.key.count], 1)
        distinct, which = np.unique(sizes, axis=0, return_inverse=True)
        for number in range(len(distinct)):
            chosen = np.flatnonzero(which.reshape(-1) == number)
            shares = _even_shares(part.heads, repeats)
            for number_of_piece, piece in enumerate(_pieces(part, chosen)):
                for share, (heads, key_heads) in enumerate(shares):
                    turn = number_of_piece * len(shares) + share
                    yield _Group(turn, heads, key_heads, part.query[piece], part.key[piece], part.is_causal)


def _pieces(part: Partials, chosen: Integers) -> list[Integers]:
    """Cut partials of one size so that a call copies no more keys than it has to: gathered ones may share them."""
    if not isinstance(part.key, Gathered):
        return [chosen]
    at_once = max(1, MOST_GATHERED // int(part.key.count[chosen[0]]))
    return np.split(chosen, range(at_once, len(chosen), at_once))


def _even_shares(heads: tuple[int, ...], repeats: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split query heads so that in each share every key-value head serves equally many of them.

    Example:
        >>> _even_shares((0, 4, 8, 12), repeats=8)
        [((0, 4, 8, 12), (0, 1))]
        >>> _even_shares((3, 7, 11), repeats=7)
        [((3, 7), (0, 1)), ((11,), (1,))]
    """
    served: dict[int, list[int]] = defaultdict(list)
    for head in heads:
        served[head // repeats].append(head)
    if len({len(members) for members in served.values()}) == 1:
        return [(heads, tuple(served))]
    most = max(map(len, served.values()))
    turns = [{key: members[i] for key, members in served.items() if i < len(members)} for i in range(most)]
    return [(tuple(turn.values()), tuple(turn)) for turn in turns]


def _pack(gathered: dict[Any, list[_Group]], most: int) -> dict[Any, list[_Group]]:
    """Let groups of all sizes share calls of at most ``most`` rows, or of one group."""
    packed: dict[Any, list[_Group]] = defaultdict(list)
    for (*kind, _), groups in gathered.items():
        packed[tuple(kind)] += groups
    return {(kind, number): part for kind, groups in packed.items() for number, part in enumerate(_split(groups, most))}


def _split(groups: list[_Group], most: int) -> Iterator[list[_Group]]:
    portion, rows = list[_Group](), 0
    for group in groups:
        more = max(int(group.query.count.sum()) * len(group.heads), int(group.key.count.sum()) * len(group.key_heads))
        if portion and rows + more > most:
            yield portion
            portion, rows = [], 0
        portion.append(group)
        rows += more
    yield portion


def _view(spans: Spans | Gathered, heads: tuple[int, ...], rows: int, length: int) -> View | None:
    """Describe equally long spans as a strided view, if they repeat in every row at regular distances."""
    if isinstance(spans, Gathered):
        return None
    steps = set(np.diff(heads).tolist()) or {1}
    if not 0 < spans.step <= LARGEST_VIEWED_RATE or len(steps) > 1 or min(steps) < 1 or len(spans.start) % rows:
        return None
    start = np.sort(spans.start).reshape(rows, -1)
    distances = np.diff(start[0])
    regular = (start == start[0] + np.arange(rows)[:, None] * length).all() and (distances == distances[:1]).all()
    if not regular or not np.array_equal(start.reshape(-1), spans.start):
        return None
    return View(
        rows=rows,
        segments=start.shape[1],
        count=int(spans.count[0]),
        first=int(start[0, 0]),
        segment_step=int(distances[0]) if len(distances) else 1,
        step=spans.step,
        heads=range(heads[0], heads[-1] + 1, steps.pop()),
    )


def _call(
    groups: list[_Group], frame: Frame, is_first: bool, query: View | None = None, key: View | None = None
) -> Call:
    sizes = {int(count) for g in groups for count in (g.query.count[0], g.key.count[0])}
    return Call(
        query=_side([(g.query, g.heads) for g in groups], frame.queries, query),
        key=_side([(g.key, g.key_heads) for g in groups], frame.keys, key),
        is_causal=groups[0].is_causal,
        is_first=is_first,
        recurs=frame.recurs and all(size % REGULAR_SIZE == 0 for size in sizes),
    )


def _side(spans: Iterable[tuple[Spans | Gathered, tuple[int, ...]]], length: int, view: View | None) -> Selection:
    classes: dict[tuple[int, ...], int] = {}
    tokens, head_class, lengths = [], [], []
    repeats = False
    for span, heads in spans:
        tokens.append(span.tokens())
        repeats |= isinstance(span, Gathered)
        head_class.append(np.full(len(tokens[-1]), classes.setdefault(heads, len(classes))))
        lengths.append(span.count)
    return Selection(
        tokens=np.concatenate(tokens),
        heads=np.array(list(classes)),
        head_class=np.concatenate(head_class),
        lengths=np.concatenate(lengths),
        length=length,
        view=view,
        repeats=repeats,
    )
