"""Models in memory."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from hf_dilated import DilatedConfig, PatchError, patch_checkpoint, patch_model, unpatch_model
from tests.tiny_models import model_class, tiny_config

PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=2)


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 41)[None]).logits


def test_a_live_model_is_the_patched_checkpoint(checkpoint: Path, tmp_path: Path, model: tf.PreTrainedModel) -> None:
    options = {"attention": PATTERN, "max_position_embeddings": 1024}
    patch_checkpoint(checkpoint, tmp_path / "long", **options)
    dense = logits(model)
    assert patch_model(model, **options) is model
    torch.testing.assert_close(
        logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "long")), rtol=0, atol=0
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert not torch.allclose(logits(model), dense)
    torch.testing.assert_close(logits(unpatch_model(model)), dense, rtol=0, atol=0)
    assert model.config.hf_dilated is None


def test_what_was_trained_with_longer_positions_keeps_them(model: tf.PreTrainedModel) -> None:
    patch_model(model, attention=PATTERN, max_position_embeddings=1024)
    unpatch_model(model, keep_rope=True)
    assert model.config._attn_implementation == "sdpa"
    assert model.model.rotary_emb.rope_type == "yarn"
    assert model.config.max_position_embeddings == 1024


def test_a_vision_language_model(tmp_path: Path) -> None:
    model = model_class("llava").from_config(tiny_config("llava"))
    vision = model.config.vision_config._attn_implementation
    patch_model(model, attention=PATTERN, max_position_embeddings=1024)
    assert model.config.text_config._attn_implementation == "dilated"
    assert model.config.vision_config._attn_implementation == vision
    assert model.config.hf_dilated["dilated"]["segment_lengths"] == [8, 16]
    assert model.model.language_model.rotary_emb.rope_type == "yarn"


def test_a_refused_model_stays_as_it_is() -> None:
    model = model_class("gpt2").from_config(tiny_config("gpt2"))
    before = model.config.to_dict()
    with pytest.raises(PatchError, match="no rotary positions"):
        patch_model(model, attention=PATTERN, max_position_embeddings=1024)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(PatchError, match="nothing to take out"):
        unpatch_model(model)
