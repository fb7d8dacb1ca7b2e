import json
import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlavaConfig, XLNetConfig

from hf_dilated import BlockParts, BlockSparseConfig, ConfigError, DilatedConfig, StoredConfig
from hf_dilated.config.presets import Preset
from hf_dilated.config.stored import STORED_VERSION


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_lengths": ()}, "segment_lengths: at least one branch"),
        ({"segment_lengths": (8, -16)}, "segment_lengths: expected at least 1, got -16"),
        ({"segment_lengths": (8, float("nan"))}, "segment_lengths: expected a whole number, got nan"),
        ({"segment_lengths": (8, float("inf"))}, "segment_lengths: expected a whole number, got inf"),
        ({"segment_lengths": (8, True)}, "segment_lengths: expected a whole number, got True"),
        ({"segment_lengths": "8,16"}, "segment_lengths: expected a sequence"),
        ({"segment_lengths": 8}, "segment_lengths: expected a sequence"),
        ({"dilation_rates": (1,)}, "dilation_rates: 1 rates for 2 segment_lengths"),
        ({"dilation_rates": (0, 2)}, "dilation_rates: expected at least 1, got 0"),
        ({"dilation_rates": (2, 4)}, 'dilation_rates: overlap="once" needs a first rate of 1'),
        ({"segment_lengths": (8, 20)}, "20 is not a multiple of 8"),
        ({"segment_lengths": (6, 12, 24), "dilation_rates": (1, 2, 3)}, "3 is not a multiple of 2"),
        ({"segment_lengths": (3, 9), "dilation_rates": (1, 2)}, "2 does not divide 9"),
        ({"offset": "grouped"}, 'offset: overlap="once" needs offset "head" or "kv_head"'),
        ({"offset": "tail"}, "offset: expected one of 'head', 'kv_head', 'grouped', got 'tail'"),
        ({"overlap": "twice"}, "overlap: expected one of"),
        ({"phase": 3}, "phase: expected one of"),
        ({"rotate": 1}, "rotate: expected True or False"),
        ({"sink_tokens": -1}, "sink_tokens: expected at least 0"),
        ({"sink_tokens": 1.5}, "sink_tokens: expected a whole number, got 1.5"),
        ({"dense_layers": (-1,)}, "dense_layers: expected at least 0"),
    ],
)
def test_malformed_patterns_are_refused_by_field(changes, message):
    with pytest.raises(ConfigError) as error:
        DilatedConfig(**{"segment_lengths": (8, 16), "dilation_rates": (1, 2), **changes})
    assert message in str(error.value)


def test_count_allows_branches_that_are_not_nested():
    config = DilatedConfig.longnet((7, 20), (3, 2))
    assert (config.overlap, config.sink_tokens, config.phase) == ("count", 0, "none")


def test_round_trip_through_json():
    config = DilatedConfig(segment_lengths=[8, 16], dilation_rates=[1, 2], dense_layers=[0], phase="alternate")
    assert DilatedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(DilatedConfig.from_dict(config.to_dict()))


def test_unknown_and_missing_keys_are_refused():
    with pytest.raises(ConfigError, match="unknown 'segments'.*pip install -U"):
        DilatedConfig.from_dict({"segments": [8], "segment_lengths": [8], "dilation_rates": [1]})
    with pytest.raises(ConfigError, match="missing dilation_rates"):
        DilatedConfig.from_dict({"segment_lengths": [8]})
    with pytest.raises(ConfigError, match="expected a dictionary, got list"):
        DilatedConfig.from_dict([8])


def test_stored_form():
    pattern = DilatedConfig(segment_lengths=(8,), dilation_rates=(1,))
    stored = StoredConfig(attn_implementation="dilated", dilated=pattern)
    assert stored.to_dict()["version"] == STORED_VERSION
    assert StoredConfig.from_dict(json.loads(json.dumps(stored.to_dict()))) == stored
    with pytest.raises(ConfigError, match=f"version {STORED_VERSION + 1}.*upgrade"):
        StoredConfig.from_dict({**stored.to_dict(), "version": STORED_VERSION + 1})
    with pytest.raises(ConfigError, match="unknown 'rings'"):
        StoredConfig.from_dict({**stored.to_dict(), "rings": {}})
    with pytest.raises(ConfigError, match="attn_implementation: expected a name"):
        StoredConfig.from_dict({"attn_implementation": 3})


@pytest.mark.parametrize(
    ("positions", "max_length", "heads", "segments", "rates"),
    [
        (8192, None, 32, (2048, 4096, 8192), (1, 2, 4)),
        (2048, None, 8, (2048,), (1,)),
        (1000, 3000, 8, (1000, 2000, 4000), (1, 2, 4)),
        (512, 512, 8, (512,), (1,)),
        (131072, None, 32, tuple(2048 << i for i in range(7)), (1, 2, 4, 8, 16, 32, 32)),
    ],
)
def test_from_model_config(positions, max_length, heads, segments, rates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = DilatedConfig.from_model_config(
            LlamaConfig(max_position_embeddings=positions, num_attention_heads=heads), max_length
        )
    assert (config.segment_lengths, config.dilation_rates, config.overlap) == (segments, rates, "once")


def test_few_heads_are_warned_of():
    with pytest.warns(UserWarning, match="2 attention heads allow dilation rates up to 2"):
        config = DilatedConfig.from_model_config(LlamaConfig(max_position_embeddings=8192, num_attention_heads=2))
    assert config.dilation_rates == (1, 2, 2)


def test_multimodal_models_are_read_at_their_text_part():
    config = LlavaConfig(text_config=LlamaConfig(max_position_embeddings=4096, num_attention_heads=4).to_dict())
    assert DilatedConfig.from_model_config(config).segment_lengths == (2048, 4096)


def test_a_missing_length_is_asked_for():
    class NoLength:
        num_attention_heads = 4

    with pytest.raises(ConfigError, match="max_length: NoLength has no max_position_embeddings"):
        DilatedConfig.from_model_config(NoLength())
    assert DilatedConfig.from_model_config(NoLength(), max_length=100).segment_lengths == (100,)
    with pytest.raises(ConfigError, match="max_length: expected at least 1, got 0"):
        DilatedConfig.from_model_config(NoLength(), max_length=0)


def test_a_length_of_minus_one_is_none():
    with pytest.raises(ConfigError, match="max_length: XLNetConfig has no max_position_embeddings"):
        DilatedConfig.from_model_config(XLNetConfig())
    assert DilatedConfig.from_model_config(XLNetConfig(), max_length=4096).segment_lengths == (2048, 4096)


def test_dense_length():
    config = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=3, phase="alternate")
    assert (config.dense_length(0), config.dense_length(1)) == (11, 7)
    assert DilatedConfig.longnet((8, 16), (1, 2)).dense_length() == 0
    assert DilatedConfig.longnet((8,), (1,)).dense_length() == 8
    assert DilatedConfig.longnet((8,), (2,)).dense_length() == 0


DILATED_OPTIONS = {"overlap": "count", "offset": "kv_head", "sink_tokens": 4, "phase": "alternate", "rotate": True}


@pytest.mark.parametrize(("module", "name", "config_class", "options"), [
    ("dilated", "DILATED", DilatedConfig, DILATED_OPTIONS),
    ("block_sparse", "BLOCK_SPARSE", BlockSparseConfig, {"stride_blocks": 32, "topk_blocks": 8}),
])  # fmt: skip
def test_a_preset_is_what_a_model_gets(monkeypatch, module, name, config_class, options):
    model = LlamaConfig(max_position_embeddings=8192, num_hidden_layers=10)
    monkeypatch.setattr(f"hf_dilated.config.{module}.{name}", Preset())
    before = config_class.from_model_config(model)
    assert before.dense_layers == ()
    monkeypatch.setattr(f"hf_dilated.config.{module}.{name}", Preset(dense_every=5, options=options))
    assert config_class.from_model_config(model) == replace(before, dense_layers=(4, 9), **options)


def test_dense_heads_of_a_preset(monkeypatch):
    model = LlamaConfig(max_position_embeddings=8192, num_hidden_layers=10, hidden_size=96, num_attention_heads=6)
    preset = Preset(dense_every=5, dense_heads=1 / 3, options={"topk_blocks": 2, "block_size": 64, "seed": 7})
    monkeypatch.setattr("hf_dilated.config.block_sparse.BLOCK_SPARSE", preset)
    config = BlockSparseConfig.from_model_config(model)
    near = BlockParts(local_blocks=17, global_blocks=1, topk_blocks=2)
    by_head = BlockParts(stride_blocks=1), near, near
    assert config == BlockSparseConfig(block_size=64, seed=7, layers=(by_head,), dense_layers=(4, 9))


@given(heads=st.integers(1, 256), share=st.floats(0.01, 1))
def test_dense_heads_come_near_their_share_or_there_are_none(heads, share):
    dense, groups = Preset(dense_heads=share).for_heads(heads)
    assert heads % groups == 0
    assert groups <= 16
    assert dense == 0 or abs(dense / groups - share) <= share / 3 + 1e-9
    assert Preset().for_heads(heads) == (0, 1)
