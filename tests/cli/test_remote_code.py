"""Commands on a checkpoint whose model is code of its own."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_dilated import DilatedConfig
from hf_dilated.cli import app
from modeling import LongNetConfig, LongNetForCausalLM
from tests.tiny_checkpoint import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LongNet under another name, because this process knows its own."""
    folder = tmp_path_factory.mktemp("own") / "model"
    tokens = tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    pattern = DilatedConfig(segment_lengths=(8, 32), dilation_rates=(1, 2))
    config = LongNetConfig(vocab_size=len(tokens), max_position_embeddings=32, hf_dilated=pattern, **sizes)
    LongNetForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "from_elsewhere"}))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"}, input="")


COMMANDS = {
    "info": (),
    "show": ("--length", 32),
    "card": (),
    "bench": ("--mode", "decode", "--rounds", 3, "--device", "cpu"),
    "evaluate": ("--text", __file__, "--output", "{tmp}/out", "--part", "short", "--max-length", 32, "--device", "cpu"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs_where_it_is_trusted_and_is_refused_elsewhere(folder: Path, tmp_path: Path, command: str) -> None:
    arguments = (command, folder, *(str(option).format(tmp=tmp_path) for option in COMMANDS[command]))
    untrusted = run(*arguments)
    assert untrusted.exit_code == (2 if command in ("info", "show") else 1), untrusted.output
    assert "Please pass --trust-remote-code" in " ".join(untrusted.output.split())
    assert "y/N" not in untrusted.output  # nobody is asked
    trusted = run(*arguments, "--trust-remote-code")
    assert trusted.exit_code == 0, trusted.output
    if command == "card":
        card = (folder / "README.md").read_text()
        assert 'AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)' in card
        assert "import hf_dilated" not in card
        assert "are in this repository" in card


def test_patching_does_not_run_it(folder: Path, tmp_path: Path) -> None:
    result = run("patch", folder, tmp_path / "new")
    assert result.exit_code == 1
    assert "code of its own, which patching does not run" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
