"""Cards: what they say is what the checkpoint holds and what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from huggingface_hub import ModelCard
from typer.testing import CliRunner, Result

from hf_dilated import ConfigError, DilatedConfig, patch_checkpoint
from hf_dilated.cards import CardError, Training, make_card, write_card
from hf_dilated.cli import app
from hf_dilated.evaluation.plots import save_plots
from hf_dilated.evaluation.report import Report
from tests.tiny_models import GROUPED, model_class, tiny_config

PATTERN = DilatedConfig(segment_lengths=(64, 128), dilation_rates=(1, 2), sink_tokens=2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "plain")
    patch_checkpoint(tmp_path / "plain", tmp_path / "long", attention=PATTERN, max_position_embeddings=1024)
    return tmp_path / "long"


def measured(attention: dict[str, Any]) -> Report:
    spans = [(0, 256), (256, 1024)]
    return Report(
        model="long",
        attention=attention,
        documents={"a.txt": 1024},
        plan={},
        environment={"device": "an abacus", "dtype": "float32"},
        perplexity=[
            {"attention": name, "start": start, "stop": stop, "tokens": 9, "perplexity": value + start}
            for name, value in (("dense", 7.0), ("dilated", 7.125))
            for start, stop in spans
        ],
        retrieval=[
            {"attention": "dilated", "task": "passkey", "tokens": 1024, "depth": depth, "score": score}
            for depth, score in ((0.0, 1.0), (0.5, 0.5))
        ],
    )


@pytest.fixture
def evaluation(checkpoint: Path, tmp_path: Path) -> Path:
    report = measured(tf.AutoConfig.from_pretrained(checkpoint).hf_dilated)
    report.save(tmp_path / "measured" / "report.json")
    save_plots(report, tmp_path / "measured")
    return tmp_path / "measured" / "report.json"


@pytest.fixture
def training(tmp_path: Path) -> Path:
    values = {
        "command": "python scripts/train_long_context.py --model plain",
        "data": "my/texts",
        "recipe": {"tokens": 13107200, "learning rate": 2e-4},
        "hardware": "1 × abacus",
        "seconds": 140.4,
        "results": {"loss at the end": 1.39},
    }
    (tmp_path / "training.json").write_text(json.dumps(values))
    return tmp_path / "training.json"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["card", *map(str, arguments)], env={"COLUMNS": "200"})


def test_everything_that_is_known(checkpoint: Path, evaluation: Path, training: Path) -> None:
    result = run(
        checkpoint, "--evaluation", evaluation, "--training", training, "--name", "me/long", "--base-model", "me/plain",
        "--license", "apache-2.0", "--language", "en", "--limit", "It counts badly.",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "hf upload me/long" in result.stdout
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.to_dict() | {"model-index": None} == {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "me/plain",
        "tags": ["hf_dilated", "dilated", "long-context"],
        "model-index": None,
    }
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {
        "perplexity at 256–1k, dense": 263.0,
        "perplexity at 256–1k, dilated": 263.125,
        "found in 1k tokens, dilated": 0.75,
    }
    text = card.text
    assert "# long\n" in text
    assert 'model = AutoModelForCausalLM.from_pretrained("me/long")' in text
    stored = json.loads(text.partition("```json")[2].partition("```")[0])
    assert DilatedConfig.from_dict(stored) == PATTERN
    for line in (
        "- attention layers: 2 pattern",
        "- exactly dense attention up to 66 tokens",
        '"rope_type": "yarn"',
        "- the original reads 256 tokens",
        "- data: my/texts\n- tokens: 13,107,200\n- learning rate: 0.0002\n- hardware: 1 × abacus\n- time: 140 s",
        "- `python scripts/train_long_context.py --model plain`",
        "| dilated | 7.12 | 263.12 |",
        "with `dense`, `dilated`, on device an abacus, dtype float32. Texts: a.txt (1,024 tokens).",
        "Every share of what was found is the mean of 2 samples.",
        "![perplexity](perplexity.png)",
        "- Measured up to 1,024 tokens, on these texts only.",
        "- It counts badly.",
    ):
        assert line in text, line
    assert (checkpoint / "perplexity.png").read_bytes() == (evaluation.parent / "perplexity.png").read_bytes()
    assert (checkpoint / "retrieval.png").is_file()


def test_nothing_is_made_up(checkpoint: Path) -> None:
    write_card(checkpoint)
    text = (checkpoint / "README.md").read_text()
    assert "## Training" not in text
    assert "## Evaluation" not in text
    assert "what that costs was not measured." in text
    assert not {"{{", "{%", "None"} & set(text.split())
    with pytest.raises(CardError, match="exists already"):
        write_card(checkpoint)


def test_code_is_promised_only_where_it_lies(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).save_pretrained(plain)
    patch_checkpoint(plain, tmp_path / "long", attention=PATTERN, remote_code=True)
    promise = "`trust_remote_code=True` replaces import and installation"
    assert promise in make_card(tmp_path / "long").text
    values = json.loads((tmp_path / "long" / "config.json").read_text())
    theirs = values | {"auto_map": {"AutoModelForCausalLM": "theirs.TheirModel"}}
    (tmp_path / "long" / "config.json").write_text(json.dumps(theirs))
    assert promise not in make_card(tmp_path / "long").text
    (tmp_path / "long" / "config.json").write_text(json.dumps(values))
    (tmp_path / "long" / "hf_dilated_code.py").unlink()
    assert promise not in make_card(tmp_path / "long").text


def test_dynamic_positions_reach_further_than_their_formula_says(checkpoint: Path, tmp_path: Path) -> None:
    options = {"max_position_embeddings": 1024, "rope_scaling": "dynamic"}
    patch_checkpoint(tmp_path / "plain", tmp_path / "dynamic", **options)
    assert "reading up to 1,024 tokens" in make_card(tmp_path / "dynamic").text


def test_a_vision_language_model(tmp_path: Path) -> None:
    model_class("llava").from_config(tiny_config("llava")).save_pretrained(tmp_path / "plain")
    patch_checkpoint(tmp_path / "plain", tmp_path / "long", attention=PATTERN)
    card = make_card(tmp_path / "long")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert 'model = AutoModelForImageTextToText.from_pretrained("long")' in card.text


@pytest.mark.parametrize("how", ["dense", "other pattern", "no report", "no json", "unknown key"])
def test_refusals(checkpoint: Path, evaluation: Path, training: Path, how: str) -> None:
    folder, message = checkpoint, ""
    match how:
        case "dense":
            folder, message = checkpoint.parent / "plain", "holds no backend of hf_dilated; patch it first"
        case "other pattern":
            measured({"version": 1, "attn_implementation": "dilated"}).save(evaluation)
            message = "measured another pattern than the checkpoint holds"
        case "no report":
            evaluation.write_text('{"model": "long"}')
            message = "is no report of `hf-dilated evaluate`"
        case "no json":
            training.write_text("steps: 3")
            message = "training.json: expected JSON"
        case "unknown key":
            training.write_text('{"stepz": 3}')
            message = "unknown stepz; known are command, data"
    result = run(folder, "--evaluation", evaluation, "--training", training)
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")
    assert not (folder / "README.md").exists()


def test_training_must_be_a_dictionary(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a dictionary, got list"):
        Training.load(tmp_path / "training.json")
