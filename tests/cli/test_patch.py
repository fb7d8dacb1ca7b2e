"""`hf-dilated patch` and `unpatch`."""

import json
from pathlib import Path

import pytest
import transformers as tf
from typer.testing import CliRunner, Result

from hf_dilated import DilatedConfig
from hf_dilated.cli import app
from tests.tiny_models import GROUPED

PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    result = run("patch", checkpoint, tmp_path / "long", "--length", 1024, "--rope-scaling", "linear", "--copy")
    assert result.exit_code == 0, result.output
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "long"}")' in result.stdout
    assert tf.AutoConfig.from_pretrained(tmp_path / "long").rope_parameters["factor"] == 4.0
    assert run("unpatch", tmp_path / "long", tmp_path / "back").exit_code == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


@pytest.mark.parametrize("as_file", [True, False])
def test_a_pattern_and_parameters_as_json(checkpoint: Path, tmp_path: Path, as_file: bool) -> None:
    pattern, rope = json.dumps(PATTERN.to_dict()), '{"rope_type": "linear", "factor": 3.0}'
    if as_file:
        (tmp_path / "pattern.json").write_text(pattern)
        (tmp_path / "rope.json").write_text(rope)
        pattern, rope = str(tmp_path / "pattern.json"), str(tmp_path / "rope.json")
    options = ("--attention", pattern, "--length", "512", "--rope-scaling", rope, "--remote-code")
    assert run("patch", checkpoint, tmp_path / "long", *options).exit_code == 0
    config = tf.AutoConfig.from_pretrained(tmp_path / "long")
    assert config.hf_dilated["dilated"] == PATTERN.to_dict()
    assert config.rope_parameters["factor"] == 3.0
    assert config.auto_map["AutoModelForCausalLM"] == "modeling_hf_dilated.LlamaForCausalLM"


def test_a_dry_run_as_json(checkpoint: Path, tmp_path: Path) -> None:
    result = run("patch", checkpoint, tmp_path / "long", "--length", 1024, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["layers"] == {"pattern": 2}
    assert plan["max_position_embeddings"] == plan["longest_input"] == 1024
    assert not (tmp_path / "long").exists()


def test_the_plan_of_dynamic_positions_says_how_far_they_reach(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--length", 1024, "--rope-scaling", "dynamic", "--dry-run", "--json")
    plan = json.loads(run("patch", checkpoint, tmp_path / "long", *options).stdout)
    assert (plan["max_position_embeddings"], plan["longest_input"]) == (256, 1024)


def test_json_says_what_was_done(checkpoint: Path, tmp_path: Path) -> None:
    result = run("patch", checkpoint, tmp_path / "long", "--json")
    assert json.loads(result.stdout)["destination"] == str(tmp_path / "long")
    assert (tmp_path / "long" / "config.json").exists()
    (tmp_path / "file").touch()
    result = run("patch", checkpoint, tmp_path / "file" / "long", "--json")
    assert result.exit_code == 1
    assert not result.stdout
    assert "cannot be made" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("patch", "{plain}", "{plain}"), "exists already"),
        (("patch", "{plain}", "{new}", "--attention", "{{"), "expected JSON"),
        (("patch", "{plain}", "{new}", "--rope-scaling", "none.json", "--length", "512"), "expected JSON"),
        (("patch", "{plain}", "{new}", "--length", "8"), "already reads 256 tokens"),
        (("unpatch", "{plain}", "{new}"), "nothing to take out"),
    ],
)
def test_refusals(checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*(argument.format(plain=checkpoint, new=tmp_path / "new") for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert set(tmp_path.iterdir()) == {checkpoint}
