"""The report on every layer, against what the layers are known to be."""

from collections import Counter

import pytest
import torch
import transformers as tf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_dilated import ConfigError, DilatedConfig, reference
from hf_dilated.config.presets import Preset
from hf_dilated.integration import layers
from hf_dilated.integration.attention import attention_function
from hf_dilated.integration.report import ModelReport, ReportError, keys_per_query, report
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patterns import DensePattern, DilatedPattern
from tests.tiny_models import GROUPED, SIZES, tiny_config


def kinds(result: ModelReport) -> list[str]:
    return [layer.kind for layer in result.layers]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["pattern", "pattern"]),
        ("gpt2", ["pattern", "pattern"]),
        ("qwen2_windowed", ["pattern", "pattern", "windowed", "windowed"]),
        ("gemma3", ["windowed", "pattern", "windowed", "pattern"]),
        ("gpt_oss", ["windowed", "pattern", "windowed", "pattern"]),
        ("mixtral", ["pattern", "pattern"]),
        ("modernbert", ["pattern", "windowed", "pattern", "windowed"]),
        ("qwen3_next", ["own attention", "pattern", "own attention", "pattern"]),
        ("llava", ["pattern", "pattern"]),
        ("gemma2", ["refused", "refused"]),
        ("mistral_windowed", ["refused", "refused"]),
    ],
)
def test_every_layer_is_what_it_is(family: str, expected: list[str]) -> None:
    result = report(tiny_config(family))
    assert kinds(result) == expected
    assert result.runs == ("refused" not in expected)
    assert result.is_causal == (family != "modernbert")
    assert result.heads == 4
    assert not result.is_stored
    assert bool(result.unseen) == (family == "llava")


def test_reasons() -> None:
    assert "softcap=50.0" in report(tiny_config("gemma2")).layers[0].why
    assert report(tiny_config("gemma3")).layers[0].why == "the model's own window of 6 tokens"
    assert report(tiny_config("qwen3_next")).layers[0].why == "Qwen3NextGatedDeltaNet of the model"
    assert report(tiny_config("llava")).unseen == ("vision_tower (CLIPVisionModel)",)


def test_a_stored_pattern_with_layers_that_differ() -> None:
    config = tf.LlamaConfig(**GROUPED | {"num_hidden_layers": 4})
    config.hf_dilated = DilatedConfig(
        segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=2, phase="alternate", dense_layers=(1,)
    )
    result = report(config)
    assert kinds(result) == ["pattern", "dense", "pattern", "pattern"]
    assert [layer.ordinal for layer in result.layers] == [0, 0, 1, 2]
    assert result.layers[2].why == "grid shifted by 4 tokens"
    assert result.is_stored
    assert result.dense_length == 2 + 8 - 4


@pytest.mark.parametrize("backend", ["dilated", "block_sparse"])
def test_a_preset_means_the_same_to_reports_and_to_running_layers(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    preset = Preset(dense_every=2, dense_heads=0.5)
    monkeypatch.setattr(f"hf_dilated.config.{backend}.{backend.upper()}", preset)
    layers._pattern_from_values.cache_clear()
    config = tf.LlamaConfig(**GROUPED | {"num_hidden_layers": 4})
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation=backend)
    found = [layers.module_pattern(layer.self_attn, None, backend) for layer in model.model.layers]
    layers._pattern_from_values.cache_clear()
    assert found == [layers.layer_pattern(model.config, n, None, backend) for n in range(4)]
    assert [isinstance(pattern, DensePattern) for pattern in found] == [False, True, False, True]


def test_an_image_model_needs_a_length() -> None:
    config = tiny_config("vit")
    with pytest.raises(ConfigError, match="max_length"):
        report(config)
    config.hf_dilated = DilatedConfig(segment_lengths=(16, 64), dilation_rates=(1, 4))
    result = report(config)
    assert kinds(result) == ["pattern", "pattern"]
    assert not result.is_causal


@pytest.mark.parametrize(
    "config_class",
    [tf.BloomConfig, tf.CodeGenConfig, tf.XGLMConfig, tf.DebertaConfig, tf.MPNetConfig, tf.FalconConfig, tf.GPTJConfig],
)
def test_models_that_bypass_the_interface_are_refused(config_class: type[tf.PreTrainedConfig]) -> None:
    with pytest.raises(UnsupportedError, match="computes its attention itself and would ignore this backend"):
        report(config_class())


def test_models_without_such_attention_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="is_encoder_decoder"):
        report(tf.T5Config())
    with pytest.raises(UnsupportedError, match="never asks for an attention function"):
        report(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    with pytest.raises(ReportError, match="reads input_values"):
        report(tf.Wav2Vec2Config())
    with pytest.raises(ReportError, match="cannot be built"):
        report(tf.EsmConfig(**SIZES | {"vocab_size": None}))


def test_nothing_is_left_behind() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    report(config)
    assert config.to_dict() == before
    assert ALL_ATTENTION_FUNCTIONS["dilated"] is attention_function("dilated")
    with pytest.raises(UnsupportedError):
        report(tf.Llama4TextConfig(**GROUPED, attention_chunk_size=4))
    assert ALL_ATTENTION_FUNCTIONS["dilated"] is attention_function("dilated")


def test_a_report_needs_no_memory() -> None:
    llama_70b = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    result = report(tf.LlamaConfig(**llama_70b, num_hidden_layers=4, max_position_embeddings=131072))
    assert (result.heads, result.kv_heads) == (64, 8)
    assert Counter(kinds(result)) == {"pattern": 4}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 29, 64])
@pytest.mark.parametrize(
    "config",
    [
        DilatedConfig(segment_lengths=(8, 16, 64), dilation_rates=(1, 2, 4)),
        DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 8), sink_tokens=3, phase="alternate", rotate=True),
        DilatedConfig(segment_lengths=(6, 10), dilation_rates=(2, 3), overlap="count", offset="grouped"),
    ],
)
def test_keys_per_query_counts_what_the_oracle_sees(config: DilatedConfig, length: int, is_causal: bool) -> None:
    m = reference.multiplicity(torch.arange(length), length, config, heads=3, kv_heads=3, is_causal=is_causal, layer=1)
    pattern = DilatedPattern(config=config, layer=1)
    counted = sum(keys_per_query(pattern, length, heads=3, kv_heads=3, is_causal=is_causal))
    assert counted == pytest.approx(m.sum().item() / 3 / length)


def test_keys_per_query_of_the_usual_pattern() -> None:
    branches = [2048 << i for i in range(7)], [1 << i for i in range(7)]
    once = DilatedPattern(config=DilatedConfig(segment_lengths=tuple(branches[0]), dilation_rates=tuple(branches[1])))
    count = DilatedPattern(config=DilatedConfig.longnet(*branches))
    assert sum(keys_per_query(once, 131072, heads=32, kv_heads=32)) == pytest.approx(1528, abs=1)
    assert sum(keys_per_query(count, 131072, heads=32, kv_heads=32)) == pytest.approx(2033, abs=1)


def test_a_model_that_keeps_no_cache() -> None:
    """As ``Trainer`` leaves it."""
    config = tiny_config("llama")
    config.use_cache = False
    assert kinds(report(config)) == ["pattern", "pattern"]
    assert config.use_cache is False
