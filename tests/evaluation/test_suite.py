"""The whole evaluation on a tiny model: what is measured with which attention, and what is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_dilated import DilatedConfig
from hf_dilated.evaluation.perplexity import perplexity_by_position, read, read_in_windows
from hf_dilated.evaluation.plots import save_plots
from hf_dilated.evaluation.report import Report
from hf_dilated.evaluation.suite import Evaluation, attention, evaluate, steps
from hf_dilated.integration.reach import trained_length
from hf_dilated.patching import patch_model
from hf_dilated.tasks import Haystack
from tests.tiny_checkpoint import TEXT, save_tiny_checkpoint, tokenizer

PATTERN = DilatedConfig(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
PLAN = Evaluation(max_length=256, trained_length=64, tasks=("passkey",), depths=(0.0, 1.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return patch_model(model, attention=PATTERN, max_position_embeddings=256)


@pytest.fixture(scope="module")
def documents() -> dict[str, torch.Tensor]:
    tokens = tokenizer()(TEXT * 2, return_tensors="pt", verbose=False).input_ids[0]
    return {"long": tokens[:300], "short": tokens[300:450]}


@pytest.fixture(scope="module")
def report(model: Any, documents: dict[str, torch.Tensor]) -> Report:
    done: list[str] = []
    found = evaluate(model, tokenizer(), documents, Haystack(tokenizer(), TEXT), PLAN, done.append)
    assert len(done) == len(set(done)) == steps(PLAN)
    return found


def rows(report: Report, part: str, name: str) -> list[dict[str, Any]]:
    return [row for row in report.rows(part) if row["attention"] == name]


def test_perplexity_by_position_of_each_attention(model: Any, documents: Any, report: Report) -> None:
    edges = [0, 32, 64, 128, 256]
    readers = {"dense": read, "dilated": read, "dense, windows of 64": lambda m, text: read_in_windows(m, text, 64)}
    found = {}
    for name, reader in readers.items():
        with attention(model, name.partition(",")[0]):
            losses = [reader(model, text[:256]).losses for text in documents.values()]
        found[name] = [row["perplexity"] for row in rows(report, "perplexity", name)]
        assert found[name] == pytest.approx([b.perplexity for b in perplexity_by_position(losses, edges)])
    assert found["dense"][:2] == pytest.approx(found["dilated"][:2])
    assert found["dense"][3] != pytest.approx(found["dilated"][3])
    assert report.documents == {"long": 256, "short": 150}


def test_short_texts_are_read_as_the_dense_model_does(report: Report) -> None:
    dense, dilated = rows(report, "short", "dense"), rows(report, "short", "dilated")
    assert dense[0]["tokens"] == 4 * 63 + 2 * 63 + 21
    assert dense[0]["perplexity"] == pytest.approx(dilated[0]["perplexity"])


def test_every_sample_and_every_length(report: Report) -> None:
    for name in ("dense", "dilated"):
        retrieval = rows(report, "retrieval", name)
        assert len(retrieval) == 3 * 2
        assert all(0 <= row["score"] <= 1 for row in retrieval)
        costs = rows(report, "cost", name)
        assert [row["tokens"] for row in costs] == PLAN.lengths == [64, 128, 256]
        assert all(row["read_seconds"] > 0 and row["seconds_per_token"] > 0 for row in costs)


def test_the_attention_is_put_back(model: Any) -> None:
    with attention(model, "dense"):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "dilated"


def test_json_tables_and_pictures(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").tables() == report.tables()
    perplexity, retrieval, short, cost = report.tables()
    assert perplexity.header == ["attention", "0–32", "32–64", "64–128", "128–256"]
    assert [line[0] for line in perplexity.rows] == ["dense", "dilated", "dense, windows of 64"]
    assert [line[:2] for line in retrieval.rows] == [["passkey", "dense"], ["passkey", "dilated"]]
    assert short.rows[1][2] in ("+0.00%", "-0.00%")
    assert len(cost.rows) == 6
    assert report.markdown().count("| --- |") == 4
    paths = save_plots(report, tmp_path / "plots")
    assert [path.name for path in paths] == ["perplexity.png", "retrieval.png", "cost.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_trained_length_is_read_from_the_positions(model: Any) -> None:
    assert model.config.max_position_embeddings == 256
    assert trained_length(model.config) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("speed",)}, "parts: unknown speed"),
        ({"tasks": ("chess",)}, "tasks: unknown chess"),
        ({"attentions": ()}, "attentions: name at least one"),
        ({"max_length": 1}, "max_length: expected at least 2"),
    ],
)
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**{"max_length": 256, "trained_length": 64} | options)
