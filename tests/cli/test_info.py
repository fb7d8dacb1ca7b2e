"""The command `hf-dilated`, on configurations alone."""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import transformers as tf
from typer.testing import CliRunner, Result

import hf_dilated
from hf_dilated import DilatedConfig
from hf_dilated.cli import app
from tests.tiny_models import GROUPED, tiny_config


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def words(result: Result) -> list[str]:
    """Lines of the output with single spaces, without the frames of tables."""
    frames = str.maketrans("│┃", "  ")
    return [" ".join(line.translate(frames).split()) for line in result.output.splitlines()]


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="hf-dilated")
    assert command.load() is app


def test_version() -> None:
    assert run("--version").stdout == f"hf_dilated {hf_dilated.__version__}\n"


def test_info_on_a_stored_pattern(tmp_path: Path) -> None:
    config = tf.LlamaConfig(**GROUPED | {"num_hidden_layers": 6})
    config.hf_dilated = DilatedConfig(
        segment_lengths=(64, 128), dilation_rates=(1, 2), sink_tokens=4, dense_layers=(2, 3)
    )
    config.save_pretrained(tmp_path)
    result = run("info", tmp_path)
    assert result.exit_code == 0, result.output
    lines = words(result)
    assert "LlamaModel, 4 query heads, 2 key-value heads, attends causal" in lines
    assert "0-1, 4-5 layers.*.self_attn pattern attends to whole documents" in lines
    assert "2-3 layers.*.self_attn dense in dense_layers" in lines
    assert "memory of layers 0-5: disabled, 256 tokens, pooled from 4,096" in lines
    assert "pattern given or stored in config.json" in lines
    assert "mean keys per query at 132 tokens" in lines
    assert any(line.startswith("sinks 4 ") for line in lines)
    assert any(line.startswith("2 128 2 ") for line in lines)
    assert "up to 68 tokens every layer is exactly the dense model's" in lines
    report = json.loads(run("info", tmp_path, "--json").stdout)
    assert (report["backend"], report["dense_length"], report["pattern"]) == (
        "dilated",
        68,
        config.hf_dilated["dilated"],
    )
    assert [layer["runs"] for layer in report["layers"]] == ["pattern"] * 2 + ["dense"] * 2 + ["pattern"] * 2


def test_info_chooses_a_pattern(tmp_path: Path) -> None:
    tiny_config("gemma3").save_pretrained(tmp_path)
    lines = words(run("info", tmp_path))
    assert "0, 2 layers.*.self_attn windowed the model's own window of 6 tokens" in lines
    assert "1, 3 layers.*.self_attn pattern attends to whole documents" in lines
    assert "pattern chosen for max_position_embeddings" in lines
    longer = run("info", tmp_path, "--max-length", "4096")
    assert longer.exit_code == 0, longer.output
    assert "mean keys per query at 4,096 tokens" in words(longer)
    assert "note 4 attention heads allow dilation rates up to 4" in longer.output


def test_info_on_dense_attention_over_ranks(tmp_path: Path) -> None:
    tf.LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    result = run("info", tmp_path, "--backend", "ring")
    assert result.exit_code == 0, result.output
    assert "0-1 layers.*.self_attn pattern attends to whole documents" in words(result)
    assert "at any length every layer is exactly the dense model's" in words(result)
    assert json.loads(run("info", tmp_path, "--backend", "ring", "--json").stdout)["dense_length"] is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.BloomConfig(), "computes its attention itself"),
        (tf.DebertaConfig(), "computes its attention itself"),
        (tf.MPNetConfig(), "computes its attention itself"),
        (tiny_config("vit"), "max_length"),
        (tiny_config("gemma2"), "softcap=50.0"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_does_not_run_exits_with_1(tmp_path: Path, config: tf.PreTrainedConfig, reason: str) -> None:
    config.save_pretrained(tmp_path)
    result = run("info", tmp_path)
    assert result.exit_code == 1
    assert "refused" in result.output
    assert reason in result.output


def test_what_cannot_be_told_exits_with_2(tmp_path: Path) -> None:
    missing = run("info", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "no report" in missing.output
    tf.Wav2Vec2Config().save_pretrained(tmp_path)
    assert run("info", tmp_path).exit_code == 2


@pytest.mark.parametrize("command", ["info", "show", "memory", "evaluate", "card", "patch", "profile"])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "from_tomorrow"}, "from_tomorrow"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 3}, "hidden size"),
    ],
    ids=["unknown", "contradictory"],
)
def test_a_configuration_that_transformers_refuses(
    tmp_path: Path, command: str, values: dict[str, object], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "text.txt").write_text("Once upon a time.")
    more = {"evaluate": ("--text", tmp_path / "text.txt", "--output", tmp_path / "out"), "patch": (tmp_path / "out",)}
    more["profile"] = ("--lengths", "8", "--rounds", "3", "--heads", "1", "--head-dim", "8")
    result = run(command, tmp_path, *more.get(command, ()))
    assert result.exit_code == (2 if command in ("info", "show") else 1)
    assert isinstance(result.exception, SystemExit), result.exception
    assert reason in " ".join(result.output.split())


def test_help_without_arguments() -> None:
    assert "info" in run().output
