"""LoRA with embeddings and norms: what learns, what is saved, what merging gives."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from hf_dilated import DilatedConfig
from hf_dilated.training.lora import long_lora
from tests.tiny_models import tiny_model, tokens

PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2))
PROJECTIONS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
}


def adapted(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_model(family, "dilated", hf_dilated=PATTERN, **{"tie_word_embeddings": False} | options)
    return peft.get_peft_model(model, long_lora(model, rank=2), autocast_adapter_dtype=False)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_projections_get_adapters_and_embeddings_and_norms_learn(family: str) -> None:
    plain = tiny_model(family, tie_word_embeddings=False)
    assert set(long_lora(plain).target_modules) == PROJECTIONS[family]
    model = adapted(family)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            assert any(f"{name}.modules_to_save" in found for found in trained), name
    assert not any("mlp" in name and "lora" in name for name in trained if family != "gpt2")


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_merging_keep_what_was_learnt(tmp_path: Path, tied: bool) -> None:
    ids = tokens(2, 24)
    model = adapted("llama", tie_word_embeddings=tied)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("embed_tokens" in name for name in changed)
    assert any("norm" in name for name in changed)
    assert any("lora" in name for name in changed)
    assert not any("original_module" in name or "base_layer" in name for name in changed)
    expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    fresh = tiny_model("llama", "dilated", hf_dilated=PATTERN, tie_word_embeddings=tied)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    if tied:
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_embeddings_that_would_be_untied_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="ties its output to embeddings that PEFT does not know"):
        long_lora(tiny_model(family, tie_word_embeddings=True))


def test_a_model_without_projections_is_refused() -> None:
    class Plain(nn.Module):
        pass

    with pytest.raises(ValueError, match="Plain has no attention with linear projections"):
        long_lora(Plain())
