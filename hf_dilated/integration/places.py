"""Where the keys that a cache keeps stand.

It follows from the pattern and the tokens alone, so the layers that run one pattern share it: nothing here is changed,
every change makes a new object, and the object that it was made from remembers it. The first layer of a forward makes
it, the others are handed the same.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_dilated.engine.kept import kept_bias
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patterns.partials import ForgettingPattern

SLOTS_AT_ONCE = 16  # attention kernels of GPUs want rows of a bias to begin at multiples of this
Select = Callable[[Tensor], Tensor]


@dataclass
class Told:
    """What the mask function has said about the tokens of the current forward.

    Args:
        slots: Number of tokens so far, with the new ones; -1 before anything was said.
        positions: (B, slots) position of each token in its document, -1 for padding; None if rows are whole documents.
        forward: Another object for every forward.
    """

    slots: int = -1
    positions: Tensor | None = None
    forward: object = None

    def hear(self, slots: int, positions: Tensor | None) -> None:
        """Take what is said for a new forward."""
        self.slots, self.positions, self.forward = slots, positions, object()

    def check(self, seen: int, count: int) -> None:
        """Refuse ``count`` tokens behind those that a cache has ``seen``, if something else was said."""
        if self.slots != seen + count:
            raise UnsupportedError(
                f"past_key_values: the mask told of {self.slots} tokens, the cache has {seen + count}; pass the "
                "padding mask (batch, tokens) and let the model make its own"
            )

    def newest(self, count: int, device: torch.device) -> Tensor:
        """Positions (B or 1, count) of the newest tokens."""
        if self.positions is None:
            return torch.arange(self.slots - count, self.slots, device=device)[None]
        return self.positions[:, -count:].to(device)


@dataclass(eq=False)
class _Shared:
    """What remembers the last thing that was made from it."""

    _made: tuple[Hashable, object, Any] | None = field(default=None, init=False, repr=False)

    def _once(self, what: Hashable, cause: object, make: Callable[[], Any]) -> Any:
        """Return what was made last, if it was this and for the same cause, the very object; else make it.

        What is made must not refer to this object: keys would stay until the garbage collector finds the circle.
        """
        if self._made is None or self._made[0] != what or self._made[1] is not cause:
            self._made = what, cause, make()
        return self._made[2]


@dataclass(eq=False, kw_only=True)
class Places(_Shared):
    """The places of keys that lie side by side.

    Args:
        pattern: What is dropped is what later tokens of this pattern do not see.
        heads: Query heads H.
        positions: (B or 1, G, M) position of every key in its document, -1 for padding. Key-value heads and rows that
            need fewer keys than others keep a few more, which no query counts.
        tokens: (B or 1,) number of tokens of each row so far, without padding.
        past: The same before the newest ones.
        seen: Number of tokens so far, with padding and with those whose keys are gone.
        has_dropped: Whether any are.
    """

    pattern: ForgettingPattern
    heads: int
    positions: Tensor
    tokens: Tensor
    past: Tensor
    seen: int = 0
    has_dropped: bool = False

    @classmethod
    def none(cls, pattern: ForgettingPattern, heads: int) -> "Places":
        """The places of no keys."""
        nothing = torch.zeros(1, dtype=torch.long)
        return cls(pattern=pattern, heads=heads, positions=nothing.view(1, 1, 1)[..., :0], tokens=nothing, past=nothing)

    def classes(self, kv_heads: int) -> tuple["Places", ...]:
        """The places of no keys for each run of heads that needs other keys than its neighbours."""

        def make() -> tuple[Places, ...]:
            return tuple(Places.none(pattern, heads) for pattern, heads in self.pattern.classes(self.heads, kv_heads))

        return self._once(("classes", kv_heads), None, make)

    @property
    def used(self) -> int:
        """Slots that hold a key."""
        return self.positions.shape[2]

    def closed(self) -> "Places":
        """Themselves: there is no room to give up."""
        return self

    def emptied(self) -> "Places":
        """Forget all keys."""
        return self._once("emptied", None, lambda: Places.none(self.pattern, self.heads))

    def joined(self, told: Told, key: Tensor) -> "Places":
        """Put the new tokens of a key (B, G, N, D) behind."""
        _, G, N, _ = key.shape

        def make() -> Places:
            told.check(self.seen, N)
            return self.followed_by(told.newest(N, key.device), G)

        return self._once(("joined", G, N, key.device), told.forward, make)

    def followed_by(self, new: Tensor, kv_heads: int) -> "Places":
        """Put tokens at the positions ``new`` (B or 1, N) behind."""
        rows = max(len(self.positions), len(new))
        old, past = self.positions.to(new.device), self.tokens.to(new.device).expand(rows)
        positions = torch.cat([old.expand(rows, kv_heads, -1), new[:, None].expand(rows, kv_heads, -1)], 2)
        tokens = torch.maximum(past, new.amax(1) + 1)
        return replace(self, positions=positions, tokens=tokens, past=past, seen=self.seen + new.shape[1])

    def reduced(self) -> tuple["Places", Tensor | None]:
        """Drop what no later token sees: the places, and slots (B or 1, G, M) to take keys from, if any is dropped.

        The host waits for the device, to learn how many keys stay.
        """

        def make() -> tuple[Places, Tensor | None]:
            G, M = self.positions.shape[1:]
            kept = self.pattern.kept(self.positions, self.tokens, self.heads, G)
            count = int(kept.sum(2).max())
            if count == M:
                return replace(self), None
            order = kept.to(torch.uint8).argsort(dim=2, stable=True)[..., M - count :]
            return replace(self, positions=self.positions.gather(2, order), has_dropped=True), order

        return self._once("reduced", None, make)

    def with_room(self, room: int) -> "Room":
        """Leave room behind for tokens that come one by one."""
        return self._once(("room", room), None, lambda: Room.behind(replace(self), room))

    def selected(self, select: Select, cause: object) -> "Places":
        """Take rows; the ``cause`` is the same object for all layers."""
        names = "positions", "tokens", "past"
        if len(self.positions) == 1:
            return self
        return self._once("selected", cause, lambda: replace(self, **_rows(self, select, *names)))


@dataclass(eq=False, kw_only=True)
class Room(_Shared):
    """Places with room behind them, into which tokens are written one by one.

    Whatever depends on where a coming token stands is prepared when the room is made; what a step computes is the same
    for all layers.

    Args:
        before: What lies before the room.
        slots: All of them, C: more than will ever be written.
        coming: (B or 1, room) positions of the tokens that were written, and foreseen ones of those that come.
        marks: (B or 1, G, K, C) marks of the keys, as the pattern gives them.
        foreseen: (B or 1, 1, K, 1 + room) marks of padding, and of the tokens that were foreseen.
        sights: (B or 1, 1 + room, H', K') what padding and these tokens look for.
        sight: (B or 1, H', K') what the newest token looks for.
        written: How many of them are there.
    """

    before: Places
    slots: int
    coming: Tensor
    marks: Tensor
    foreseen: Tensor
    sights: Tensor
    sight: Tensor
    written: int = 0

    @classmethod
    def behind(cls, places: Places, room: int) -> "Room":
        """Prepare all that the coming steps share."""
        pattern, (rows, G, M) = places.pattern, places.positions.shape
        if pattern.longest is not None:
            room = max(1, min(room, pattern.longest - places.seen))
        slots = -(-(M + room + 1) // SLOTS_AT_ONCE) * SLOTS_AT_ONCE
        coming = places.tokens[:, None] + torch.arange(room, device=places.tokens.device)
        foreseen = pad(coming, (1, 0), value=-1)
        sights = pattern.sight(foreseen, places.seen + room, places.heads, G)
        positions = torch.cat([places.positions, coming[:, None].expand(rows, G, -1)], 2)
        marks = pattern.marks(pad(positions, (0, slots - M - room), value=-1))
        return cls(
            before=places, slots=slots, coming=coming, marks=marks, foreseen=pattern.marks(foreseen[:, None]),
            sights=sights, sight=sights[:, 0],
        )  # fmt: skip

    @property
    def pattern(self) -> ForgettingPattern:
        """The pattern of these layers."""
        return self.before.pattern

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.before.heads

    @property
    def used(self) -> int:
        """Slots that hold a key."""
        return self.before.used + self.written

    @property
    def is_full(self) -> bool:
        """Whether no other token goes in."""
        return self.written == self.coming.shape[1]

    @property
    def seen(self) -> int:
        """Number of tokens so far, with padding and with those whose keys are gone."""
        return self.before.seen + self.written

    def joined(self, told: Told, key: Tensor) -> Places:
        """Give up the room that is left, and put several tokens behind."""
        return self.closed().joined(told, key)

    def closed(self) -> Places:
        """Give up the room that is left."""
        new = self.coming[:, : self.written]
        return self._once("closed", None, lambda: self.before.followed_by(new, self.marks.shape[1]))

    def emptied(self) -> Places:
        """Forget all keys."""
        return self._once("emptied", None, lambda: Places.none(self.pattern, self.heads))

    def advanced(self, told: Told) -> "Room":
        """Write one token."""

        def make() -> Room:
            told.check(self.seen, 1)
            turn = self.written + 1
            if told.positions is None:
                return replace(self, sight=self.sights[:, turn], written=turn)
            return replace(self._with(told.newest(1, self.marks.device)), written=turn)

        return self._once("advanced", told.forward, make)

    def _with(self, new: Tensor) -> "Room":
        """Write a token at positions (B, 1), which may be padding in some rows."""
        coming, marks, foreseen, sights = (
            x if len(x) == len(new) else x.repeat_interleave(len(new), 0)
            for x in (self.coming, self.marks, self.foreseen, self.sights)
        )
        turn = (new - (self.before.tokens[:, None] - 1)).clamp(0, coming.shape[1])[..., None, None]  # 0: padding
        coming[:, self.written] = new[:, 0]
        marks[..., self.used] = foreseen.gather(3, turn.expand(-1, -1, foreseen.shape[2], -1))[..., 0]
        sight = sights.gather(1, turn.expand(-1, -1, *sights.shape[2:]))[:, 0]
        return replace(self, coming=coming, marks=marks, foreseen=foreseen, sights=sights, sight=sight)

    def bias(self, rows: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of the newest tokens of B rows (:func:`hf_dilated.engine.kept.decode_kept`)."""

        def make() -> Tensor:
            return kept_bias(self.pattern.counts(self.sight, self.marks, self.heads), self.used, rows, dtype)

        return self._once(("bias", rows, dtype), None, make)

    def selected(self, select: Select, cause: object) -> "Room":
        """Take rows; the ``cause`` is the same object for all layers."""
        if len(self.marks) == 1:
            return self
        names = "coming", "marks", "foreseen", "sights", "sight"

        def make() -> Room:
            return replace(self, before=self.before.selected(select, cause), **_rows(self, select, *names))

        return self._once("selected", cause, make)


def _rows(of: object, select: Select, *names: str) -> dict[str, Any]:
    return {name: select(getattr(of, name)) for name in names}
