"""What Transformers' common tests expect of every model, on LongNet."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, pipeline

from hf_dilated import DilatedCache, DilatedConfig
from modeling import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetModel,
)
from tests.tiny_checkpoint import tokenizer

MODELS = (LongNetModel, LongNetForCausalLM, LongNetForMaskedLM, LongNetForSequenceClassification)
HEADS = MODELS[1:]
PATTERN = DilatedConfig.longnet((8, 16, 64), (1, 2, 4))


def config(model_class: Any, **options: Any) -> LongNetConfig:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 1, "hf_dilated": PATTERN}
    return LongNetConfig(**sizes | {"is_causal": model_class is not LongNetForMaskedLM} | options)


def build(model_class: Any = LongNetForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config(model_class, **options)).eval()


def tokens(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def first(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options)[0]


@pytest.mark.parametrize("model_class", MODELS)
def test_tuples_say_what_dictionaries_say(model_class: Any) -> None:
    model = build(model_class)
    with torch.no_grad():
        named = model(tokens(), output_hidden_states=True)
        plain = model(tokens(), output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    values = named.to_tuple()
    assert len(plain) == len(values)
    assert torch.equal(plain[0], values[0])
    assert len(named.hidden_states) == model.config.num_hidden_layers + 1
    for one, other in zip(plain[-1], named.hidden_states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model_class", MODELS)
def test_rows_of_a_batch_are_apart_and_runs_repeat(model_class: Any) -> None:
    model, ids = build(model_class), tokens(3)
    together = first(model, ids)
    assert torch.equal(together, first(model, ids))
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], first(model, ids[row : row + 1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_class", HEADS)
def test_a_head_is_new_on_a_base_model_and_the_base_is_found_under_a_head(model_class: Any, tmp_path: Path) -> None:
    base = LongNetModel(config(model_class)).eval()
    base.save_pretrained(tmp_path / "base")
    headed, info = model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all("score" in name or "lm_head" in name for name in info["missing_keys"])
    assert all(weight.isfinite().all() for weight in headed.parameters())
    torch.testing.assert_close(first(headed.model.eval(), tokens()), first(base, tokens()))
    headed.save_pretrained(tmp_path / "headed", max_shard_size="20KB")
    assert len(list((tmp_path / "headed").glob("*.safetensors"))) > 1
    back = LongNetModel.from_pretrained(tmp_path / "headed").eval()
    torch.testing.assert_close(first(back, tokens()), first(base, tokens()))


def test_another_number_of_classes_is_told_and_can_be_asked_for(tmp_path: Path) -> None:
    build(LongNetForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LongNetForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    other = LongNetForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert first(other, tokens()).shape == (2, 5)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, 2.0])),
        ({"num_labels": 3}, torch.tensor([0, 2])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.ones(2, 3)),
    ],
    ids=["regression", "one of", "several of"],
)
def test_kinds_of_classification(problem: dict[str, Any], labels: Tensor) -> None:
    loss = build(LongNetForSequenceClassification, **problem)(tokens(), labels=labels).loss
    loss.backward()
    assert loss.ndim == 0
    assert loss.isfinite()


@pytest.mark.parametrize("model_class", MODELS)
def test_gradients_reach_hidden_states_and_attentions(model_class: Any) -> None:
    model = build(model_class)
    model.set_attn_implementation("eager")
    output = model(tokens(), output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.attentions[0]]
    assert kept[1].shape == (2, 4, 20, 20)
    torch.testing.assert_close(kept[1].sum(-1), torch.ones(2, 4, 20))
    for x in kept:
        x.retain_grad()
    output[0].square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in kept)


@pytest.mark.parametrize("model_class", MODELS)
def test_copies_pickles_and_other_embeddings(model_class: Any) -> None:
    model = build(model_class)
    expected = first(model, tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first(other, tokens()), expected)
    new = nn.Embedding(50, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert not torch.equal(first(model, tokens()), expected)


@pytest.mark.parametrize("model_class", MODELS)
def test_half_precision_and_the_meta_device(model_class: Any) -> None:
    low = build(model_class).to(torch.bfloat16)
    output = first(low, tokens())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), first(build(model_class), tokens()), rtol=0.1, atol=0.15)
    with torch.device("meta"):
        assert all(weight.is_meta for weight in model_class(config(model_class)).parameters())


def test_ways_to_generate_agree() -> None:
    model, ids = build(), tokens(1, 20)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(ids, **options).tolist()
    assert model.generate(ids, use_cache=False, **options).tolist() == expected
    assert model.generate(ids, past_key_values=DilatedCache(model.config), **options).tolist() == expected
    assert model.generate(ids, prompt_lookup_num_tokens=2, **options).tolist() == expected
    assert model.generate(ids, assistant_model=build(num_hidden_layers=1), **options).tolist() == expected
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert embedded.tolist() == [expected[0][20:]]
    cache = DynamicCache(config=model.config)
    first(model, ids[:, :12], past_key_values=cache)
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected


def test_a_pipeline(tmp_path: Path) -> None:
    tokens = tokenizer()
    build(vocab_size=len(tokens), pad_token_id=None).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, LongNetForCausalLM)
    written = pipeline("text-generation", model=model, tokenizer=tokens)("def run(", max_new_tokens=3, do_sample=False)
    assert written[0]["generated_text"].startswith("def run(")
