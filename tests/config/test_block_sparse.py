import json
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, PreTrainedConfig

from hf_dilated import BlockParts, BlockSparseConfig, ConfigError, StoredConfig, block_mask_of, reference
from hf_dilated.patterns import BlockSparsePattern
from tests.cases import block_configs


@given(config=block_configs(24, chosen=2))
@settings(max_examples=50, deadline=None)
def test_the_stored_form_is_json(config):
    stored = StoredConfig(attn_implementation="block_sparse", block_sparse=config)
    assert StoredConfig.from_dict(json.loads(json.dumps(stored.to_dict()))) == stored


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_blocks": -1}, "local_blocks: expected at least 0, got -1"),
        ({"global_blocks": 1.5}, "global_blocks: expected a whole number"),
        ({"local_blocks": 0}, "local_blocks: no part shows any block"),
        ({"local_blocks": 0, "topk_blocks": 1}, "local_blocks: topk_blocks chooses among the blocks before"),
        ({"block_size": 96}, "block_size: expected a power of two up to 128, got 96"),
        ({"block_size": 256}, "block_size: expected a power of two"),
        ({"layers": [[{"local": 1}]]}, "BlockParts: unknown 'local'"),
        ({"layers": [[]]}, "layers: every layer needs the parts"),
        ({"layers": [[{}]], "stride_blocks": 2}, "layers: hold the parts of every layer; stride_blocks beside them"),
        ({"block_mask": lambda i, j: True}, "block_mask: a callable has no stored form; pass block_mask_of"),
        ({"block_mask": [[True, False]]}, "block_mask: expected a square of 1 by 1 blocks"),
        ({"block_mask": ["4"]}, "block_mask: a row shows a block beyond the 1"),
        ({"block_mask": ["x"]}, "block_mask: expected hexadecimal numbers"),
        ({"window": 3}, "BlockSparseConfig: unknown 'window'"),
    ],
)
def test_what_cannot_be_run_is_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        BlockSparseConfig.from_dict(fields)
    assert message in str(error.value)


def test_masks_of_every_form_are_one():
    rows = [[True, False, False], [True, True, False], [False, True, True]]
    expected = ("1", "3", "6")
    assert BlockSparseConfig(block_mask=rows).block_mask == expected
    assert BlockSparseConfig(block_mask=torch.tensor(rows)).block_mask == expected
    assert BlockSparseConfig(block_mask=expected).block_mask == expected
    assert block_mask_of(lambda i, j: rows[i][j], 3) == expected


WITHOUT_THE_OWN_BLOCK = BlockParts(local_blocks=0, random_blocks=2, block_mask=block_mask_of(lambda i, j: i > j, 4))


@example(config=BlockSparseConfig(layers=((WITHOUT_THE_OWN_BLOCK,),)), blocks=4, is_causal=True)
@given(config=block_configs(32), blocks=st.integers(1, 4), is_causal=st.booleans())
@settings(max_examples=60, deadline=None)
def test_density_counts_what_the_oracle_sees(config, blocks, is_causal):
    """The closed form of the configuration and the lists of the pattern, against the definition."""
    groups = config.parts(1)
    turn = 1 % len(config.layers)
    pairs = blocks * (blocks + 1) / 2 if is_causal else blocks**2
    seen = [
        reference.visible_blocks(parts, blocks, is_causal, (config.seed, turn, n)) for n, parts in enumerate(groups)
    ]
    right = [sum(map(len, rows)) / pairs for rows in seen]
    pattern = BlockSparsePattern(config=config, layer=1)
    assert pattern.density(blocks * config.block_size, is_causal) == pytest.approx(sum(right) / len(right))
    if is_causal:
        assert [parts.causal_density(blocks) for parts in groups] == pytest.approx(right)


@pytest.mark.parametrize("length", [32768, 131072, 1 << 20])
@pytest.mark.parametrize("density", [0.25, 0.1, 0.03])
def test_a_requested_density_is_met(length, density):
    blocks = length // 128
    config = BlockSparseConfig.from_model_config(LlamaConfig(max_position_embeddings=length), density=density)
    found = BlockSparsePattern(config=config).density(length)
    assert density - 2 / (blocks + 1) <= found <= density


def test_a_density_that_cannot_be_met_is_refused():
    with pytest.raises(ConfigError, match="density: 0.01 of 4,096 tokens is less than the other parts and the own"):
        BlockSparseConfig(global_blocks=1).with_density(0.01, 4096)
    with pytest.raises(ConfigError, match="density: expected a fraction"):
        BlockSparseConfig().with_density(0, 4096)
    with pytest.raises(ConfigError, match="length: expected at least 1, got 0"):
        BlockSparseConfig().with_density(0.5, 0)
    with pytest.raises(ConfigError, match="density: layers or heads differ"):
        BlockSparseConfig(layers=((BlockParts(),),)).with_density(0.5, 4096)


@pytest.mark.parametrize(("length", "operations"), [(32768, 0.35), (131072, 0.28), (1 << 20, 0.25)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 8), (4, 1)])
def test_a_quarter_of_the_heads_is_dense_by_default(length, operations, heads, kv_heads):
    model = LlamaConfig(max_position_embeddings=length, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = BlockSparseConfig.from_model_config(model)
    assert BlockSparsePattern(config=config).density(length) == pytest.approx(operations, abs=0.005)
    seen = BlockSparsePattern(config=config).block_matrix(8192, heads)
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    assert [torch.equal(head, causal) for head in seen] == [head < heads // 4 for head in range(heads)]


def test_groups_divide_the_heads_of_every_layer():
    def groups(**sizes):
        config = BlockSparseConfig.from_model_config(PreTrainedConfig(**sizes), max_length=8192)
        return len(config.parts())

    assert groups() == groups(num_attention_heads=71) == 1
    assert (
        groups(num_attention_heads=[8, 12]) == groups(num_attention_heads=8, num_attention_heads_per_layer=[8, 4]) == 4
    )
    assert groups(num_attention_heads=8, num_attention_heads_per_layer=[8, 6]) == 1


def test_every_block_seen_is_dense_at_any_length():
    everything, near = BlockParts(stride_blocks=1), BlockParts(local_blocks=2, global_blocks=1)
    assert BlockSparseConfig(layers=((everything,),)).dense_length() == sys.maxsize
    assert BlockSparseConfig(layers=((everything, near),)).dense_length() == 3 * 128
    assert BlockSparseConfig(local_blocks=0, stride_blocks=1).dense_length() == sys.maxsize
    assert BlockSparseConfig(local_blocks=0, stride_blocks=2).dense_length() == 0


def test_short_models_stay_dense():
    config = BlockSparseConfig.from_model_config(LlamaConfig(max_position_embeddings=2048))
    assert config.dense_length() >= 2048
    with pytest.raises(ConfigError, match="max_length: PreTrainedConfig has no max_position_embeddings"):
        BlockSparseConfig.from_model_config(PreTrainedConfig())


@given(config=block_configs(64), shorter=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_the_pattern_of_a_token_does_not_depend_on_the_length(config, shorter):
    size = config.block_size
    pattern = BlockSparsePattern(config=config)
    short, long = (pattern.block_matrix(n * size, 2) for n in (shorter, 8))
    assert torch.equal(long[:, :shorter, :shorter], short)


def test_random_blocks_are_the_same_on_every_machine():
    seen = BlockSparsePattern(config=BlockSparseConfig(block_size=1, random_blocks=2, seed=7)).block_matrix(9, 1)[0]
    drawn = [row.nonzero()[:, 0].tolist() for row in seen]
    later = [[1, 2, 3], [1, 3, 4], [0, 2, 5], [1, 3, 6], [1, 5, 7], [1, 4, 8]]
    assert drawn == [[0], [0, 1], [0, 1, 2], *later]
    others = BlockSparsePattern(config=BlockSparseConfig(block_size=1, random_blocks=2, seed=8)).block_matrix(9, 1)[0]
    assert not torch.equal(seen, others)


@pytest.mark.parametrize("name", ["bigbird", "longformer", "sliding_sinks", "strided"])
def test_presets(name):
    config = getattr(BlockSparseConfig, name)()
    assert 0 < BlockSparsePattern(config=config).density(65536) < 0.2
