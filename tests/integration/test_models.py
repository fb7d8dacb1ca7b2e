"""Whole models against dense attention, against the oracle, and against changes that must not matter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dilated import DilatedConfig
from tests.tiny_models import (
    DECODERS,
    ENCODERS,
    VISION,
    WITHOUT_SDPA,
    inputs,
    model_class,
    tiny_config,
    tiny_model,
    tokens,
)

FAMILIES = DECODERS + ENCODERS + VISION
WINDOWED = ("qwen2_windowed", "gemma2_without_softcap", "gemma3", "gpt_oss", "modernbert")
SHORT = DilatedConfig(segment_lengths=(64, 128), dilation_rates=(1, 2), sink_tokens=2, phase="alternate", rotate=True)
LONG = DilatedConfig(
    segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate", rotate=True
)
COUNT = DilatedConfig(segment_lengths=(6, 14, 30), dilation_rates=(1, 3, 2), overlap="count", offset="grouped")


def backend(family: str, name: str = "dilated") -> str | dict[str, str]:
    return {"text_config": name} if family == "llava" else name


def without_layers(pattern: DilatedConfig) -> DilatedConfig:
    """The same for models whose layers do not know their index."""
    return DilatedConfig.from_dict(pattern.to_dict() | {"phase": "none", "rotate": False})


def patterned(family: str, pattern: DilatedConfig, name: str = "dilated") -> Any:
    if family == "vit":
        pattern = without_layers(pattern)
    model = tiny_model(family, backend(family, name))
    model.config.hf_dilated = pattern
    return model


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(**kwargs).logits


def left_padded(batch: int, length: int, padding: int = 5) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


def assert_close(actual: Tensor, expected: Tensor, family: str = "") -> None:
    tolerance = 1e-4 if family in WITHOUT_SDPA else 1e-6  # eager attention rounds its softmax to float32
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_inputs_equal_dense_attention(family):
    length = SHORT.dense_length(layer=1)
    pattern = DilatedConfig(segment_lengths=(128,), dilation_rates=(1,)) if family == "vit" else SHORT
    given = inputs(family, 2, length)
    assert_close(logits(patterned(family, pattern), **given), logits(tiny_model(family), **given), family)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "vit" and f not in WITHOUT_SDPA])
def test_short_padded_inputs_equal_dense_attention(family):
    mask = left_padded(2, SHORT.dense_length(layer=1))
    given = inputs(family, *mask.shape) | {"attention_mask": mask}
    if family == "llava":
        given["input_ids"] = given["input_ids"].roll(5, dims=1)
    actual, expected = logits(patterned(family, SHORT), **given), logits(tiny_model(family), **given)
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [LONG, COUNT], ids=["once", "count"])
def test_long_inputs_equal_the_oracle(family, pattern):
    given = inputs(family, 2, 51)
    actual = logits(patterned(family, pattern), **given)
    assert_close(actual, logits(patterned(family, pattern, "oracle"), **given))
    assert not torch.allclose(actual, logits(tiny_model(family), **given), atol=1e-2), "the pattern did not run"


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_long_padded_inputs_equal_the_oracle(family):
    mask = left_padded(3, 51)
    mask[1, -7:] = 0
    if family not in WINDOWED:  # there it is refused
        mask[2, 20:23] = 0
    given = {"input_ids": tokens(3, 51), "attention_mask": mask}
    real = mask.bool()
    actual, expected = (logits(patterned(family, LONG, name), **given)[real] for name in ("dilated", "oracle"))
    assert_close(actual, expected)


def packed_position_ids(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "qwen3_next"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_equal_each_document_alone(family, use_cache):
    lengths = (20, 1, 30)
    ids = tokens(1, sum(lengths))
    model = patterned(family, LONG)
    packed = logits(model, input_ids=ids, position_ids=packed_position_ids(*lengths), use_cache=use_cache)
    for alone, together in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        assert_close(together, logits(model, input_ids=alone))


@pytest.mark.parametrize("family", DECODERS)
def test_future_tokens_change_nothing(family):
    model, ids = patterned(family, LONG), tokens(2, 51)
    changed = ids.clone()
    changed[:, 40:] = tokens(2, 11, seed=1)
    before, after = logits(model, input_ids=ids), logits(model, input_ids=changed)
    assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "qwen3_next"] + list(ENCODERS))
def test_padding_changes_nothing(family):
    model, ids, mask = patterned(family, LONG), tokens(2, 51), left_padded(2, 51)
    mask[1, -6:] = 0
    changed = torch.where(mask.bool(), ids, tokens(2, 51, seed=1))
    before, after = (logits(model, input_ids=x, attention_mask=mask)[mask.bool()] for x in (ids, changed))
    assert_close(before, after)


@pytest.mark.parametrize("family", ["llama", "gemma3", "modernbert", "vit"])
def test_every_way_to_choose_the_backend(family, tmp_path):
    given = inputs(family, 1, 51)
    expected = logits(patterned(family, LONG), **given)
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path)
    loaded = model_class(family).from_pretrained(tmp_path, attn_implementation="dilated", dtype=torch.float64)
    dense.set_attn_implementation("dilated")
    for model in (loaded.eval(), dense):
        model.config.hf_dilated = without_layers(LONG) if family == "vit" else LONG
        assert model.config._attn_implementation == "dilated"
        assert_close(logits(model, **given), expected)


def test_only_the_text_part_of_a_multimodal_model_is_replaced():
    model = patterned("llava", LONG)
    assert model.config.text_config._attn_implementation == "dilated"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_without_a_stored_pattern_the_model_length_chooses_it():
    config = tiny_config("llama")
    config.max_position_embeddings = 32
    torch.manual_seed(0)
    model = model_class("llama").from_config(config, attn_implementation="dilated").eval()
    given = {"input_ids": tokens(1, 32)}
    chosen = logits(model, **given)
    model.config.hf_dilated = DilatedConfig.from_model_config(config)
    assert torch.equal(logits(model, **given), chosen)
