"""Caches that keep only what a later token can still see."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.kept import Slots, refuse_gradients, remember
from hf_dilated.integration.layers import layer_pattern
from hf_dilated.integration.memory import cache_memory
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.places import Places, Room, Select, Told
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.memory import BufferType, buffers
from hf_dilated.patterns import DensePattern
from hf_dilated.patterns.partials import ForgettingPattern

DROP_EVERY = 128  # tokens, while they are decoded one by one


class PatternCache(Cache):
    """A cache from which every layer that runs a pattern drops the keys that no later token of the pattern sees.

    What a model computes stays the same. Layers with a window keep a window, dense layers keep everything.

    Args:
        config: The model's configuration, which holds backend and pattern.
        drop_every: Tokens after which decoding drops again what has become invisible: there is room for as many behind
            the kept keys. A prompt, or a part of one, is reduced at once, layer by layer.

    Raises:
        UnsupportedError: If the model does not run this backend, or its pattern never forgets a key.

    Example:
        >>> from transformers import LlamaConfig
        >>> from hf_dilated import DilatedConfig
        >>> config = LlamaConfig(num_hidden_layers=2)
        >>> config.hf_dilated = DilatedConfig(segment_lengths=(64, 128), dilation_rates=(1, 2), dense_layers=(1,))
        >>> [type(layer).__name__ for layer in DilatedCache(config).layers]
        ['PatternLayer', 'DynamicLayer']
    """

    backend: ClassVar[str]

    def __init__(self, config: Any, *, drop_every: int = DROP_EVERY) -> None:
        text = config.get_text_config(decoder=True)
        running = text._attn_implementation or stored_config(text).attn_implementation
        if running != self.backend:
            raise UnsupportedError(
                f"{type(self).__name__}: the model runs attn_implementation={running!r}, not {self.backend!r}; load it "
                f"with attn_implementation={self.backend!r} or use a DynamicCache"
            )
        if drop_every < 1:
            raise ValueError(f"drop_every: expected at least 1, got {drop_every}")
        self.told = Told()
        memory = cache_memory(text, self.backend)
        heads = text.num_attention_heads
        start: dict[str, Places] = {}
        layers = DynamicCache(config=config).layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                pattern: Any = layer_pattern(text, index, None, BACKENDS[self.backend].name)
                if not isinstance(pattern, DensePattern):
                    none = start.setdefault(pattern.spec, Places.none(pattern, heads))
                    layers[index] = PatternLayer(none, self.told, drop_every, memory)
        super().__init__(layers=layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of tokens of which the mask has to tell, and how many lie before them."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return (length if self.is_sliding[layer_idx] else Slots.of(length, self.told)), offset


class DilatedCache(PatternCache):
    """Keeps the sinks, and of the segments that go on the residues of each key-value head; see :class:`PatternCache`.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model_cards/pystdlib-4m", attn_implementation="dilated")
        >>> ids = torch.arange(100)[None]
        >>> model.generate(ids, max_new_tokens=2, past_key_values=DilatedCache(model.config)).shape
        torch.Size([1, 102])
    """

    backend = "dilated"


class BlockSparseCache(PatternCache):
    """Keeps the blocks that a later row of the pattern shows; see :class:`PatternCache`."""

    backend = "block_sparse"


class PatternLayer(DynamicLayer):
    """The keys and values of one layer, those that a later token sees.

    Several tokens are put behind what is kept, and then all is reduced. Tokens that come one by one are written into
    room that is kept behind; when it is full, keys and values move to where there is room again.

    Attributes:
        places: Where the keys stand; layers that are given the same ones share all that follow from them.
    """

    is_croppable = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, places: Places, told: Told, drop_every: int, memory: str = "") -> None:
        super().__init__()
        self.places: Places | Room = places
        self.told = told
        self.drop_every = drop_every
        self.memory = memory
        self.is_initialized = False
        _check_forgets(places.pattern, places.heads)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys (B, G, N, D) and values of new tokens; return them behind those that were kept."""
        if torch.compiler.is_compiling():
            raise UnsupportedError("past_key_values: a cache that drops keys cannot be compiled; use a static cache")
        if self.keys is not None and self.values is not None and key_states.shape[2] == 1:
            return self._write(self.keys, self.values, key_states, value_states)
        return self._join(key_states, value_states)

    def _join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put tokens behind, and drop what none after them sees; keys and values of before that are returned."""
        places = self.places.joined(self.told, keys)
        if self.keys is None or self.values is None:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        else:
            used = self.places.used
            with buffers.using(self.memory):
                keys = buffers.joined(BufferType.CACHE, [self.keys[:, :, :used], keys], 2)
                values = buffers.joined(BufferType.CACHE, [self.values[:, :, :used], values], 2)
        if places.has_dropped:
            remember(keys, places)
        self.places, order = places.reduced()
        self.keys, self.values = (self._chosen(x, order) for x in (keys, values))
        return keys, values

    def _write(self, keys: Tensor, values: Tensor, new_key: Tensor, new_value: Tensor) -> tuple[Tensor, Tensor]:
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
        self.keys, self.values, self.places = keys, values, after
        remember(keys, after)
        return keys, values

    def _chosen(self, x: Tensor, slots: Tensor | None) -> Tensor:
        """Keys (or values) in slots (B or 1, G, M), of all if there is nothing to choose."""
        if slots is None:
            return x
        B, D = len(x), x.shape[3]
        with buffers.using(self.memory):
            return buffers.chosen(BufferType.CACHE, x, 2, slots.expand(B, -1, -1)[..., None].expand(-1, -1, -1, D))

    def _with_room(self, x: Tensor, used: int, slots: int, dtype: torch.dtype) -> Tensor:
        """Put the used slots of x before zeros."""
        B, G, _, D = x.shape
        with buffers.using(self.memory):
            result = buffers.full(
                BufferType.CACHE, (B, G, slots, D), 0.0, torch.promote_types(x.dtype, dtype), x.device
            )
        result[:, :, :used] = x[:, :, :used]
        return result

    def get_seq_length(self) -> int:
        """Number of tokens so far, also those whose keys are gone."""
        return self.places.seen

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized, self.places = False, self.places.emptied()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped cannot come back."""
        raise UnsupportedError(
            "past_key_values: a cache that drops keys cannot take tokens back, as assisted generation and prompt "
            "lookup need; use a DynamicCache for them"
        )

    def offload(self) -> None:
        """Refused: what is kept is small, and stays where it is."""
        raise UnsupportedError("past_key_values: a cache that drops keys is not offloaded; use a DynamicCache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row go on from another one, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(lambda x: x[indices.to(x.device)], indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(lambda x: x.repeat_interleave(repeats, 0), repeats)

    def _select(self, select: Select, cause: object) -> None:
        """Take rows; the cause is the same object for all layers."""
        if self.keys is None or self.values is None:
            return
        self.places = self.places.selected(select, cause)
        self.keys, self.values = select(self.keys), select(self.values)


def _takes(x: Tensor, new: Tensor) -> bool:
    """Whether something new can be written into x; what inference mode has made, only inference mode changes."""
    return x.dtype == new.dtype and (torch.is_inference_mode_enabled() or not x.is_inference())


def _check_forgets(pattern: ForgettingPattern, heads: int) -> None:
    nothing = torch.empty(1, heads, 0, dtype=torch.long)
    try:
        pattern.kept(nothing, torch.zeros(1, dtype=torch.long), heads, heads)
    except ValueError as error:
        raise UnsupportedError(f"{error}; use a DynamicCache") from error
