"""The training script: what it reads, what it never reads, and that documents stay apart."""

import importlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

train_base = importlib.import_module("train_base")

TINY = train_base.Settings(
    steps=40, rows=4, length=32, learning_rate=1e-2, vocabulary=300, hidden=32, layers=2, held_out_rows=2
)
TEXT = "def add(a, b):\n    return a + b\n\n"


@pytest.fixture(scope="module")
def texts():
    paths = [f"module_{i}.py" for i in range(40)]
    return {path: TEXT * 6 + f"# {path}\n" for path in paths}


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    train_base.run(texts, folder, TINY, device="cpu", library="a few lines")
    return folder


def summary_of(folder):
    return json.loads((folder / "training.jsonl").read_text().splitlines()[-1])["summary"]


def test_a_file_is_held_out_by_its_path_for_good():
    held_out = [
        path for path in ("ast.py", "doctest.py", "pickletools.py", "typing.py") if train_base.is_held_out(path)
    ]
    assert held_out == ["ast.py", "doctest.py", "pickletools.py"]


def test_the_library_is_read_without_other_projects_and_tables(tmp_path):
    for path in ("b.py", "a/c.py", "site-packages/d.py", "encodings/e.py", "_sysconfigdata_x.py", "f.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x = 1\n")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "latin.py").write_bytes("# ä\n".encode("latin-1"))
    assert train_base.read_library(tmp_path) == {"a/c.py": "x = 1\n", "b.py": "x = 1\n"}


def test_packing_starts_positions_with_every_document_and_row():
    documents = [torch.arange(10, 15), torch.arange(20, 23), torch.arange(30, 39)]
    tokens, positions = train_base.pack(documents, 8)
    assert tokens.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    _, positions = train_base.pack([torch.arange(6), torch.arange(10)], 8)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_an_epoch_reads_every_document_once_and_the_next_in_another_order():
    settings = train_base.Settings(length=8, rows=2, steps=8, lesson_share=0.0)
    documents = [torch.full((8,), i) for i in range(8)]

    def epochs():
        rows = train_base.packed_rows(documents, None, settings)
        read = torch.cat([batch["input_ids"][:, 0] for batch in train_base.in_batches(rows, settings, "cpu")]).tolist()
        return read[:8], read[8:]

    first, second = epochs()
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert epochs() == (first, second)


def test_lessons_are_a_part_of_what_is_read(texts):
    settings = train_base.Settings(length=512, rows=2, steps=10, vocabulary=300, lesson_share=0.4)
    tokenizer = train_base.train_tokenizer(texts.values(), settings)
    rows = train_base.packed_rows(
        train_base.encode(tokenizer, texts.values()), train_base.haystack(tokenizer, texts), settings
    )
    read = tokenizer.batch_decode([row["input_ids"] for row in rows])
    assert len(read) == 20
    assert sum("is the" in row for row in read) > 5


def test_numbers_are_spelled_alike_everywhere(texts):
    tokenizer = train_base.train_tokenizer([*texts.values(), "12345 " * 50], TINY)
    alone, inside = (tokenizer(text, add_special_tokens=False).input_ids for text in ("12345", "= 12345."))
    assert len(alone) == 5
    assert inside[-6:-1] == alone


def test_losses_stay_inside_a_document():
    torch.manual_seed(0)
    model = train_base.build_model(TINY)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    documents = [torch.randint(300, (12,)), torch.randint(300, (20,))]
    losses = train_base.token_losses(model, *train_base.pack(documents, 32))
    assert losses.shape == (1, 31)
    assert losses[0, 11] == 0  # the first token of the second document
    other = train_base.token_losses(model, *train_base.pack([torch.randint(300, (12,)), documents[1]], 32))
    torch.testing.assert_close(losses[0, 12:], other[0, 12:])
    assert not torch.equal(losses[0, :11], other[0, :11])


def test_the_learning_rate_rises_and_falls():
    settings = train_base.Settings(steps=100, learning_rate=1.0)
    rates = [train_base.learning_rate(step, settings) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.01


def test_training_learns_and_writes_a_folder_that_loads(trained):
    *rows, last = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["held_out_loss"] < 0.5 * rows[0]["held_out_loss"]
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 32
    assert last["summary"]["parameters"] == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids[1:]) == TEXT


def test_held_out_files_change_nothing_that_is_learned(texts, trained, tmp_path):
    other = {path: "x\n" * 200 if train_base.is_held_out(path) else text for path, text in texts.items()}
    train_base.run(other, tmp_path / "tiny", TINY, device="cpu", library="a few lines")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "tiny" / name).read_bytes() == (trained / name).read_bytes()
    ours, others = summary_of(trained), summary_of(tmp_path / "tiny")
    assert ours["held_out_files"] == sum(map(train_base.is_held_out, texts)) > 0
    assert ours["held_out_loss"] != others["held_out_loss"]
    assert ours["text_sha256"] != others["text_sha256"]


def test_the_card_says_what_was_measured(trained, tmp_path):
    card, summary = (trained / "README.md").read_text(), summary_of(trained)
    assert "license: apache-2.0" in card
    assert "PSF licence" in card
    assert f"{summary['held_out_loss']:.3f} nats a token" in card
    assert f"{summary['bits_per_byte']:.3f} bits a byte" in card
    assert "- Lessons: 45 % of the training tokens are made documents" in card
    assert "is a trained skill: the lessons practise it." in card
    report = tmp_path / "report.md"
    report.write_text("## Long documents\n\nmeasured\n")
    train_base.write_card(trained, report)
    assert "## Long documents\n\nmeasured\n\n## Limits" in (trained / "README.md").read_text()


def test_the_card_of_a_model_without_lessons_does_not_mention_them(trained, tmp_path):
    *rows, last = (trained / "training.jsonl").read_text().splitlines()
    summary = {name: value for name, value in json.loads(last)["summary"].items() if name != "lesson_share"}
    (tmp_path / "training.jsonl").write_text("\n".join([*rows, json.dumps({"summary": summary})]))
    train_base.write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "lesson" not in card.lower()
    assert "(`is_held_out`).\n- Documents are packed" in card
    assert "measures.\n- Knows the standard library" in card
