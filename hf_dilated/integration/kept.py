"""What a cache that drops keys, the mask function and the attention function tell one another.

A cache does not know which tokens are padding, and the attention function does not know the cache. So the length that
the cache gives for the mask is a :class:`Slots`, through which the mask function hands over the positions of all
tokens; and the keys that the cache returns are remembered here with the positions that they have.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_dilated.engine.kept import decode_kept, spread
from hf_dilated.functional import attend
from hf_dilated.integration.places import Places, Room, Told
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.memory import buffers


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


_kept = WeakIdKeyDictionary()


def remember(key: Tensor, places: Places | Room) -> None:
    """Say where the keys that a cache returns stand."""
    _kept[key] = places


def kept_keys(key: Tensor) -> Places | Room | None:
    """What the cache has said about these keys; None if they are all that there are."""
    return None if torch.compiler.is_compiling() else _kept.get(key)


def attend_kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any,
    kept: Places | Room,
    *,
    are_whole: bool,
    scale: float | None,
    sink_logits: Tensor | None,
    memory: str = "",
) -> Tensor:
    """Causal attention to what a cache has kept: query (B, H, N, D) gives (B, H, N, Dv).

    One query reads the kept keys where they lie. For several, keys and values of this one layer are put back in their
    places first.

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
    refuse_gradients(query, key, value)
    if isinstance(kept, Room):
        scale = query.shape[3] ** -0.5 if scale is None else scale
        return decode_kept(query, key, value, kept.bias(len(query), query.dtype), scale, sink_logits)
    N = query.shape[2]
    past = kept.seen - N if are_whole else int(kept.past.max())
    positions = None if are_whole else _all_positions(kept, past, N)
    with buffers.using(memory):
        key, value = (spread(x, kept.positions, past, N) for x in (key, value))
    output = attend(
        query, key, value, pattern, scale=scale, key_positions=positions, sink_logits=sink_logits, memory=memory
    )
    assert isinstance(output, Tensor)  # the log-sum-exp was not asked for
    return output


def refuse_gradients(*tensors: Tensor) -> None:
    """Refuse what autograd would have to follow."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedError("past_key_values: no gradients flow through dropped keys; use torch.no_grad()")


def _all_positions(kept: Places, past: int, queries: int) -> Tensor:
    """Positions (B, past + N), on the CPU, after every key was put back in its place."""
    slot = torch.arange(past)
    earlier = torch.where(slot < kept.past.cpu()[:, None], slot, -1)
    return torch.cat([earlier, kept.positions[:, 0, -queries:].cpu()], 1)
