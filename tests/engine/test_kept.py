"""What a pattern says later tokens see, and how often keys count, against the oracle's definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dilated import BlockParts, BlockSparseConfig, DilatedConfig, reference
from hf_dilated.engine import kept
from hf_dilated.engine.kept import decode_kept
from hf_dilated.patterns import BlockSparsePattern, DilatedPattern
from tests.cases import Config, block_configs, configs

LENGTH = 40


def pattern_of(config: Config, layer: int) -> DilatedPattern | BlockSparsePattern:
    return (DilatedPattern if isinstance(config, DilatedConfig) else BlockSparsePattern)(config=config, layer=layer)


def multiplicity(config: Config, heads: int, kv_heads: int, layer: int) -> torch.Tensor:
    """(H, N, M) of one document, from the oracle."""
    rows = torch.arange(LENGTH)
    if isinstance(config, DilatedConfig):
        return reference.multiplicity(rows, LENGTH, config, heads=heads, kv_heads=kv_heads, is_causal=True, layer=layer)
    value = torch.eye(LENGTH, dtype=torch.float64).expand(1, kv_heads, LENGTH, LENGTH)
    nothing = torch.zeros(1, heads, LENGTH, 1)
    weights = reference.block_sparse_attention(nothing, nothing[:, :kv_heads], value, config, layer=layer)
    return (weights[0] > 0).long()


def forgets(config: Config, layer: int) -> bool:
    return isinstance(config, DilatedConfig) or not any(parts.random_blocks for parts in config.parts(layer))


@settings(max_examples=40, deadline=None)
@given(
    config=st.one_of(configs(), block_configs(LENGTH)),
    layer=st.integers(0, 3),
    kv_heads=st.sampled_from([1, 2, 3]),
    repeats=st.sampled_from([2, 4]),
    position=st.integers(0, LENGTH - 1),
)
def test_against_the_oracle(config: Config, layer: int, kv_heads: int, repeats: int, position: int) -> None:
    heads = kv_heads * repeats
    pattern = pattern_of(config, layer)
    m = multiplicity(config, heads, kv_heads, layer)
    order = torch.stack([torch.randperm(LENGTH) for _ in range(kv_heads)])[None]
    counts = pattern.counts(torch.tensor([position]), order, LENGTH, heads, kv_heads)[0]
    expected = m[:, position].gather(1, order[0].repeat_interleave(repeats, 0))
    assert torch.equal(counts, expected.float())
    padded = pattern.counts(torch.tensor([-1]), torch.where(order < 3, -1, order), LENGTH, heads, kv_heads)
    assert not padded.any()
    if not forgets(config, layer):
        with pytest.raises(ValueError, match="random_blocks: a later token may choose any block"):
            pattern.kept(order, torch.tensor([position]), heads, kv_heads)
        return
    earlier = torch.where(order < position, order, -1)
    kept = pattern.kept(earlier, torch.tensor([position]), heads, kv_heads)[0]
    later = m[:, position:].any(1).unflatten(0, (kv_heads, repeats)).any(1)  # (G, M)
    needed = later.gather(1, order[0]) & (earlier[0] >= 0)
    assert not (needed & ~kept).any(), "a key is gone that a later token sees"


def test_only_what_is_needed_is_kept() -> None:
    config = DilatedConfig(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4), sink_tokens=1)
    pattern = DilatedPattern(config=config)
    m = multiplicity(config, 4, 4, 0)
    for following in range(1, 33):
        kept = pattern.kept(torch.arange(following).expand(1, 4, -1), torch.tensor([following]), 4, 4)[0]
        assert torch.equal(kept, m[:, following:, :following].any(1)), following


def test_blocks_are_forgotten() -> None:
    parts = BlockParts(local_blocks=2, global_blocks=1, dilated_blocks=3)
    pattern = BlockSparsePattern(config=BlockSparseConfig(block_size=2, layers=((parts,),)))
    kept = pattern.kept(torch.arange(20)[None, None], torch.tensor([20]), 2, 1)[0, 0]
    assert (kept.nonzero()[:, 0] // 2).unique().tolist() == [0, 6, 7, 8, 9]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("overlap", ["once", "count"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", ["_one_kernel", "_products"])
def test_half_precision(
    way: str, dtype: torch.dtype, overlap: str, with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, and in the way of a GPU."""
    monkeypatch.setattr(kept, "_one_kernel", getattr(kept, way))
    config = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), overlap=overlap)
    query, key, value = (torch.randn(2, n, 40, 16).to(dtype) for n in (4, 2, 2))
    sinks = torch.randn(4).to(dtype) if with_sinks else None
    positions = torch.arange(40).expand(1, 2, -1)
    actual = decode_kept(query[:, :, -1:], key, value, positions, 40, DilatedPattern(config=config), 0.25, sinks)
    right, lse = reference.dilated_attention(query[:, :, -1:], key, value, config, scale=0.25, return_lse=True)
    if sinks is not None:
        right = right * torch.sigmoid(lse - sinks.double()[:, None]).unsqueeze(-1)
    assert actual.dtype == dtype
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(actual.double(), right, rtol=0, atol=bound)


def test_tables_of_a_dilated_pattern_reach_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = DilatedPattern(config=DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2), sink_tokens=1))
    positions = torch.arange(20).expand(1, 2, -1)
    pattern.counts(torch.tensor([19]), positions, 20, 4, 2)
    earlier = torch.tensor([18])
    for name in ("tensor", "arange", "as_tensor"):
        monkeypatch.delattr(torch, name)
    pattern.counts(earlier, positions, 20, 4, 2)
