"""The adapter for lm-evaluation-harness, on tasks of our own: it reads its tasks from files, without a network."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_dilated.cli import app
from hf_dilated.evaluation.harness import DilatedLM
from tests.tiny_checkpoint import save_tiny_checkpoint, tokenizer

PATTERN = '{"segment_lengths": [16, 64], "dilation_rates": [1, 4]}'
CONTEXT = "def add(first, second):\n    return first + second\n\n\n" * 3 + "pass"
TASK = """
task: two_endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    lines = [{"text": CONTEXT + f"x = {n}", "choices": [" + 1", " - second"], "label": n % 2} for n in range(6)]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "two_endings.yaml").write_text(TASK.format(data=path / "data.jsonl"))
    return path


def loglikelihood(model: Any, context: str, ending: str) -> float:
    tokens = tokenizer()
    start = tokens(context).input_ids
    end = tokens(ending, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([start + end])).logits[0].float().log_softmax(-1)
    return sum(logits[len(start) - 1 + n, token].item() for n, token in enumerate(end))


@pytest.mark.parametrize("attention", ["dense", "dilated"])
def test_loglikelihoods_are_those_of_the_backend(folder: Path, attention: str) -> None:
    adapter = DilatedLM(str(folder), attention, PATTERN, device="cpu", batch_size=2)
    pairs = [(CONTEXT, " x"), (CONTEXT[:30], " first"), ("a", " b")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = [value for value, _ in adapter.loglikelihood(requests, disable_tqdm=True)]
    name = "sdpa" if attention == "dense" else attention
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name, hf_dilated=json.loads(PATTERN))
    assert found == pytest.approx([loglikelihood(model, *pair) for pair in pairs], rel=1e-4)
    other = AutoModelForCausalLM.from_pretrained(folder)
    if attention == "dilated":
        assert found[0] != pytest.approx(loglikelihood(other, *pairs[0]), rel=1e-3)


def test_the_harness_knows_the_model_by_its_name(folder: Path, tasks: Path) -> None:
    assert get_model("hf-dilated") is DilatedLM
    results = simple_evaluate(
        "hf-dilated",
        model_args={"pretrained": str(folder), "attention": "dilated", "pattern": json.loads(PATTERN), "device": "cpu"},
        tasks=["two_endings"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["two_endings"]["acc,none"] <= 1


def test_the_command(folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # thousands of files
    arguments = ["lm-eval", str(folder), "--tasks", "two_endings", "--include-path", str(tasks), "--limit", "4"]
    arguments += [
        "--attention",
        "dilated",
        "--pattern",
        PATTERN,
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "two_endings" in result.output
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["n-samples"]["two_endings"]["effective"] == 4
    refused = CliRunner().invoke(app, [*arguments[:-2], "--tasks", "no_such_task"])
    assert refused.exit_code == 1
    assert "refused" in refused.output
