"""From a short model to a long one, in small: every step, going on where it was stopped, what the card says."""

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

script = importlib.import_module("make_long_context")
PATTERN = '{"segment_lengths": [128, 256], "dilation_rates": [1, 2], "sink_tokens": 2}'


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number in range(20):
        (folder / f"module_{number}.py").write_text("".join(f"x_{number} = {n} + y\n" for n in range(40)))
    return folder


def command_line(output: Path, sources: Path, *extra: str, **options: Any) -> list[str]:
    settings: dict[str, Any] = {"output": output, "sources": sources, "device": "cpu", "length": 256, "steps": 2}
    settings |= {"rows": 1, "documents": 1, "task": "passkey", "repeats": 1, "base-steps": 2, "base-length": 128}
    settings |= {"pattern": PATTERN, "name": "me/tiny-long"} | options
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*words, *extra, "--", "--disable_tqdm", "true"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr("sys.argv", ["make_long_context.py", *arguments])
    return CliRunner().invoke(script.app, arguments, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long") / "out"


@pytest.fixture(scope="module")
def runs(output: Path, sources: Path) -> list[Result]:
    """A run that is stopped in the evaluation, and the same command again."""
    arguments = command_line(output, sources, "--train-base")
    small = partial(script.train_base.Settings, rows=4, held_out_rows=4, vocabulary=300, hidden=64, layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.train_base, "Settings", small)

        def full(*arguments: Any, **options: Any) -> None:
            raise OSError("no space left")

        patch.setattr(script, "measure", full)
        stopped = run(arguments, patch)
    with pytest.MonkeyPatch.context() as patch:
        return [stopped, run(arguments, patch)]


def test_the_same_command_goes_on(runs: list[Result], output: Path) -> None:
    stopped, again = runs
    assert stopped.exit_code == 1
    assert "error: no space left" in stopped.output
    assert "finished before" not in stopped.output
    assert again.exit_code == 0, again.output
    for number, name in enumerate(("base", "texts", "patch", "tune", "store"), 1):
        assert f"== {number} of 7: {name}: finished before" in again.output
    assert "== 6 of 7: evaluate\n" in again.output
    assert f"{output / 'tiny-long'} is ready" in again.output


def test_the_folder_can_be_published(runs: list[Result], output: Path) -> None:
    folder = output / "tiny-long"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "report.json", "perplexity.png"}
    assert not {name for name in names if name.startswith(("checkpoint", "optimizer", "training_args"))}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "dilated"
    assert model.config.max_position_embeddings == 256
    assert model.config.use_cache
    assert model.dtype == torch.bfloat16
    short = AutoModelForCausalLM.from_pretrained(output / "patched")
    assert not torch.equal(model.model.embed_tokens.weight, short.model.embed_tokens.weight)
    tuned = AutoModelForCausalLM.from_pretrained(output / "tuned", dtype=torch.bfloat16)
    assert torch.equal(model.model.embed_tokens.weight, tuned.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 256


def test_the_card_says_what_was_measured(runs: list[Result], output: Path) -> None:
    card = ModelCard.load(output / "tiny-long" / "README.md")
    report = json.loads((output / "tiny-long" / "report.json").read_text())
    state = json.loads((output / "tuned" / "trainer_state.json").read_text())
    assert card.data.license == "apache-2.0"
    last = {row["attention"]: row["perplexity"] for row in report["perplexity"] if row["stop"] == 256}
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for name in ("dense", "dilated"):
        assert found[f"perplexity at 128–256, {name}"] == pytest.approx(last[name], abs=1e-4)
    assert last["dense"] != last["dilated"]
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    for line in (
        "The same weights with `dense`, `dilated`, `dense, windows of 128`, on device",
        "- started from: a model that this command trained for 2 steps at 128 tokens, 45% of them in made documents",
        "- tokens: 512\n",
        f"- training loss, mean of the last 1 steps: {losses[-1]:.4f}".rstrip("0"),
        "files of sources",
        "Every share of what was found is the mean of 5 samples.",
        "30% of the training tokens were made documents",
        "45% of the short model's training tokens were made documents",
        "`python scripts/make_long_context.py --output",
        "![perplexity](perplexity.png)",
    ):
        assert line in card.text, line


def test_what_is_read_was_never_trained_on(runs: list[Result], output: Path, sources: Path) -> None:
    texts = {
        kind: "".join(path.read_text() for path in (output / "texts" / kind).iterdir())
        for kind in ("training", "held-out")
    }
    assert all(texts.values())
    for path in sources.iterdir():
        assert path.read_text() not in texts["training" if script.train_base.is_held_out(path.name) else "held-out"]


def test_out_of_time(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(command_line(tmp_path / "out", sources, minutes=0), monkeypatch)
    assert result.exit_code == 75
    assert "stopped after 0 minutes; the same command goes on" in result.output
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["texts.json"]  # a stamp of what was not done


def test_a_finished_folder_is_left_alone_and_other_options_are_refused(
    runs: list[Result], output: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = run(command_line(output, sources, "--train-base"), monkeypatch)
    assert again.output.count("finished before") == 7
    other = run(command_line(output, sources, "--train-base", steps=3), monkeypatch)
    assert other.exit_code == 1
    assert "tune: steps was 2 and is 3; remove" in other.output
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ((), {"length": 4096, "pattern": '{"segment_lengths": [128]}'}, "dilation_rates"),
        ((), {"length": 1024}, "error: max_position_embeddings: the model already reads 2,048 tokens"),
        (("stray",), {}, "error: Some specified arguments are not used"),
    ],
)
def test_bad_options(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], options: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    result = run(command_line(tmp_path / "out", sources, *extra, **options), monkeypatch)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not (tmp_path / "out" / "tuned").exists()


def test_several_gpus_are_refused(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    result = run(command_line(tmp_path / "out", sources), monkeypatch)
    assert result.exit_code == 1
    assert "error: device: several GPUs are visible and one is used" in result.output
    assert not (tmp_path / "out").exists()
