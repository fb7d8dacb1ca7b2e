"""What a pattern says later tokens see, and how often keys count, against the oracle's definition."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from hf_dilated import BlockParts, BlockSparseConfig, DilatedConfig, reference
from hf_dilated.engine.kept import decode_kept, kept_bias
from hf_dilated.patterns import BlockSparsePattern, DilatedPattern
from tests.cases import Config, block_configs, configs

LENGTH = 40
Pattern = DilatedPattern | BlockSparsePattern


def pattern_of(config: Config, layer: int) -> Pattern:
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


def counts_of(pattern: Pattern, queries: list[int], positions: torch.Tensor, heads: int) -> torch.Tensor:
    """How often keys (1, G, M) count for queries: (queries, G, H / G, M)."""
    sight = pattern.sight(torch.tensor([queries]), LENGTH, heads, positions.shape[1])[0]
    return pattern.counts(sight, pattern.marks(positions), heads)


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
    earlier = torch.where(order <= position, order, -1)
    own, padding = counts_of(pattern, [position, -1], earlier, heads)
    expected = m[:, position].gather(1, order[0].repeat_interleave(repeats, 0))
    assert torch.equal(own.flatten(0, 1).long(), expected)
    assert not padding.any()
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


@settings(max_examples=40, deadline=None)
@given(config=block_configs(LENGTH), kv_heads=st.integers(1, 6), repeats=st.sampled_from([2, 4, 6]))
def test_classes_are_runs_of_whole_key_value_heads(config: BlockSparseConfig, kv_heads: int, repeats: int) -> None:
    layers = [[replace(parts, random_blocks=0) for parts in layer] for layer in config.layers]
    pattern, heads = BlockSparsePattern(config=replace(config, layers=layers), layer=1), kv_heads * repeats
    classes = pattern.classes(heads, kv_heads)
    assert not any(own % repeats for _, own in classes)
    shown = torch.cat([own.block_matrix(LENGTH, count) for own, count in classes])
    assert torch.equal(shown, pattern.block_matrix(LENGTH, heads))
    kinds = [set(own.config.parts()) for own, _ in classes]
    assert all(one != other for one, other in pairwise(kinds))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [(32, 32, [8, 24]), (32, 8, [8, 24]), (32, 2, [16, 16]), (14, 2, [7, 7]), (40, 8, [10, 30]), (8, 1, [8])],
)
def test_classes_of_the_default_pattern(heads: int, kv_heads: int, expected: list[int]) -> None:
    """Where heads of both kinds read one key-value head, it keeps everything; the others are one group of heads."""
    model = SimpleNamespace(max_position_embeddings=8192, num_attention_heads=heads)
    classes = BlockSparsePattern(config=BlockSparseConfig.from_model_config(model)).classes(heads, kv_heads)
    assert [count for _, count in classes] == expected
    positions = torch.arange(8000)[None, None]
    shares = [own.kept(positions, torch.tensor([8000]), own_heads, 1).double().mean() for own, own_heads in classes]
    assert shares[0] == 1
    for (own, _), share in zip(classes[1:], shares[1:], strict=True):
        assert share < 0.3
        assert len(own.config.parts()) == 1


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("overlap", ["once", "count"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision(dtype: torch.dtype, overlap: str, with_sinks: bool) -> None:
    config = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), overlap=overlap)
    query, key, value = (torch.randn(2, n, 40, 16).to(dtype) for n in (4, 2, 2))
    sinks = torch.randn(4).to(dtype) if with_sinks else None
    count = counts_of(DilatedPattern(config=config), [39], torch.arange(40).expand(1, 2, -1), 4)
    bias = kept_bias(pad(count, (0, 8), value=7), 40, 2, dtype)
    actual = decode_kept(query[:, :, -1:], *(pad(x, (0, 0, 0, 8)) for x in (key, value)), bias, 0.25, sinks)
    right, lse = reference.dilated_attention(query[:, :, -1:], key, value, config, scale=0.25, return_lse=True)
    if sinks is not None:
        right = right * torch.sigmoid(lse - sinks.double()[:, None]).unsqueeze(-1)
    assert actual.dtype == dtype
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(actual.double(), right, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_who_sees_no_key_gives_zero(dtype: torch.dtype) -> None:
    """And room weighs nothing for others, however small their scores."""
    query, key, value = (torch.full((1, 1, n, 8), x, dtype=dtype) for n, x in ((1, -30.0), (4, 30.0), (4, 3.0)))
    count = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool).view(1, 1, 2, 4)
    key, value = (pad(x, (0, 0, 0, 12)) for x in (key, value))
    bias = kept_bias(pad(count, (0, 12)), 4, 1, dtype)
    output = decode_kept(query.expand(1, 2, 1, 8), key, value, bias, 1.0)
    assert output.flatten(1).tolist() == [[3.0] * 8 + [0.0] * 8]


def test_tables_of_a_dilated_pattern_reach_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = DilatedPattern(config=DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2), sink_tokens=1))
    positions, query = torch.arange(20).expand(1, 2, -1), torch.tensor([[19]])
    assert pattern.kept(positions, query[0], 4, 2).any()
    assert counts_of(pattern, [19], positions, 4).any()
    for name in ("tensor", "as_tensor", "zeros"):
        monkeypatch.delattr(torch, name)
    pattern.kept(positions, query[0], 4, 2)
    pattern.sight(query, 20, 4, 2)
    pattern.marks(positions)
