"""The keys and values that one layer keeps for a class of heads."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_dilated.integration.kept import Part, refuse_gradients
from hf_dilated.integration.places import Places, Room, Select, Told
from hf_dilated.memory import BufferType, buffers


@dataclass(frozen=True, eq=False, kw_only=True)
class Store:
    """Keys and values of heads of which all need the same keys, or are treated so; a change makes a new store.

    Several tokens are put behind what is kept, and then all is reduced. Tokens that come one by one are written into
    room that is kept behind; when it is full, keys and values move to where there is room again.

    Args:
        places: Where the keys stand; layers that are given the same ones share all that follow from them.
        told: What the mask function says.
        drop_every: Tokens that there is room for.
        memory: Where from to allocate, as in :func:`hf_dilated.dilated_attention`.
        is_part: Whether new keys come as a part of others, which would stay as long as a view of them does.
        keys: (B, G, C, D); None before there are any.
        values: (B, G, C, Dv), alike.
    """

    places: Places | Room
    told: Told
    drop_every: int
    memory: str
    is_part: bool = False
    keys: Tensor | None = None
    values: Tensor | None = None

    def classes(self, kv_heads: int) -> tuple["Store", ...]:
        """Split a store that holds nothing yet, by what key-value heads need."""
        classes = self.places.closed().classes(kv_heads)
        return tuple(replace(self, places=places, is_part=len(classes) > 1) for places in classes)

    def updated(self, key: Tensor, value: Tensor) -> tuple["Store", Part]:
        """Take the keys (B, G, N, D) and values of new tokens; they are also returned behind those that were kept."""
        if self.keys is not None and self.values is not None and key.shape[2] == 1:
            return self._write(self.keys, self.values, key, value)
        return self._join(key, value)

    def _join(self, keys: Tensor, values: Tensor) -> tuple["Store", Part]:
        """Put tokens behind, and drop what none after them sees; keys and values of before that are returned."""
        places = self.places.joined(self.told, keys)
        if self.keys is not None and self.values is not None:
            used = self.places.used
            with buffers.using(self.memory):
                keys = buffers.joined(BufferType.CACHE, [self.keys[:, :, :used], keys], 2)
                values = buffers.joined(BufferType.CACHE, [self.values[:, :, :used], values], 2)
        after, order = places.reduced()
        own_keys, own_values = (self._chosen(x, order) for x in (keys, values))
        return replace(self, places=after, keys=own_keys, values=own_values), Part(keys, values, places)

    def _write(self, keys: Tensor, values: Tensor, new_key: Tensor, new_value: Tensor) -> tuple["Store", Part]:
        """Write one token into the room behind the others; all slots are returned."""
        refuse_gradients(new_key, new_value)
        room = self.places
        takes = _takes(keys, new_key) and _takes(values, new_value)
        if isinstance(room, Places) or room.is_full or not takes:
            before, order = room.closed().reduced()
            room = before.with_room(self.drop_every)
            keys, values = (
                self._with_room(self._chosen(x, order), before.used, room.slots, new.dtype)
                for x, new in ((keys, new_key), (values, new_value))
            )
        after = room.advanced(self.told)
        keys.select(2, room.used).copy_(new_key.squeeze(2))
        values.select(2, room.used).copy_(new_value.squeeze(2))
        return replace(self, places=after, keys=keys, values=values), Part(keys, values, after)

    def _chosen(self, x: Tensor, slots: Tensor | None) -> Tensor:
        """Keys (or values) in slots (B or 1, G, M), of all if there is nothing to choose."""
        with buffers.using(self.memory):
            if slots is not None:
                B, D = len(x), x.shape[3]
                return buffers.chosen(BufferType.CACHE, x, 2, slots.expand(B, -1, -1)[..., None].expand(-1, -1, -1, D))
            return buffers.joined(BufferType.CACHE, [x], 2) if self.is_part and self.keys is None else x

    def _with_room(self, x: Tensor, used: int, slots: int, dtype: torch.dtype) -> Tensor:
        """Put the used slots of x before zeros."""
        B, G, _, D = x.shape
        with buffers.using(self.memory):
            result = buffers.full(
                BufferType.CACHE, (B, G, slots, D), 0.0, torch.promote_types(x.dtype, dtype), x.device
            )
        result[:, :, :used] = x[:, :, :used]
        return result

    def emptied(self) -> "Store":
        """Forget everything."""
        return replace(self, places=self.places.emptied(), keys=None, values=None)

    def selected(self, select: Select, cause: object) -> "Store":
        """Take rows; the cause is the same object for all layers."""
        if self.keys is None or self.values is None:
            return self
        places = self.places.selected(select, cause)
        return replace(self, places=places, keys=select(self.keys), values=select(self.values))


def _takes(x: Tensor, new: Tensor) -> bool:
    """Whether something new can be written into x; what inference mode has made, only inference mode changes."""
    return x.dtype == new.dtype and (torch.is_inference_mode_enabled() or not x.is_inference())
