"""PEFT: LoRA through training, saving and merging; prompt and prefix tuning, which lengthen the keys."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

from hf_dilated import DilatedConfig, StoredConfig
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.support import UnsupportedError
from tests.tiny_models import tiny_model, tokens

SHORT = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=2)
DENSE = DilatedConfig(segment_lengths=(64, 128), dilation_rates=(1, 2))
LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
VIRTUAL = 5


def train_a_step(model: Any, ids: Tensor) -> None:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):  # the first moves B away from zero, the second moves A
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_lora_through_saving_and_merging(tmp_path: Path) -> None:
    ids = tokens(2, 24)
    base = tiny_model("llama", "dilated", hf_dilated=SHORT)
    base.save_pretrained(tmp_path / "base")
    plain = logits(base, ids)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = peft.get_peft_model(base, LORA, autocast_adapter_dtype=False)
    train_a_step(model, ids)
    trained = logits(model, ids)
    assert (trained - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")

    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert reloaded.config._attn_implementation == "dilated"
    torch.testing.assert_close(logits(reloaded, ids), trained)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), trained)
    for number in range(2):
        assert merged.config._attn_implementation == "dilated"
        assert stored_config(merged.config) == StoredConfig(attn_implementation="dilated", dilated=SHORT)
        merged.save_pretrained(tmp_path / f"merged{number}")
        merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}", dtype=torch.float64)
        torch.testing.assert_close(logits(merged, ids), trained)


def test_an_adapter_of_a_plain_checkpoint_is_told_its_backend_again(tmp_path: Path) -> None:
    """An adapter names its base model and nothing else, so what the base does not hold is named at loading."""
    ids = tokens(2, 24)
    base = tiny_model("llama", "sdpa")
    base.save_pretrained(tmp_path / "base")
    chosen = {"dtype": torch.float64, "attn_implementation": "dilated", "hf_dilated": SHORT}
    model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **chosen), LORA)
    train_a_step(model.double(), ids)
    trained = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **chosen)
    torch.testing.assert_close(logits(reloaded, ids), trained)
    dense = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert dense.config._attn_implementation == "sdpa"


def test_lora_learns_what_it_learns_with_dense_attention() -> None:
    ids, weights = tokens(2, 24), {}
    for backend in ("sdpa", "dilated"):
        torch.manual_seed(0)
        base = tiny_model("llama", backend, hf_dilated=DENSE)
        model = peft.get_peft_model(base, LORA, autocast_adapter_dtype=False)
        train_a_step(model, ids)
        weights[backend] = peft.get_peft_model_state_dict(model)
    torch.testing.assert_close(weights["dilated"], weights["sdpa"])
    assert all(weight.abs().max() > 0 for weight in weights["sdpa"].values())


def prompt_tuning() -> peft.PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)


def prefix_tuning() -> peft.PeftConfig:
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)


def tuned(backend: str, method: Any, pattern: DilatedConfig) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama", backend, hf_dilated=pattern), method()).double()
    with torch.no_grad():
        for weight in model.prompt_encoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return model.eval()


@pytest.mark.parametrize("method", [prompt_tuning, prefix_tuning])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_virtual_tokens_are_exact(method: Any, padding: str) -> None:
    """Virtual tokens are the first tokens of the document; where the pattern is dense, all is as with sdpa."""
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    if padding != "none":
        mask[1, :7] = 0
        mask = mask.flip(1) if padding == "right" else mask
    outputs = {}
    for backend in ("sdpa", "dilated"):
        model = tuned(backend, method, DENSE)
        found = model(input_ids=ids, attention_mask=mask).logits
        found = found[:, -24:][mask.bool()]
        found.square().sum().backward()
        outputs[backend] = found, [weight.grad for weight in model.prompt_encoder.parameters()]
    torch.testing.assert_close(outputs["dilated"], outputs["sdpa"])
    assert outputs["sdpa"][1][0].abs().max() > 0


def test_prompt_tuning_is_a_longer_input() -> None:
    model, ids = tuned("dilated", prompt_tuning, SHORT), tokens(2, 24)
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=2)
        embedded = torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)
        expected = model.base_model(inputs_embeds=embedded).logits
    torch.testing.assert_close(logits(model, ids), expected)


def test_a_prefix_counts_as_the_beginning_of_the_document() -> None:
    """With sinks alone beyond the first segment: a query there sees the prefix's first tokens and its own segment."""
    model, ids = tuned("dilated", prefix_tuning, SHORT), tokens(1, 24)
    before = logits(model, ids)
    virtual = model.prompt_encoder["default"].embedding.weight
    assert virtual.shape[0] == VIRTUAL
    with torch.no_grad():
        virtual[3:] += 1  # no sink, and in the first segment: tokens 2 .. 9 of the document
    after = logits(model, ids)
    segment = SHORT.sink_tokens + SHORT.segment_lengths[0] - VIRTUAL  # where it ends, counted in tokens of the text
    assert (after[0, :segment] != before[0, :segment]).any(-1).all()
    with torch.no_grad():
        virtual[0] += 1  # a sink: seen by all
    assert (logits(model, ids) != after).any(-1).all()


def test_prefix_tuning_of_an_encoder_is_refused() -> None:
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=VIRTUAL)
    model = peft.get_peft_model(tiny_model("bert", "dilated", hf_dilated=DENSE), config).double()
    with pytest.raises(UnsupportedError, match="24 queries to 29 keys"):
        model(input_ids=tokens(2, 24))


@pytest.mark.parametrize("method", [prompt_tuning, prefix_tuning])
def test_generation_goes_on_behind_virtual_tokens(method: Any) -> None:
    model, ids = tuned("dilated", method, SHORT), tokens(2, 11)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for length in range(11, 23):
        step = logits(model, generated[:, :length])[:, -1].argmax(-1)
        assert torch.equal(step, generated[:, length])
