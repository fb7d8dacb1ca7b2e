"""Caches that keep only what a later token can still see."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.kept import Kept, Slots, Told, remember
from hf_dilated.integration.layers import layer_pattern
from hf_dilated.integration.memory import cache_memory
from hf_dilated.integration.persistence import stored_config
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
        drop_every: Tokens after which decoding drops again what has become invisible; a prompt, or a part of one, is
            reduced at once, layer by layer.

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
        layers = DynamicCache(config=config).layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                pattern = layer_pattern(text, index, None, BACKENDS[self.backend].name)
                if not isinstance(pattern, DensePattern):
                    layers[index] = PatternLayer(pattern, text.num_attention_heads, self.told, drop_every, memory)
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

    Attributes:
        positions: (B or 1, G, M) position of every key in its document, -1 for padding. Key-value heads and rows that
            need fewer keys than others keep a few more, which no query counts.
        tokens: (B or 1,) number of tokens of each row so far, without padding.
        seen: Number of slots so far, with padding.
    """

    is_croppable = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, pattern: Any, heads: int, told: Told, drop_every: int, memory: str = "") -> None:
        super().__init__()
        self.pattern: ForgettingPattern = pattern
        self.heads = heads
        self.told = told
        self.drop_every = drop_every
        self.memory = memory
        self.positions: Tensor | None = None
        self.is_initialized = False
        self.tokens = torch.zeros(1, dtype=torch.long)
        self.seen = 0
        self.has_dropped = False
        _check_forgets(pattern, heads)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys (B, G, N, D) and values of new tokens; return them behind those that were kept."""
        if torch.compiler.is_compiling():
            raise UnsupportedError("past_key_values: a cache that drops keys cannot be compiled; use a static cache")
        self.seen += key_states.shape[2]
        new = self._new_positions(key_states)
        keys, values, positions = key_states, value_states, new[:, None].expand(-1, key_states.shape[1], -1)
        past = torch.zeros_like(new[:, 0])
        if self.keys is not None and self.values is not None and self.positions is not None:
            with buffers.using(self.memory):
                keys = buffers.joined(BufferType.CACHE, [self.keys, keys], 2)
                values = buffers.joined(BufferType.CACHE, [self.values, values], 2)
            rows, past = max(len(self.positions), len(positions)), self.tokens
            positions = torch.cat([x.expand(rows, -1, -1) for x in (self.positions, positions)], 2)
        else:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.positions = keys, values, positions
        self.tokens = torch.maximum(past, new.amax(1) + 1)
        if self.has_dropped:
            remember(keys, Kept(positions, past.expand(len(positions)), self.seen, self.pattern, self.heads))
        if key_states.shape[2] > 1 or self.seen % self.drop_every == 0:
            self._drop()
        return keys, values

    def _new_positions(self, key_states: Tensor) -> Tensor:
        """Positions (B or 1, N) of the new tokens."""
        if self.told.slots != self.seen:
            raise UnsupportedError(
                f"past_key_values: the mask told of {self.told.slots} tokens, the cache has {self.seen}; pass the "
                "padding mask (batch, tokens) and let the model make its own"
            )
        N, device = key_states.shape[2], key_states.device
        if self.told.positions is None:
            return torch.arange(self.seen - N, self.seen, device=device)[None]
        return self.told.positions[:, -N:].to(device)

    def _drop(self) -> None:
        """Bring together, at the end of the slots, what a later token sees."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        B, G, M, _ = self.keys.shape
        kept = self.pattern.kept(self.positions, self.tokens, self.heads, G)
        count = int(kept.sum(2).max())
        if count == M:
            return
        order = kept.to(torch.uint8).argsort(dim=2, stable=True)[..., M - count :]
        self.positions = self.positions.expand_as(kept).gather(2, order)
        order = order.expand(B, -1, -1)[..., None]
        with buffers.using(self.memory):
            self.keys, self.values = (
                buffers.chosen(BufferType.CACHE, x, 2, order.expand(-1, -1, -1, x.shape[3]))
                for x in (self.keys, self.values)
            )
        self.has_dropped = True

    def get_seq_length(self) -> int:
        """Number of tokens so far, also those whose keys are gone."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.positions = None
        self.is_initialized, self.seen, self.has_dropped = False, 0, False

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
        self._select(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def _select(self, select: Any) -> None:
        if self.keys is None or self.values is None or self.positions is None:
            return
        if len(self.positions) == len(self.keys):
            self.positions = select(self.positions)
        if len(self.tokens) == len(self.keys):
            self.tokens = select(self.tokens)
        self.keys, self.values = select(self.keys), select(self.values)


def _check_forgets(pattern: ForgettingPattern, heads: int) -> None:
    nothing = torch.empty(1, heads, 0, dtype=torch.long)
    try:
        pattern.kept(nothing, torch.zeros(1, dtype=torch.long), heads, heads)
    except ValueError as error:
        raise UnsupportedError(f"{error}; use a DynamicCache") from error
