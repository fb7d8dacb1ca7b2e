"""Caches that keep only what a later token can still see."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.kept import Kept, Part, Slots, remember
from hf_dilated.integration.layers import layer_pattern
from hf_dilated.integration.memory import cache_memory
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.places import Places, Room, Select, Told
from hf_dilated.integration.store import Store
from hf_dilated.integration.support import UnsupportedError
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
    """Keeps the blocks that a later row of the pattern shows to the query heads of each key-value head.

    See :class:`PatternCache`.
    """

    backend = "block_sparse"


class PatternLayer(DynamicLayer):
    """The keys and values of one layer, those that a later token sees.

    Attributes:
        stores: What holds them: one store for every run of key-value heads that needs other keys than its neighbours,
            which are known when the first tokens come.
    """

    is_croppable = False

    def __init__(self, places: Places, told: Told, drop_every: int, memory: str = "") -> None:
        super().__init__()
        _check_forgets(places.pattern, places.heads)
        self.pattern = places.pattern
        self.heads = places.heads
        self.stores: tuple[Store, ...] = (Store(places=places, told=told, drop_every=drop_every, memory=memory),)
        self.is_split = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys (B, G, N, D) and values of new tokens, and return what attention then asks about.

        These are all keys as long as there is one store and none was dropped, and the kept ones when some were. Several
        stores have no one tensor to return: the new keys stand for what the attention function is told of.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedError("past_key_values: a cache that drops keys cannot be compiled; use a static cache")
        are_first = self.get_seq_length() == 0
        parts = self._updated(key_states, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if len(parts) > 1:
            if not are_first:
                remember(key_states, Kept(self.pattern, parts))
            return key_states, value_states
        ((keys, values, places),) = parts
        if isinstance(places, Room) or places.has_dropped:
            remember(keys, places)
        return keys, values

    def _updated(self, key: Tensor, value: Tensor) -> tuple[Part, ...]:
        """Give every store its heads of new keys and values; what attention is to see of each is returned."""
        if not self.is_split:
            (whole,) = self.stores
            self.stores, self.is_split = whole.classes(key.shape[1]), True
        if len(self.stores) == 1:
            made = [self.stores[0].updated(key, value)]
        else:
            heads = [store.places.heads * key.shape[1] // self.heads for store in self.stores]
            news = zip(self.stores, key.split(heads, 1), value.split(heads, 1), strict=True)
            made = [store.updated(own_key, own_value) for store, own_key, own_value in news]
        self.stores = tuple(store for store, _ in made)
        return tuple(part for _, part in made)

    def get_seq_length(self) -> int:
        """Number of tokens so far, also those whose keys are gone."""
        return self.stores[0].places.seen

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.stores = False, tuple(store.emptied() for store in self.stores)

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
        self.stores = tuple(store.selected(select, cause) for store in self.stores)


def _check_forgets(pattern: ForgettingPattern, heads: int) -> None:
    nothing = torch.empty(1, heads, 0, dtype=torch.long)
    try:
        pattern.kept(nothing, torch.zeros(1, dtype=torch.long), heads, heads)
    except ValueError as error:
        raise UnsupportedError(f"{error}; use a DynamicCache") from error
