"""What a cache that drops keys, the mask function and the attention function tell one another.

A cache does not know which tokens are padding, and the attention function does not know the cache. So the length that
the cache gives for the mask is a :class:`Slots`, through which the mask function hands over the positions of all
tokens; and the keys that the cache returns are remembered here with the positions that they have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_dilated.engine.kept import decode_kept, spread
from hf_dilated.functional import attend
from hf_dilated.integration.places import Places, Room, Told
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.memory import buffers
from hf_dilated.patterns.partials import ForgettingPattern


class Slots(int):
    """A number of key slots that remembers whose they are."""

    told: Told

    @classmethod
    def of(cls, slots: int, told: Told) -> "Slots":
        """Give a number its owner."""
        result = cls(slots)
        result.told = told
        return result


def tell(slots: int, positions: Tensor | None) -> None:
    """Say where the tokens in a number of slots stand, if a cache wants to know."""
    if isinstance(slots, Slots):
        slots.told.hear(int(slots), positions)


class Part(NamedTuple):
    """Keys (B, G, M, D) and values (B, G, M, Dv) of one class of heads, and where they stand."""

    key: Tensor
    value: Tensor
    places: Places | Room


@dataclass(frozen=True)
class Kept:
    """What a cache has kept for all heads of a layer.

    Args:
        pattern: Whose keys they are.
        parts: Those of every class, side by side.
    """

    pattern: ForgettingPattern
    parts: tuple[Part, ...]

    @property
    def heads(self) -> int:
        """Query heads H."""
        return sum(part.places.heads for part in self.parts)

    def each(self, change: Callable[..., tuple[Tensor, ...]]) -> "Kept":
        """Change keys and values."""
        parts = []
        for part in self.parts:
            key, value = change(part.key, part.value)
            parts.append(Part(key, value, part.places))
        return replace(self, parts=tuple(parts))


_said = WeakIdKeyDictionary()


def remember(key: Tensor, said: Places | Room | Kept) -> None:
    """Say where the keys that a cache returns stand, or what has been kept in place of these, which are new.

    What is said must not refer to the key: it would stay for ever.
    """
    _said[key] = said


def kept_keys(key: Tensor, value: Tensor) -> Kept | None:
    """What the cache has said about these keys; None if they are all that there are."""
    said = None if torch.compiler.is_compiling() else _said.get(key)
    return Kept(said.pattern, (Part(key, value, said),)) if isinstance(said, Places | Room) else said


def attend_kept(
    query: Tensor,
    kept: Kept,
    pattern: Any,
    *,
    are_whole: bool,
    scale: float | None,
    sink_logits: Tensor | None,
    memory: str = "",
) -> Tensor:
    """Causal attention to what a cache has kept: query (B, H, N, D) gives (B, H, N, Dv).

    One query reads the kept keys where they lie, class by class. For several, keys and values of this one layer are put
    back in their places first.

    Args:
        are_whole: Whether every row is one document without padding, as far as several queries are concerned.
        memory: Where from to allocate, as in :func:`hf_dilated.dilated_attention`.

    Raises:
        UnsupportedError: If the cache was made for another pattern, or gradients are wanted.
    """
    if pattern.spec != kept.pattern.spec or query.shape[1] != kept.heads:
        raise UnsupportedError(
            "past_key_values: the cache was made for another pattern or another number of heads; make one from this "
            "model's configuration"
        )
    refuse_gradients(query, *(x for part in kept.parts for x in (part.key, part.value)))
    places = kept.parts[0].places  # of tokens, all tell the same
    if isinstance(places, Room):
        return _decode(query, kept.parts, query.shape[3] ** -0.5 if scale is None else scale, sink_logits)
    N = query.shape[2]
    past = places.seen - N if are_whole else int(places.past.max())
    positions = None if are_whole else _all_positions(places, past, N)
    where = [part.places.closed().positions for part in kept.parts]
    with buffers.using(memory):
        key = spread([part.key for part in kept.parts], where, past, N)
        value = spread([part.value for part in kept.parts], where, past, N)
    output = attend(
        query, key, value, pattern, scale=scale, key_positions=positions, sink_logits=sink_logits, memory=memory
    )
    assert isinstance(output, Tensor)  # the log-sum-exp was not asked for
    return output


def _decode(query: Tensor, parts: Sequence[Part], scale: float, sink_logits: Tensor | None) -> Tensor:
    """Attend from one token, class by class."""
    if len(parts) == 1:
        ((key, value, places),) = parts
        assert isinstance(places, Room)  # one token is written into all rooms
        return decode_kept(query, key, value, places.bias(len(query), query.dtype), scale, sink_logits)
    heads = [part.places.heads for part in parts]
    sinks = [None] * len(parts) if sink_logits is None else sink_logits.split(heads)
    classes = zip(query.split(heads, 1), parts, sinks, strict=True)
    return torch.cat([_decode(own, [part], scale, own_sinks) for own, part, own_sinks in classes], 1)


def refuse_gradients(*tensors: Tensor) -> None:
    """Refuse what autograd would have to follow."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedError("past_key_values: no gradients flow through dropped keys; use torch.no_grad()")


def _all_positions(kept: Places, past: int, queries: int) -> Tensor:
    """Positions (B, past + N), on the CPU, after every key was put back in its place."""
    slot = torch.arange(past)
    earlier = torch.where(slot < kept.past.cpu()[:, None], slot, -1)
    return torch.cat([earlier, kept.positions[:, 0, -queries:].cpu()], 1)
