"""The quickstart, on a tiny model with 32 positions that reads 256 tokens."""

import importlib
import json
import math

import pytest
import torch
import typer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

quickstart = importlib.import_module("quickstart")
train_base = importlib.import_module("train_base")

LENGTH = 256


def source(name):
    return "".join(f"def {name}_{i}(a, b):\n    return a + {i} * b\n\n" for i in range(60))


@pytest.fixture(scope="module")
def library():
    return {path: source(path[:-3]) for path in (f"module_{i}.py" for i in range(30))}


@pytest.fixture(scope="module")
def model(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    settings = train_base.Settings(steps=30, rows=8, length=32, learning_rate=1e-2, vocabulary=320, hidden=64, layers=2)
    train_base.run(library, folder, settings, device="cpu", library="tests")
    return folder


@pytest.fixture(autouse=True)
def _small_library(library, monkeypatch):
    monkeypatch.setattr(quickstart, "read_library", lambda: library)


def run(model, output, **options):
    defaults = {
        "text": None, "device": "cpu", "max_length": LENGTH, "documents": 2, "learn_steps": 6, "learning_rate": 1e-3,
    }  # fmt: skip
    quickstart.main(model=str(model), output=output, **{**defaults, **options})
    return json.loads((output / "report.json").read_text())


def test_the_whole_of_it(model, library, tmp_path, capsys):
    report = run(model, tmp_path)
    assert report["documents"] == [path for path in library if train_base.is_held_out(path)][:2]
    assert report["pattern"]["segment_lengths"] == [32, 64, 128, 256]
    perplexities = report["perplexities"]
    assert list(perplexities) == [
        "dense, windows of 32",
        "dense, RoPE as trained",
        "dilated, RoPE as trained",
        "dense, YaRN",
        "dilated, YaRN",
        "dilated, YaRN, after 6 steps",
    ]
    for row in perplexities.values():
        assert [(b["start"], b["stop"]) for b in row] == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256)]
        assert all(1 < b["perplexity"] < math.inf for b in row)
    for way in ("RoPE as trained", "YaRN"):  # short documents are dense; long ones are not
        dense, dilated = perplexities[f"dense, {way}"], perplexities[f"dilated, {way}"]
        assert dilated[0]["perplexity"] == pytest.approx(dense[0]["perplexity"], rel=1e-4)
        assert dilated[-1]["perplexity"] != pytest.approx(dense[-1]["perplexity"], rel=1e-4)
    before, after = perplexities["dilated, YaRN"], perplexities["dilated, YaRN, after 6 steps"]
    assert after[-1]["perplexity"] < before[-1]["perplexity"]
    assert len(report["learning_losses"]) == 6
    assert [(c["attention"], c["tokens"]) for c in report["costs"]] == [
        (name, tokens) for tokens in (32, 64, 128, 256) for name in ("dense", "dilated")
    ]
    assert report["continuation"]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "| dilated, YaRN, after 6 steps |" in (tmp_path / "report.md").read_text()
    assert "perplexity at position" in capsys.readouterr().out


def test_lessons_are_never_held_out(model, library):
    task = quickstart.Task(model=str(model), max_length=LENGTH, device="cpu", learn_steps=100, learning_rate=1e-3)
    tokenizer = quickstart.AutoTokenizer.from_pretrained(model)
    lessons = quickstart.documents_to_learn_from(tokenizer, task)
    kept = [text for path, text in library.items() if not train_base.is_held_out(path)]
    assert sorted(map(tuple, lessons)) == sorted(
        tuple(quickstart.encode(tokenizer, text, LENGTH, "cpu")) for text in kept
    )


def test_a_text_of_ones_own_within_the_trained_length(model, tmp_path):
    text = tmp_path / "own.py"
    text.write_text(source("own"))
    report = run(model, tmp_path / "out", text=text, max_length=32, learn_steps=0)
    assert report["documents"] == ["own.py"]
    dense, dilated = (report["perplexities"][f"{name}, RoPE as trained"] for name in ("dense", "dilated"))
    assert list(report["perplexities"]) == ["dense, RoPE as trained", "dilated, RoPE as trained"]
    assert dilated[0]["perplexity"] == pytest.approx(dense[0]["perplexity"], rel=1e-4)


def test_short_texts_are_refused(model, tmp_path):
    text = tmp_path / "short.py"
    text.write_text("x = 1\n")
    with pytest.raises(typer.BadParameter, match=r"short.py has \d+ tokens, fewer than --max-length 256"):
        run(model, tmp_path, text=text)
    with pytest.raises(typer.BadParameter, match="no held-out file of the standard library has 65,536 tokens"):
        run(model, tmp_path, max_length=65536)


def test_learned_positions_are_refused(tmp_path, model):
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    quickstart.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(typer.BadParameter, match="gpt2 has learned positions for 64 tokens"):
        run(tmp_path / "gpt2", tmp_path)


def test_positions_that_are_stretched_already_stay_as_they_are():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    assert quickstart.stretches(config, 128) == {"RoPE as trained": None}
    assert quickstart.stretches(LlamaConfig(max_position_embeddings=128), 128) == {"RoPE as trained": None}
    yarn = quickstart.stretches(LlamaConfig(max_position_embeddings=32), 128)["YaRN"]
    assert (yarn["rope_type"], yarn["factor"], yarn["original_max_position_embeddings"]) == ("yarn", 4.0, 32)


def test_the_model_gets_the_positions_that_were_asked_for(model):
    task = quickstart.Task(model=str(model), max_length=LENGTH, device="cpu", learn_steps=0, learning_rate=0.0)
    ways = quickstart.stretches(quickstart.AutoConfig.from_pretrained(model), LENGTH)
    plain, yarn = (quickstart.load(task, rope) for rope in ways.values())
    assert plain.config._attn_implementation == "dilated"
    assert plain.model.rotary_emb.rope_type == "default"
    assert yarn.model.rotary_emb.rope_type == "yarn"
    assert not torch.allclose(plain.model.rotary_emb.inv_freq, yarn.model.rotary_emb.inv_freq)


def test_bucket_edges_double():
    assert quickstart.position_edges(2048, 16384) == [0, 1024, 2048, 4096, 8192, 16384]
    assert quickstart.position_edges(2048, 5000) == [0, 1024, 2048, 4096, 5000]
    assert quickstart.position_edges(32768, 1024) == [0, 512, 1024]
