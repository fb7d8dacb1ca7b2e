"""Every way of generating gives what dense attention gives on short inputs and what the oracle gives on long ones."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from hf_dilated import DilatedConfig
from tests.tiny_models import tiny_model, tokens

NEW = 6
SHORT = DilatedConfig(segment_lengths=(64, 128), dilation_rates=(1, 2), sink_tokens=2, phase="alternate", rotate=True)
LONG = DilatedConfig(
    segment_lengths=(8, 16, 64), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate", rotate=True
)
LENGTHS = {"short": 21, "long": 45}  # of prompts: dense up to 2 + 64 - 32 tokens

WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 8},
    "chunked static": {"prefill_chunk_size": 8, "cache_implementation": "static", "disable_compile": True},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def generator(family: str, length: str, name: str) -> Any:
    model = tiny_model(family, name)
    if name != "sdpa" and name != "eager":
        model.config.hf_dilated = SHORT if length == "short" else LONG
    return model


def reference_model(family: str, length: str) -> Any:
    dense = "eager" if family == "gpt_oss" else "sdpa"
    return generator(family, length, dense if length == "short" else "oracle")


def generate(model: Any, ids: Tensor, *, assistant: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens and the scores of every step."""
    settings = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        **{"do_sample": False} | options.pop("settings", {}),
    )  # fmt: skip
    torch.manual_seed(0)
    more = {} if assistant is None else {"assistant_model": assistant}
    output = model.generate(ids, generation_config=settings, **more, **options)
    return output.sequences, torch.stack(output.logits)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert actual[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


CASES = [("llama", way) for way in WAYS]
CASES += [("gemma3", way) for way in WAYS if way != "prompt lookup"]  # caches with windows cannot be cropped
CASES += [(family, way) for family in ("gpt2", "gpt_oss", "qwen2_windowed") for way in ("dynamic", "static")]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("family", "way"), CASES)
def test_generation(family, way, length):
    batch = 1 if way == "prompt lookup" else 2
    ids = tokens(batch, LENGTHS[length]).repeat(1, 2)[:, : LENGTHS[length]]
    models = (generator(family, length, "dilated"), reference_model(family, length))
    actual, expected = (generate(model, ids, settings=WAYS[way]) for model in models)
    assert_same(actual, expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("way", ["dynamic", "static", "chunked prefill", "no cache"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_left_padding(family, way, length):
    ids = tokens(3, LENGTHS[length])
    mask = torch.ones_like(ids)
    mask[0, :11], mask[1, :2] = 0, 0
    models = (generator(family, length, "dilated"), reference_model(family, length))
    actual, expected = (generate(model, ids, attention_mask=mask, settings=WAYS[way]) for model in models)
    assert_same(actual, expected)
    alone, _ = generate(models[0], ids[:1, 11:], settings=WAYS[way])
    assert actual[0][0, 11:].tolist() == alone[0].tolist(), "padding changed what is generated"


@pytest.mark.parametrize("length", LENGTHS)
def test_assisted_generation(length):
    ids = tokens(1, LENGTHS[length])
    assistant = tiny_model("qwen2", "sdpa")
    models = (generator("llama", length, "dilated"), reference_model("llama", length))
    actual, expected = (generate(model, ids, assistant=assistant) for model in models)
    assert_same(actual, expected)


def test_static_compiled_generation(monkeypatch):
    """The decoding step as one graph; on the CPU Transformers compiles only on demand."""
    ids = tokens(2, LENGTHS["long"])
    expected = generate(reference_model("llama", "long"), ids)
    model = generator("llama", "long", "dilated")
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda kwargs, config: True)
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    assert_same(generate(model, ids, settings={"cache_implementation": "static", "compile_config": compiled}), expected)


def test_decoding_one_token_at_a_time_equals_one_forward():
    model, ids = generator("llama", "long", "dilated"), tokens(2, 70)
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-6, atol=1e-6)
