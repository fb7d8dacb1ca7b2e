"""How far a model reads and was made to read, whatever kind of positions it has."""

from typing import Any

import pytest
import transformers as tf

from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.integration.reach import reach_of, trained_length
from hf_dilated.patching.configuration import patch_config, unpatch_config
from tests.tiny_models import GROUPED, tiny_config

PATTERN = DilatedConfig(segment_lengths=(64, 1024), dilation_rates=(1, 2))


def patched(config: Any, attention: Any = PATTERN, scaling: Any = None) -> Any:
    patch_config(config, backend=None, attention=attention, max_position_embeddings=1024, rope_scaling=scaling)
    return config


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("scaling", ["yarn", "linear", "dynamic"])
@pytest.mark.parametrize("attention", [PATTERN, BlockSparseConfig(block_size=16, local_blocks=2)])
def test_a_patched_model(family: str, scaling: str, attention: Any) -> None:
    config = tiny_config(family)
    made_for = config.max_position_embeddings
    assert (reach_of(config), trained_length(config)) == (made_for, made_for)
    config = patched(config, attention, scaling)
    assert made_for < 1024
    assert (reach_of(config), trained_length(config)) == (1024, made_for)


def test_the_rotary_parameters_of_every_kind_of_layer_are_looked_at() -> None:
    config = tiny_config("gemma3")
    made_for = config.max_position_embeddings
    unpatch_config(patched(config), keep_rope=True)
    assert (reach_of(config), trained_length(config)) == (1024, made_for)


def test_dynamic_positions_that_were_enlarged_already() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = tf.LlamaConfig(**GROUPED, rope_parameters=rope)
    assert reach_of(config) == 2 * config.max_position_embeddings
    assert reach_of(patched(config)) == 1024
    assert trained_length(config) == config.max_position_embeddings


def test_a_long_segment_does_not_lengthen_other_positions() -> None:
    config = tf.LlamaConfig(**GROUPED)
    config.hf_dilated = PATTERN
    assert reach_of(config) == config.max_position_embeddings < 1024
    assert reach_of(tf.MambaConfig()) is None
