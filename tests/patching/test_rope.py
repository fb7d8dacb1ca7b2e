"""Every rule against Transformers' own angles."""

from typing import Any

import pytest
import torch
import transformers as tf

from hf_dilated import PatchError
from hf_dilated.patching.rope import extend
from tests.tiny_models import GROUPED

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_64 = LLAMA3 | {"original_max_position_embeddings": 64}


def llama(**rope: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope})


def yarn(factor: float) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("given", "scaling", "expected", "reach"),
    [
        ({}, None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({}, "yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({}, "linear", {"rope_type": "linear", "factor": 4.0}, 1024),
        ({}, "dynamic", {"rope_type": "dynamic", "factor": 4.0}, 256),
        ({}, {"type": "linear"}, {"rope_type": "linear", "factor": 4.0}, 1024),
        ({}, {"rope_type": "linear", "factor": 3.0, "rope_theta": 5.0}, {"factor": 3.0, "rope_theta": 5.0}, 1024),
        ({"rope_type": "linear", "factor": 2.0}, None, {"rope_type": "linear", "factor": 8.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, None, {"rope_type": "dynamic", "factor": 2.0}, 256),
        (yarn(4.0) | {"beta_fast": 20}, None, yarn(16.0) | {"beta_fast": 20}, 1024),
        (LLAMA3_64, None, LLAMA3_64 | {"factor": 32.0}, 1024),
        (LLAMA3_64, {"rope_type": "yarn"}, yarn(16.0), 1024),
    ],
)
def test_rules(given: dict[str, Any], scaling: Any, expected: dict[str, Any], reach: int) -> None:
    config = llama(**given)
    extend(config, 1024, scaling)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0} | expected
    assert config.max_position_embeddings == reach
    tf.LlamaModel(config)  # Transformers takes it


@pytest.mark.parametrize("scaling", ["yarn", "dynamic", "linear"])
def test_a_head_size_that_is_left_open(scaling: str) -> None:
    config = tf.MixtralConfig(**GROUPED)
    assert config.head_dim is None
    extend(config, 2 * config.max_position_embeddings, scaling)
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    tf.MixtralModel(config)


def test_nothing_changes_without_need() -> None:
    config = llama()
    before = config.to_dict()
    extend(config, 256)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("given", "scaling", "message"),
    [
        (yarn(4.0), "linear", "is scaled by 'yarn' already"),
        ({"rope_type": "proportional"}, None, "of the type 'proportional', which no rule enlarges"),
        ({"rope_type": "proportional"}, "yarn", "of the type 'proportional', which no rule enlarges"),
    ],
)
def test_what_no_rule_enlarges(given: dict[str, Any], scaling: Any, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        extend(llama(**given), 1024, scaling)


def test_linear_angles_are_those_of_shorter_texts() -> None:
    near, far = tf.LlamaModel(llama()), llama()
    extend(far, 1024, "linear")
    positions = torch.arange(256)[None]
    x = torch.zeros(1, 256, 32)
    torch.testing.assert_close(
        tf.LlamaModel(far).rotary_emb(x, 4 * positions), near.rotary_emb(x, positions), rtol=1e-5, atol=1e-5
    )
