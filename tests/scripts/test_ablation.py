"""The ablation in small: variants are tuned, read before and after, priced, and taken up again where they were left."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.config.presets import Preset
from tests.tiny_checkpoint import TEXT, save_tiny_checkpoint

ablation = importlib.import_module("ablation")
variants = importlib.import_module("training.variants")

CHOSEN = ["dense", "window, a quarter of the heads dense"]


def run(folder: Path, chosen: list[str], **options: Any) -> Result:
    settings: dict[str, Any] = {"output": folder / "out", "model": folder / "model", "device": "cpu"}
    settings |= {"max-length": 256, "trained": 64, "steps": 2, "rows": 1, "documents": 1, "repeats": 1} | options
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    app = typer.Typer()
    app.command()(ablation.main)
    return CliRunner().invoke(app, [*words, *(word for name in chosen for word in ("--only", name))])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablation, "read_library", lambda sources: {f"{n}.py": TEXT for n in range(30)})
    monkeypatch.setattr(ablation, "DEPTHS", (0.5,))
    monkeypatch.setattr("training.cost.QUERIES", 4)
    monkeypatch.setattr("training.cost.WARM_UP", 0)
    monkeypatch.setattr("training.cost.REPEATS", 1)
    save_tiny_checkpoint(tmp_path / "model")
    return tmp_path


def test_variants_are_tuned_and_measured(folder: Path) -> None:
    result = run(folder, CHOSEN)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (folder / "out" / "ablation.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == CHOSEN
    for row, own in zip(rows, ("dense", "block_sparse"), strict=True):
        assert [entry["loss"] > 0 for entry in row["log"]] == [True, True]
        assert {found["attention"] for found in row["before"]["retrieval"]} == {own}
        assert {found["attention"] for found in row["after"]["retrieval"]} == {own, "dense"}
        assert row["before"]["perplexity"][-1]["stop"] == 256
        assert row["cost"]["seconds"] > 0
        assert (row["cost"]["operations"]["attention"] < row["cost"]["operations"]["dense attention"]) == (
            own != "dense"
        )
    assert rows[0]["before"]["perplexity"] != rows[0]["after"]["perplexity"]
    lines = (folder / "out" / "ablation.md").read_text().splitlines()
    assert len(lines) == 2 + (2 + 2) + (1 + 2)
    assert [line.count("| +0.0% |") for line in lines if line.startswith("| dense | after | dense |")] == [1]


def test_out_of_time_and_on_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is stopped after its first step ends as one that was never stopped."""
    deadline = importlib.import_module("training.deadline")
    for step, part in (("price", "cost"), ("look_before", "before"), ("look_after", "after")):
        monkeypatch.setattr(ablation.Trial, step, lambda trial, part=part: ablation.save(trial.part(part), {}))
    monkeypatch.setattr(ablation, "write", lambda trials, output: None)
    whole = run(folder, ["dilated"])
    assert whole.exit_code == 0, whole.output
    (folder / "out").rename(folder / "whole")
    for asked_before_the_end in (4, 1):  # at the start and before "log", its third step; at the start alone
        with pytest.MonkeyPatch.context() as patch:
            times = iter([0.0] * asked_before_the_end)
            patch.setattr(deadline, "monotonic", lambda times=times: next(times, 1e9))
            result = run(folder, ["dilated"], minutes=1)
        assert result.exit_code == deadline.EXIT_CODE, result.output
        assert "stopped after 1 minutes; the same command goes on" in result.output
        assert [path.name for path in (folder / "out" / "dilated" / "training").iterdir()] == ["checkpoint-1"]
    result = run(folder, ["dilated"], minutes=60)
    assert result.exit_code == 0, result.output
    ends = [(folder / out / "dilated" / "model" / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore:8 attention heads")
def test_every_variant_is_a_pattern_of_its_own() -> None:
    config = AutoConfig.from_pretrained(ablation.SHIPPED)
    known = variants.variants(config, 32768)
    classes = {"dilated": DilatedConfig, "block_sparse": BlockSparseConfig}
    assert len({classes[variant.backend].from_dict(variant.pattern) for variant in known.values()}) == len(known)
    assert known["window, first and last layer dense"].pattern["dense_layers"] == [0, 4]
    assert next(iter(known)) == ablation.DENSE
    assert list(variants.variants(config, 2 * config.max_position_embeddings)) == list(known)


@pytest.mark.filterwarnings("ignore:8 attention heads")
def test_variants_do_not_follow_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(ablation.SHIPPED)
    before = variants.variants(config, 32768)
    for name, options in (("dilated.DILATED", {"sink_tokens": 4}), ("block_sparse.BLOCK_SPARSE", {"topk_blocks": 8})):
        monkeypatch.setattr(f"hf_dilated.config.{name}", Preset(dense_every=5, options=options))
    assert variants.variants(config, 32768) == before


def test_unknown_names_are_refused(folder: Path) -> None:
    result = run(folder, ["magic"])
    assert result.exit_code == 2
    assert "known are dense; window" in result.output.replace("\n", " ").replace("│", "").replace("  ", " ")


@pytest.fixture
def unmeasured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is trained: every part is made up."""
    parts: dict[str, dict[str, Any]] = {
        "cost": {"operations": {"attention": 1, "dense attention": 1}, "seconds": 1, "dense_seconds": 1},
        "log": {"training_seconds": 1, "log": []},
    }
    report = {"perplexity": [{"attention": "dense", "perplexity": 1.0}], "short": [], "retrieval": []}
    for step, part in (("price", "cost"), ("look_before", "before"), ("tune", "log"), ("look_after", "after")):
        made = parts.get(part, report)
        monkeypatch.setattr(
            ablation.Trial, step, lambda trial, part=part, made=made: ablation.save(trial.part(part), made)
        )
    return folder


def steps_by_variant(folder: Path) -> dict[str, int]:
    rows = map(json.loads, (folder / "out" / "ablation.jsonl").read_text().splitlines())
    return {row["variant"]: row["setting"]["steps"] for row in rows}


def test_other_settings_than_those_of_another_variant_are_refused(unmeasured: Path) -> None:
    assert run(unmeasured, ["dense"]).exit_code == 0
    before = {path: path.read_bytes() for path in (unmeasured / "out").rglob("*") if path.is_file()}
    result = run(unmeasured, ["dilated"], steps=3)
    assert result.exit_code == 1
    assert "error: cost: steps was 2 and is 3; remove" in result.output
    assert {path: path.read_bytes() for path in (unmeasured / "out").rglob("*") if path.is_file()} == before
    assert run(unmeasured, ["dilated"]).exit_code == 0
    assert steps_by_variant(unmeasured) == {"dense": 2, "dilated": 2}


def test_rows_are_of_what_is_finished_with_the_settings_that_it_was_made_with(unmeasured: Path) -> None:
    assert run(unmeasured, ["dense", "dilated"]).exit_code == 0
    output = unmeasured / "out"
    options = json.loads((output / "dense" / "steps" / "log.json").read_text())["options"]
    variant = variants.Variant(backend="dilated", pattern=options.pop("pattern"))
    shared = {"variant": variant, "setting": ablation.Setting(**options | {"steps": 900}), "output": output}
    shared |= {"sources": None, "deadline": None}
    trials = [ablation.Trial(name=name, **shared) for name in ("dense", "dilated")]
    (output / "dilated" / "steps" / "after.json").unlink()  # as behind a step that was taken again
    ablation.write(trials, output)
    assert steps_by_variant(unmeasured) == {"dense": 2}


def test_several_gpus_are_refused(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    result = run(unmeasured, ["dense"])
    assert result.exit_code == 1
    assert "error: device: several GPUs are visible and one is used" in result.output
    assert not (unmeasured / "out").exists()
