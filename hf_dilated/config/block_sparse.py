"""Block-sparse attention as data."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hf_dilated.config.checks import ConfigError, at_least, integer, integers, known_fields, longest_input
from hf_dilated.config.presets import BLOCK_SPARSE

LARGEST_BLOCK = 128
WINDOW = 2048  # tokens
COUNTS = ("local_blocks", "global_blocks", "stride_blocks", "dilated_blocks", "random_blocks", "topk_blocks")


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """Which blocks of keys a block of queries sees: the union of its parts.

    Blocks are counted from the start of a document; block i of the queries sees block j of the keys. Causal attention
    keeps j ≤ i, and inside the diagonal block a token sees itself and the tokens before it.

    Args:
        local_blocks: The own block and the ``local_blocks - 1`` before it; not causal: ``|i - j| < local_blocks``.
        global_blocks: The first blocks of the document; not causal: they see the whole document as well.
        stride_blocks: Every block j with ``j % stride_blocks == stride_blocks - 1``; 0 for none.
        dilated_blocks: How many of the blocks at distances 1, 2, 4, 8, …; not causal: in both directions.
        random_blocks: Blocks before the own one, drawn among those that no other part shows (all, if they are fewer);
            not causal: the drawn blocks see block i as well.
        topk_blocks: Blocks that every token chooses for itself by their content, among the blocks before its own that
            no other part shows: those whose mean key has the largest product with the query (MoBA, arXiv:2502.13189).
            Causal only; ``local_blocks`` must be at least 1.
        block_mask: A mask of one's own: row i lists with its bits, as a hexadecimal number, the blocks j that it shows.
            Anything with ``tolist()`` or nested sequences of True and False are taken as well. A document may
            not have more blocks than the mask has rows.

    Raises:
        ConfigError: If a field is malformed, or nothing is seen.
    """

    local_blocks: int = 1
    global_blocks: int = 0
    stride_blocks: int = 0
    dilated_blocks: int = 0
    random_blocks: int = 0
    topk_blocks: int = 0
    block_mask: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in COUNTS:
            object.__setattr__(self, name, integer(name, getattr(self, name)))
            at_least(name, (getattr(self, name),), 0)
        if self.block_mask is not None:
            object.__setattr__(self, "block_mask", _mask_rows(self.block_mask))
        if self.block_mask is None and not any(getattr(self, name) for name in COUNTS):
            raise ConfigError("local_blocks: no part shows any block; keep at least the own one with local_blocks=1")
        if self.topk_blocks and not self.local_blocks:
            raise ConfigError(
                "local_blocks: topk_blocks chooses among the blocks before the own one; keep that as well"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; parts that are not there are left out."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(BlockParts)
            if (value := getattr(self, field.name)) != field.default
        }

    @property
    def sees_all(self) -> bool:
        """Whether documents of any length see all of themselves."""
        return self.dense_blocks == sys.maxsize

    @property
    def dense_blocks(self) -> int:
        """Blocks of the longest document that certainly sees all of itself; a mask bounds it, as it bounds any."""
        if self.stride_blocks == 1:
            seen = sys.maxsize
        elif self.local_blocks:
            seen = self.local_blocks + self.global_blocks + self.random_blocks + self.topk_blocks
        else:
            return 0
        return seen if self.block_mask is None else min(seen, len(self.block_mask))

    def causal_density(self, blocks: int) -> float:
        """Fraction of the ``blocks * (blocks + 1) / 2`` causal pairs of blocks that a document of ``blocks`` visits.

        Example:
            >>> BlockParts(local_blocks=2).causal_density(3)
            0.8333333333333334
        """
        row = np.arange(blocks)
        before = np.maximum(row + 1 - self.local_blocks, 0)  # blocks that are not local
        seen = row + 1 - before
        first = np.minimum(self.global_blocks, before)
        seen = seen + first
        if self.stride_blocks:
            seen += before // self.stride_blocks - first // self.stride_blocks
        for distance in (1 << power for power in range(min(self.dilated_blocks, blocks.bit_length()))):
            seen += (row - distance >= self.global_blocks) & ~self.shows_always(row, row - distance)
        shows_own = np.broadcast_to(self.shows_always(row, row), row.shape).copy()
        for i, bits in enumerate(self.mask_bits()[:blocks]):
            later = np.flatnonzero(bits[: i + 1])
            seen[i] += np.count_nonzero(~self.shows_always(i, later) & ~self.is_dilated(i, later))
            shows_own[i] |= bits[i]
        seen += np.minimum(self.random_blocks + self.topk_blocks, row - (seen - shows_own))
        return float(seen.sum() / (blocks * (blocks + 1) / 2))

    def shows_always(self, i: Any, j: Any) -> Any:
        """Whether causal row i sees block j ≤ i by a part that follows from the two alone, other than ``dilated``."""
        shown = (i - j < self.local_blocks) | (j < self.global_blocks)
        return shown | (j % self.stride_blocks == self.stride_blocks - 1) if self.stride_blocks else shown

    def is_dilated(self, i: Any, j: Any) -> Any:
        """Whether block j lies at one of the dilated distances before block i."""
        distance = i - j
        return (distance > 0) & (distance & (distance - 1) == 0) & (distance < 1 << min(self.dilated_blocks, 62))

    def mask_bits(self) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
        """Rows of ``block_mask`` as arrays of bool, as long as the mask has rows."""
        rows = self.block_mask or ()
        width = -(-len(rows) // 8)
        packed = (np.frombuffer(int(row, 16).to_bytes(width, "little"), np.uint8) for row in rows)
        return [np.unpackbits(row, bitorder="little")[: len(rows)].astype(bool) for row in packed]


Layers = tuple[tuple[BlockParts, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BlockSparseConfig(BlockParts):
    """Block-sparse attention: one softmax over a union of blocks.

    *Density* is, everywhere, the fraction of the causal pairs of blocks (not causal: of all pairs) that are visited.

    Args:
        block_size: Tokens in a block, a power of two up to 128. 128 is fastest on GPUs, then 64.
        seed: Of the random blocks. The same seed draws the same blocks on every machine.
        layers: Parts that differ between layers or heads, in place of the parts above: ``layers[n % len(layers)]``
            belongs to the n-th layer that runs the pattern, and holds the parts of equally many query heads each.
        dense_layers: ``layer_idx`` of the model layers that keep dense attention.

    Raises:
        ConfigError: If a field is malformed, or nothing is seen.

    Example:
        >>> local, strided = BlockParts(local_blocks=8), BlockParts(stride_blocks=8)
        >>> config = BlockSparseConfig(layers=((local, strided),))  # half of the heads each
        >>> BlockSparseConfig.from_dict(config.to_dict()) == config
        True
    """

    block_size: int = LARGEST_BLOCK
    seed: int = 0
    layers: Layers = ()
    dense_layers: tuple[int, ...] = ()
    text: ClassVar[str]  # of every instance: what patterns read; made once, since a compiled function cannot make it
    own: ClassVar[BlockParts]  # of every instance: the parts above

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "seed"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        object.__setattr__(self, "dense_layers", integers("dense_layers", self.dense_layers))
        object.__setattr__(self, "layers", _layers(self.layers))
        at_least("seed", (self.seed,), 0)
        at_least("dense_layers", self.dense_layers, 0)
        if not 1 <= self.block_size <= LARGEST_BLOCK or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size: expected a power of two up to {LARGEST_BLOCK}, got {self.block_size}")
        if self.layers and super().to_dict():
            raise ConfigError(
                f"layers: hold the parts of every layer; {', '.join(super().to_dict())} beside them would mean nothing"
            )
        object.__setattr__(self, "text", str({**self.to_dict(), "dense_layers": []}))
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockParts)}
        object.__setattr__(self, "own", BlockParts(**own))

    @property
    def depends_on_layer(self) -> bool:
        """Whether two layers may run different patterns."""
        return len(self.layers) > 1 or bool(self.dense_layers)

    def parts(self, layer: int = 0) -> tuple[BlockParts, ...]:
        """Parts of equally many query heads each, of a layer (counting only layers that run the pattern)."""
        return self.layers[layer % len(self.layers)] if self.layers else (self.own,)

    def dense_length(self, layer: int = 0) -> int:
        """Longest document, in tokens, that ``layer`` certainly attends to exactly as dense attention does."""
        return min(sys.maxsize, self.block_size * min(parts.dense_blocks for parts in self.parts(layer)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of :meth:`from_dict`."""
        return {
            "block_size": self.block_size,
            **({} if self.layers else super().to_dict() or {"local_blocks": self.local_blocks}),
            "seed": self.seed,
            "layers": [[parts.to_dict() for parts in groups] for groups in self.layers],
            "dense_layers": list(self.dense_layers),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BlockSparseConfig":
        """Build a pattern from the values of :meth:`to_dict`.

        Raises:
            ConfigError: If a key is unknown, or a value is malformed.
        """
        return cls(**known_fields(cls, values))

    def with_density(self, density: float, length: int) -> "BlockSparseConfig":
        """Return the same parts with the widest local window for which a document has at most a density.

        Args:
            density: Wanted fraction of the causal pairs of blocks.
            length: Tokens in the document.

        Raises:
            ConfigError: If the other parts and the own block alone are more than that, if layers or heads differ, or if
                there is no token.

        Example:
            >>> BlockSparseConfig(global_blocks=1, stride_blocks=16).with_density(0.25, 32768).local_blocks
            26
        """
        if self.layers:
            raise ConfigError(
                "density: layers or heads differ; choose the local_blocks of each of their parts, or let "
                "from_model_config(config, density=…) choose"
            )
        if not 0 < density <= 1:
            raise ConfigError(f"density: expected a fraction above 0 and up to 1, got {density}")
        at_least("length", (integer("length", length),), 1)
        blocks = math.ceil(length / self.block_size)

        def at(window: int) -> "BlockSparseConfig":
            return dataclasses.replace(self, local_blocks=window)

        if at(1).causal_density(blocks) > density:
            raise ConfigError(
                f"density: {density:.4g} of {length:,} tokens is less than the other parts and the own block together, "
                f"{at(1).causal_density(blocks):.4g}; ask for more, or for fewer global, strided, dilated or random "
                "blocks"
            )
        low, high = 1, blocks + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at(middle).causal_density(blocks) <= density else (low, middle)
        return at(low)

    @classmethod
    def from_model_config(
        cls, config: Any, max_length: int | None = None, density: float | None = None
    ) -> "BlockSparseConfig":
        """Choose parts for a Transformers configuration.

        By default a quarter of the heads see everything, and the others the first block and a window of 2048 tokens: of
        the patterns that were tuned side by side (docs/training.md) the one that kept a model's perplexity and what it
        finds far away. Where heads divide by four, attention takes 35 % of the operations of dense attention at 32k
        tokens, 28 % at 128k and 25 % in the end; other numbers of heads come near, or get the window alone. With a
        ``density`` all heads see the first block, every k-th one and a window.

        All else is the preset (:data:`hf_dilated.config.presets.BLOCK_SPARSE`).

        Args:
            config: A ``PreTrainedConfig``; of a multimodal model the text part is read.
            max_length: Longest sequence, in tokens, if it is longer than the model was made for.
            density: Fraction of the causal pairs of blocks at the longest sequence: what attention then takes of the
                operations of dense attention. It is met to within one block a row, or refused.

        Raises:
            ConfigError: If neither the configuration nor ``max_length`` gives a length, or the density cannot be met.

        Example:
            >>> from transformers import LlamaConfig
            >>> model = LlamaConfig(max_position_embeddings=131072)
            >>> BlockSparseConfig.from_model_config(model).to_dict()["layers"][0][:2]
            [{'stride_blocks': 1}, {'local_blocks': 17, 'global_blocks': 1}]
            >>> config = BlockSparseConfig.from_model_config(model, density=0.125)
            >>> config.global_blocks, config.stride_blocks, config.local_blocks
            (1, 16, 34)
        """
        longest = longest_input(config, max_length)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        options = BLOCK_SPARSE.for_layers(getattr(text_config, "num_hidden_layers", None) or 0)
        if density is not None:
            stride = max(1, round(2 / density)) if density > 0 else 0
            return cls(**{"global_blocks": 1, "stride_blocks": stride} | options).with_density(density, longest)
        window = cls(**{"local_blocks": WINDOW // LARGEST_BLOCK + 1, "global_blocks": 1} | options)
        dense, groups = BLOCK_SPARSE.for_heads(_common_heads(text_config))
        if not dense:
            return window
        by_head = (BlockParts(stride_blocks=1),) * dense + (window.own,) * (groups - dense)
        return cls(block_size=window.block_size, seed=window.seed, layers=(by_head,), dense_layers=window.dense_layers)

    @classmethod
    def bigbird(cls, *, block_size: int = 64, seed: int = 0) -> "BlockSparseConfig":
        """Return BigBird (arXiv:2007.14062, table 8): a window of 3 blocks, 2 global and 3 random ones, of 64 tokens.

        A causal window has two blocks, the own one and the one before it.
        """
        return cls(block_size=block_size, local_blocks=2, global_blocks=2, random_blocks=3, seed=seed)

    @classmethod
    def longformer(cls, window: int = 512, *, block_size: int = 64) -> "BlockSparseConfig":
        """Return Longformer (arXiv:2004.05150, section 3.1): a window of ``window`` tokens, half on each side.

        The paper's global attention of single tokens becomes that of the first block.
        """
        return cls(block_size=block_size, local_blocks=math.ceil(window / 2 / block_size) + 1, global_blocks=1)

    @classmethod
    def sliding_sinks(cls, window: int = 4096, *, block_size: int = LARGEST_BLOCK) -> "BlockSparseConfig":
        """Return StreamingLLM's attention (arXiv:2309.17453): a window and the first tokens, here the first block."""
        return cls(block_size=block_size, local_blocks=math.ceil(window / block_size) + 1, global_blocks=1)

    @classmethod
    def strided(cls, stride_blocks: int = 8, *, block_size: int = LARGEST_BLOCK) -> "BlockSparseConfig":
        """Return Sparse Transformers' fixed pattern (arXiv:1904.10509, section 4.3), its two heads merged into one.

        The paper's stretch of ``stride_blocks`` blocks is a window here, and the last block of each is seen by all.
        """
        return cls(block_size=block_size, local_blocks=stride_blocks, stride_blocks=stride_blocks)


def _common_heads(config: Any) -> int:
    """Return the largest number that divides the query heads of every layer; 1 where they are not known."""
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_attention_heads_per_layer")]
    counts = [n for x in heads if x is not None for n in (x if isinstance(x, Sequence) else [x])]
    return math.gcd(*counts) if counts and all(isinstance(n, int) for n in counts) else 1


def block_mask_of(function: Callable[[int, int], Any], blocks: int) -> tuple[str, ...]:
    """Write a callable on block indices as a mask that a configuration can keep.

    Args:
        function: ``function(i, j)`` is true if block i of the queries sees block j of the keys. It may not depend on
            the length of the document.
        blocks: Blocks of the longest document.

    Example:
        >>> BlockSparseConfig(block_mask=block_mask_of(lambda i, j: (i + j) % 2 == 0, 4)).block_mask
        ('5', 'a', '5', 'a')
    """
    return _mask_rows([[function(i, j) for j in range(blocks)] for i in range(blocks)])


def _layers(values: Any) -> Layers:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"layers: expected a sequence with the parts of every layer, got {values!r}")
    layers = tuple(
        tuple(_parts(group) for group in (layer if isinstance(layer, Sequence) else (layer,))) for layer in values
    )
    if not all(layers):
        raise ConfigError("layers: every layer needs the parts of at least one group of heads")
    return layers


def _parts(value: Any) -> BlockParts:
    if isinstance(value, BlockSparseConfig):
        raise ConfigError(
            "layers: expected BlockParts, got a BlockSparseConfig; blocks and seed are those of all layers"
        )
    return value if isinstance(value, BlockParts) else BlockParts(**known_fields(BlockParts, value))


def _mask_rows(value: Any) -> tuple[str, ...]:
    if callable(value):
        raise ConfigError("block_mask: a callable has no stored form; pass block_mask_of(function, blocks)")
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ConfigError(f"block_mask: expected a square of True and False, got {value!r}")
    if all(isinstance(row, str) for row in rows):
        try:
            bits = [int(row, 16) for row in rows]
        except ValueError:
            raise ConfigError("block_mask: expected hexadecimal numbers") from None
    else:
        if any(not isinstance(row, Sequence) or isinstance(row, str) or len(row) != len(rows) for row in rows):
            raise ConfigError(f"block_mask: expected a square of {len(rows)} by {len(rows)} blocks")
        bits = [sum(1 << j for j, shown in enumerate(row) if shown) for row in rows]
    if any(row < 0 or row >> len(rows) for row in bits):
        raise ConfigError(f"block_mask: a row shows a block beyond the {len(rows)} that the mask has")
    return tuple(f"{row:x}" for row in bits)
