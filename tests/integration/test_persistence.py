"""`config.hf_dilated` through every way in which a configuration is saved, copied and loaded."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import hf_dilated  # noqa: F401  (registers the backend)
from hf_dilated import ConfigError, DilatedConfig, StoredConfig
from hf_dilated.integration.persistence import stored_config
from tests.tiny_models import GROUPED, model_class, tiny_config

PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=2)
OTHER = DilatedConfig.longnet((16, 32), (1, 4))
STORED = StoredConfig(attn_implementation="dilated", dilated=PATTERN)


def llama(**options: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**GROUPED, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that never heard of this package."""
    path = tmp_path / "plain"
    tf.AutoModelForCausalLM.from_config(llama()).save_pretrained(path)
    assert "hf_dilated" not in (path / "config.json").read_text()
    return path


def load(path: Path, **options: Any) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize(
    "value", [PATTERN, PATTERN.to_dict(), STORED, STORED.to_dict()], ids=lambda v: type(v).__name__
)
def test_a_pattern_given_at_load_survives_rounds(checkpoint: Path, tmp_path: Path, value: Any) -> None:
    model = load(checkpoint, attn_implementation="dilated", hf_dilated=value)
    for number in range(3):
        assert model.config._attn_implementation == "dilated"
        assert stored_config(model.config) == STORED
        model.save_pretrained(tmp_path / str(number))
        model = load(tmp_path / str(number))


def test_a_pattern_alone_selects_its_backend(checkpoint: Path) -> None:
    assert load(checkpoint, hf_dilated=PATTERN).config._attn_implementation == "dilated"


def test_the_caller_chooses_another_backend_for_one_run(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, hf_dilated=PATTERN).save_pretrained(tmp_path / "dilated")
    dense = load(tmp_path / "dilated", attn_implementation="sdpa")
    assert dense.config._attn_implementation == "sdpa"
    assert stored_config(dense.config) == STORED
    dense.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").config._attn_implementation == "dilated"


def test_a_stored_pattern_can_be_replaced_at_load(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, hf_dilated=PATTERN).save_pretrained(tmp_path / "dilated")
    model = load(tmp_path / "dilated", hf_dilated=OTHER)
    assert stored_config(model.config) == StoredConfig(attn_implementation="dilated", dilated=OTHER)


def test_without_a_pattern_the_one_that_ran_is_saved(checkpoint: Path, tmp_path: Path) -> None:
    for number, model in enumerate([load(checkpoint, attn_implementation="dilated"), load(checkpoint)]):
        model.set_attn_implementation("dilated")
        model.save_pretrained(tmp_path / str(number))
        loaded = load(tmp_path / str(number)).config
        assert loaded._attn_implementation == "dilated"
        assert stored_config(loaded).dilated == DilatedConfig.from_model_config(llama())


def test_a_model_that_never_ran_a_backend_saves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, attn_implementation="eager").save_pretrained(tmp_path / "eager")
    saved = json.loads((tmp_path / "eager" / "config.json").read_text())
    assert not {"hf_dilated", "attn_implementation"} & set(saved)


def test_forgetting(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, hf_dilated=PATTERN)
    model.set_attn_implementation("sdpa")
    del model.config.hf_dilated
    assert model.config.hf_dilated is None
    model.save_pretrained(tmp_path / "plain-again")
    assert load(tmp_path / "plain-again").config._attn_implementation == "sdpa"
    model.config.hf_dilated = PATTERN
    model.config.hf_dilated = None
    assert model.config.hf_dilated is None


def test_from_config_runs_what_the_configuration_holds() -> None:
    config = llama()
    config.hf_dilated = PATTERN
    assert tf.AutoModelForCausalLM.from_config(config).config._attn_implementation == "dilated"
    named = tf.AutoModelForCausalLM.from_config(llama(hf_dilated=PATTERN.to_dict()), attn_implementation="dilated")
    assert stored_config(named.config) == STORED
    dense = tf.AutoModelForCausalLM.from_config(llama(hf_dilated=PATTERN.to_dict()), attn_implementation="sdpa")
    assert dense.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("value", [STORED.to_dict(), PATTERN.to_dict()], ids=["stored", "pattern"])
def test_a_configuration_from_before_the_import(value: dict[str, Any]) -> None:
    """It holds what its file says as a plain value; a model takes it over, unless another attention was asked for."""

    def early() -> tf.LlamaConfig:
        config = llama()
        vars(config)["hf_dilated"] = copy.deepcopy(value)
        return config

    assert stored_config(early()) == STORED
    for model in (tf.LlamaForCausalLM(early()), tf.AutoModelForCausalLM.from_config(early())):
        assert model.config._attn_implementation == "dilated"
        assert model.config.hf_dilated == STORED.to_dict()
    dense = tf.AutoModelForCausalLM.from_config(early(), attn_implementation="sdpa")
    assert dense.config._attn_implementation == "sdpa"
    assert stored_config(dense.config) == STORED


def test_a_multimodal_configuration_from_before_the_import() -> None:
    config = tiny_config("llava")
    vars(config)["hf_dilated"] = STORED.to_dict()
    model = model_class("llava").from_config(config)
    assert model.config.text_config._attn_implementation == "dilated"
    assert stored_config(model.config.text_config) == STORED


@pytest.mark.parametrize("value", [{"version": 2}, {"attn_implementation": "ring_of_fire"}])
def test_what_cannot_run_is_refused_also_from_before_the_import(value: dict[str, Any]) -> None:
    config = llama()
    vars(config)["hf_dilated"] = value
    with pytest.raises(ConfigError, match="pip install -U"):
        tf.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: type(config).from_dict(config.to_dict()),
        lambda config: type(config).from_dict(config.to_diff_dict()),
        lambda config: type(config)(**json.loads(config.to_json_string())),
    ],
    ids=["deepcopy", "pickle", "to_dict", "to_diff_dict", "json"],
)
def test_copies_are_equal_and_independent(copied: Any) -> None:
    config = llama(hf_dilated=STORED.to_dict())
    other = copied(config)
    assert other._attn_implementation == "dilated"
    assert stored_config(other) == STORED
    other.hf_dilated = OTHER
    assert stored_config(config) == STORED


@pytest.mark.parametrize("as_parts", [True, False])
def test_a_multimodal_model_keeps_it_on_its_text_part(tmp_path: Path, as_parts: bool) -> None:
    backend = {"text_config": "dilated"} if as_parts else "dilated"
    plain = model_class("llava").from_config(tiny_config("llava"))
    plain.save_pretrained(tmp_path / "plain")
    model = model_class("llava").from_pretrained(tmp_path / "plain", attn_implementation=backend, hf_dilated=PATTERN)
    for number in range(3):
        config = model.config
        assert config.text_config._attn_implementation == "dilated"
        assert config.vision_config._attn_implementation == ("sdpa" if as_parts else "dilated")
        assert stored_config(config) == stored_config(config.text_config) == STORED
        assert config.hf_dilated == config.text_config.hf_dilated
        model.save_pretrained(tmp_path / str(number))
        model = model_class("llava").from_pretrained(tmp_path / str(number))


def test_a_text_part_that_was_set_directly(tmp_path: Path) -> None:
    config = tiny_config("llava")
    config.text_config.hf_dilated = PATTERN
    config.save_pretrained(tmp_path)
    assert stored_config(tf.AutoConfig.from_pretrained(tmp_path).text_config) == STORED
    assert tf.AutoConfig.from_pretrained(tmp_path).text_config._attn_implementation == "dilated"


def test_loading_without_the_package_names_the_backend(tmp_path: Path) -> None:
    """Also where it is named for a part of the model; a plain model is in tests/patching/test_remote_code.py."""
    backend = {"text_config": "dilated"}
    model_class("llava").from_config(tiny_config("llava"), attn_implementation=backend).save_pretrained(tmp_path)
    program = (
        "import transformers; assert not hasattr(transformers.PreTrainedConfig, 'hf_dilated');"
        f"transformers.{model_class('llava').__name__}.from_pretrained({str(tmp_path)!r})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert 'attn_implementation="dilated"` is not supported' in result.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dilated", "expected a dictionary, got str"),
        ({"version": 2}, "version 2, this hf_dilated reads version 1; upgrade"),
        ({"attn_implementation": "ring_of_fire"}, "no backend 'ring_of_fire'"),
        ({"attn_implementation": 1}, "expected a name, got 1"),
        ({"dilated": {"segment_lengths": [8]}}, "missing dilation_rates"),
        ({"dilated": {"segment_lengths": [8], "dilation_rates": [0]}}, "dilation_rates: expected at least 1"),
        ({"dilated": PATTERN.to_dict(), "blocks": 3}, "unknown 'blocks'"),
        ({"original": 3}, "original: expected a dictionary, got 3"),
        ({"segment_lengths": [8], "dilation_rates": [1], "rate": 3}, "unknown 'rate'"),
        ({"overlap": "count"}, "missing segment_lengths, dilation_rates"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_set(tmp_path: Path, value: Any, message: str) -> None:
    config = llama(hf_dilated=PATTERN.to_dict())
    with pytest.raises(ConfigError, match=message):
        config.hf_dilated = value
    assert stored_config(config) == STORED
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {"hf_dilated": value}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=message):
        tf.AutoConfig.from_pretrained(tmp_path)


def test_a_dictionary_changed_in_place_is_checked_before_it_is_used() -> None:
    config = llama(hf_dilated=PATTERN.to_dict())
    config.hf_dilated["dilated"]["overlap"] = "twice"
    with pytest.raises(ConfigError, match="overlap: expected one of 'once', 'count'"):
        stored_config(config)
    with pytest.raises(ConfigError, match="overlap: expected one of 'once', 'count'"):
        config.to_dict()
