"""Generated attention problems: patterns, shapes, padding, packing, static caches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hf_dilated
from hf_dilated import BlockParts, BlockSparseConfig, DilatedConfig, reference

Config = DilatedConfig | BlockSparseConfig
Attention = Callable[..., Any]
ATTENTION: dict[type, tuple[Attention, Attention]] = {
    DilatedConfig: (hf_dilated.dilated_attention, reference.dilated_attention),
    BlockSparseConfig: (hf_dilated.block_sparse_attention, reference.block_sparse_attention),
}


@dataclass
class Case:
    config: Config
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> Any:
        """What the engine says."""
        return ATTENTION[type(self.config)][0](self.query, self.key, self.value, self.config, **self.options, **more)

    def right(self, **more: Any) -> Any:
        """What the oracle says."""
        return ATTENTION[type(self.config)][1](self.query, self.key, self.value, self.config, **self.options, **more)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same problem in another dtype, with inputs that take gradients."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.query, self.key, self.value))
        return Case(self.config, q, k, v, self.options)


@st.composite
def configs(draw: st.DrawFn) -> DilatedConfig:
    once = draw(st.booleans())
    branches = draw(st.integers(1, 4))
    if once:
        segments, rates = [draw(st.sampled_from([1, 2, 3, 4, 6, 8]))], [1]
        for _ in range(branches - 1):
            segments.append(segments[-1] * draw(st.integers(1, 4)))
            rates.append(
                rates[-1] * draw(st.sampled_from([k for k in (1, 2, 3, 4) if segments[-1] % (rates[-1] * k) == 0]))
            )
    else:
        segments = draw(st.lists(st.integers(1, 16), min_size=branches, max_size=branches))
        rates = draw(st.lists(st.integers(1, 5), min_size=branches, max_size=branches))
    return DilatedConfig(
        segment_lengths=tuple(segments),
        dilation_rates=tuple(rates),
        overlap="once" if once else "count",
        offset=draw(st.sampled_from(["head", "kv_head"] if once else ["head", "kv_head", "grouped"])),
        sink_tokens=draw(st.sampled_from([0, 0, 1, 3])),
        phase=draw(st.sampled_from(["none", "alternate"])),
        rotate=draw(st.booleans()),
    )


def _count(most: int) -> st.SearchStrategy[int]:
    """0 half of the time."""
    return st.one_of(st.just(0), st.integers(1, most))


@st.composite
def block_parts(draw: st.DrawFn, mask_blocks: int = 0, chosen: int = 0) -> BlockParts:
    """Any parts; a mask, if there is one, has ``mask_blocks`` rows, and tokens choose up to ``chosen`` blocks."""
    mask = None
    if mask_blocks and draw(st.booleans()):
        generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 99)))
        mask = torch.rand(mask_blocks, mask_blocks, generator=generator, device="cpu") < 0.3
    return BlockParts(
        local_blocks=draw(st.integers(0 if mask is not None and not chosen else 1, 3)),
        global_blocks=draw(_count(2)),
        stride_blocks=draw(_count(5)),
        dilated_blocks=draw(_count(4)),
        random_blocks=draw(_count(3)),
        topk_blocks=draw(st.integers(0, chosen)),
        block_mask=mask,
    )


@st.composite
def block_configs(draw: st.DrawFn, longest: int = 40, chosen: int = 0) -> BlockSparseConfig:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    groups = draw(st.integers(1, 2))
    parts = block_parts(mask_blocks=-(-longest // size), chosen=chosen)
    layers = draw(st.lists(st.lists(parts, min_size=groups, max_size=groups), min_size=1, max_size=2))
    return BlockSparseConfig(block_size=size, seed=draw(st.integers(0, 3)), layers=layers)


def _tensor(draw: st.DrawFn, rows: int, heads: int, tokens: int, size: int) -> Tensor:
    """Random numbers in one of the two memory layouts that models use, or in one that nobody should."""
    match draw(st.sampled_from(["by head", "by token", "by token", "transposed"])):
        case "by head":
            return torch.randn(rows, heads, tokens, size, dtype=torch.float64)
        case "by token":
            return torch.randn(rows, tokens, heads, size, dtype=torch.float64).transpose(1, 2)
        case _:
            return torch.randn(rows, heads, size, tokens, dtype=torch.float64).transpose(2, 3)


def _padding(draw: st.DrawFn, rows: int, keys: int) -> Tensor:
    kind = draw(st.sampled_from(["left", "right", "scattered"]))
    if kind == "scattered":
        return torch.rand(rows, keys) < 0.7
    cut = torch.tensor([[draw(st.integers(0, keys))] for _ in range(rows)])
    return torch.arange(keys) >= cut if kind == "left" else torch.arange(keys) < cut


def _packing(draw: st.DrawFn, rows: int, keys: int) -> Tensor:
    position_ids = torch.arange(keys).repeat(rows, 1)
    for row in range(rows):
        for start in draw(st.lists(st.integers(0, keys - 1), max_size=4)):
            position_ids[row, start:] = torch.arange(keys - start)
    return position_ids


@st.composite
def cases(
    draw: st.DrawFn, longest: int = 40, head_size: int = 4, config: st.SearchStrategy[Config] | None = None
) -> Case:
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    chosen = draw(configs() if config is None else config)
    kv_heads, repeats = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 7]))
    if isinstance(chosen, BlockSparseConfig):
        repeats *= 2  # groups of heads are equally large
    rows, keys = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    options: dict[str, Any] = {"is_causal": draw(st.booleans()), "layer": draw(st.integers(0, 5))}
    layout = draw(st.sampled_from(["plain", "padded", "packed", "padded and packed", "static cache"]))
    if "padded" in layout:
        options["attention_mask"] = _padding(draw, rows, keys)
    if "packed" in layout:
        position_ids = _packing(draw, rows, keys)
        options["position_ids"] = draw(st.sampled_from([position_ids, position_ids[:, keys - queries :]]))
    slots = keys
    if layout == "static cache":
        slots += draw(st.integers(1, 5))
        slot = torch.arange(slots).expand(rows, -1)
        written = slot < torch.tensor([[draw(st.integers(queries, slots))] for _ in range(rows)])
        options["key_positions"] = torch.where(written, slot, -2)
    query = _tensor(draw, rows, kv_heads * repeats, queries, head_size)
    key, value = (_tensor(draw, rows, kv_heads, slots, head_size) for _ in range(2))
    if layout == "static cache":
        for x in (key, value):
            x.masked_fill_(~written[:, None, :, None], 1e6)  # nobody may look at slots that are not written
    return Case(chosen, query, key, value, options)
