"""How many keys `DilatedCache` and `BlockSparseCache` keep, beside a full cache: for shapes of models and lengths.

python scripts/cache_memory.py [--lengths 32768 131072 1048576] [--json rows.json]

The numbers follow from the pattern alone: for every length, what a layer keeps just before it, when segments and blocks
are full and every residue is still to come. `--check` compares them with the keys that a cache of random numbers really
holds (up to 32,768 tokens).
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.integration.cache import PatternLayer
from hf_dilated.integration.places import Places, Told
from hf_dilated.patterns import BlockSparsePattern, DilatedPattern

HEADS = ((32, 32), (32, 8), (14, 2))
DILATED: dict[str, dict[str, Any]] = {
    "head": {"offset": "head"},
    "kv_head": {"offset": "kv_head"},
    "kv_head, rotate": {"offset": "kv_head", "rotate": True},
}
BLOCK_SPARSE = "block_sparse"
PATTERNS = (*DILATED, BLOCK_SPARSE)
LENGTHS = (8192, 32768, 131072, 1 << 20)
HEAD_SIZE, BYTES = 128, 2
CHECKED = 32768  # longest input that is run
TOKENS_AT_ONCE = 1 << 16
LAYERS_COUNTED = 4  # of one period of the rotation


@dataclass(frozen=True)
class Row:
    """Keys that one layer keeps for a key-value head, on average over these and layers."""

    heads: int
    kv_heads: int
    pattern: str
    length: int
    kept: float

    @property
    def share(self) -> float:
        """Part of the full cache."""
        return self.kept / self.length

    @property
    def bytes_per_layer(self) -> int:
        """Keys and values of one sequence, in bfloat16 with heads of 128."""
        return int(2 * self.kept * self.kv_heads * HEAD_SIZE * BYTES)


def patterns_for(name: str, length: int, heads: int) -> list[DilatedPattern] | list[BlockSparsePattern]:
    """The default pattern of a model made for ``length`` tokens, with options; in as many layers as are counted."""
    model = SimpleNamespace(max_position_embeddings=length, num_attention_heads=heads)
    if name == BLOCK_SPARSE:
        return [BlockSparsePattern(config=BlockSparseConfig.from_model_config(model))]
    config = replace(DilatedConfig.from_model_config(model), **DILATED[name])
    layers = min(LAYERS_COUNTED, max(config.dilation_rates)) if config.rotate else 1
    return [DilatedPattern(config=config, layer=layer) for layer in range(layers)]


def tokens_before(pattern: DilatedPattern | BlockSparsePattern, length: int) -> int:
    """The number of tokens, just before ``length``, of which most are kept."""
    return length - (max(pattern.config.dilation_rates) if isinstance(pattern, DilatedPattern) else 1)


def kept_keys(pattern: DilatedPattern | BlockSparsePattern, length: int, heads: int, kv_heads: int) -> float:
    """Slots of a layer's cache just before ``length`` tokens: the most that a key-value head of each class keeps."""
    tokens = tokens_before(pattern, length)
    following, parts = torch.tensor([tokens]), torch.arange(tokens).split(TOKENS_AT_ONCE)
    total = 0
    for own, own_heads in pattern.classes(heads, kv_heads):
        own_keys = own_heads * kv_heads // heads
        kept = [own.kept(part.expand(1, own_keys, -1), following, own_heads, own_keys).sum(2) for part in parts]
        total += own_keys * int(torch.stack(kept).sum(0).max())
    return total / kv_heads


def held_keys(pattern: DilatedPattern | BlockSparsePattern, length: int, heads: int, kv_heads: int) -> float:
    """The same, counted in a cache that was filled with random numbers in three parts."""
    told = Told()
    layer = PatternLayer(Places.none(pattern, heads), told, drop_every=1)
    tokens = tokens_before(pattern, length)
    for start, stop in ((0, tokens // 2), (tokens // 2, tokens - 1), (tokens - 1, tokens)):
        told.hear(stop, None)
        layer.update(*torch.randn(2, 1, kv_heads, stop - start, 1))
    used = [store.places.closed().reduced()[0].used * store.places.heads for store in layer.stores]
    return sum(used) / heads


def measure(lengths: tuple[int, ...], check: bool) -> list[Row]:
    """Count for all shapes; the rotation is followed over the layers of one period of it."""
    rows = []
    for heads, kv_heads in HEADS:
        for name in PATTERNS:
            for length in lengths:
                counts = []
                for pattern in patterns_for(name, length, heads):
                    counts.append(kept_keys(pattern, length, heads, kv_heads))
                    if check and length <= CHECKED and counts[-1] != held_keys(pattern, length, heads, kv_heads):
                        raise SystemExit(f"a cache of {length} tokens holds other keys than {pattern.config} says")
                rows.append(Row(heads, kv_heads, name, length, sum(counts) / len(counts)))
    return rows


def table(rows: list[Row], lengths: tuple[int, ...]) -> str:
    """Markdown: keys kept for a key-value head, the share of a full cache, and the bytes of a layer."""
    lines = ["| heads | pattern | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("| --- | --- |" + " --: |" * len(lengths))
    for heads, kv_heads in HEADS:
        for name in PATTERNS:
            own = [row for row in rows if (row.heads, row.kv_heads, row.pattern) == (heads, kv_heads, name)]
            cells = [f"{r.kept:,.0f} ({r.share:.1%}, {r.bytes_per_layer / 2**20:,.0f} MiB)" for r in own]
            lines.append(f"| {heads}/{kv_heads} | `{name}` | " + " | ".join(cells) + " |")
    full = [", ".join(f"{2 * n * g * HEAD_SIZE * BYTES / 2**20:,.0f}" for g in (32, 8, 2)) for n in lengths]
    lines.append("| 32, 8, 2 | full cache | " + " | ".join(f"{cell} MiB" for cell in full) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--check", action="store_true", help="fill caches with random numbers and compare")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    lengths = tuple(options.lengths)
    rows = measure(lengths, options.check)
    print(table(rows, lengths))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
