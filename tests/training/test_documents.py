"""Streams of documents from files at hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from hf_dilated.training import documents
from hf_dilated.training.documents import stream_texts, tokenized
from hf_dilated.training.packing import PackedRows
from tests.tiny_checkpoint import tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "b/c.txt", "d.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"first line of {name}\n\nsecond line\n")
    return tmp_path


def texts(source: Path, **options: str) -> list[str]:
    return [example["text"] for example in stream_texts(str(source), **options)]


def test_every_file_of_a_folder_is_a_document(folder: Path) -> None:
    found = texts(folder, files="**/*.txt")
    assert found == [f"first line of {name}\n\nsecond line\n" for name in ("a.txt", "b/c.txt")]
    assert len(texts(folder)) == 3
    assert texts(folder / "d.md") == ["first line of d.md\n\nsecond line\n"]


def test_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(3)))
    assert texts(tmp_path) == ["0", "1", "2"]


def test_what_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'\*\.rst' finds no file"):
        stream_texts(str(folder), files="*.rst")
    (folder / "e.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"files of several kinds \(json, text\)"):
        stream_texts(str(folder))
    with pytest.raises(ValueError, match="column: 'body' is not one of text"):
        next(tokenized(stream_texts(str(folder / "a.txt")), tokenizer(), column="body")(0))
    (folder / "f.jsonl").write_text('{"text": null}\n')
    with pytest.raises(ValueError, match="column: 'text' holds NoneType, not text"):
        next(tokenized(stream_texts(str(folder / "f.jsonl")), tokenizer())(0))


def test_documents_begin_and_end_as_the_tokenizer_says_and_every_epoch_has_its_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"x = {n}"}) + "\n" for n in range(30)))
    tokens = tokenizer()
    epoch = tokenized(stream_texts(str(tmp_path)), tokens, seed=1)
    first, again, second = (list(epoch(number)) for number in (0, 0, 1))
    assert first == again != second
    assert sorted(first) == sorted(second) == sorted([0, *tokens.encode(f"x = {n}")[1:], 0] for n in range(30))


@pytest.mark.parametrize(("room", "calls"), [(1 << 20, [5, 0, 0]), (140, [5, 3, 3]), (0, [5, 5, 5])])
def test_what_there_is_room_for_is_tokenised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, calls: list[int]
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"xyz{n}"}) + "\n" for n in range(5)))
    tokens, read = tokenizer(), list[str]()
    encode = type(tokens).__call__

    def spied(self: Any, text: str, **options: Any) -> Any:
        read.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokens), "__call__", spied)
    monkeypatch.setattr(documents, "REMEMBERED_TOKENS", room)  # five tokens a text
    epoch = tokenized(stream_texts(str(tmp_path)), tokens, seed=1)
    seen = []
    for number, expected in enumerate(calls):
        read.clear()
        seen.append(sorted(epoch(number)))
        assert len(read) == expected
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0]) == 5


def test_a_worker_of_a_data_loader_reads_in_the_same_order(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"x = {number}\n" * 5)
    rows = PackedRows(tokenized(stream_texts(str(tmp_path)), tokenizer(), seed=1), length=16, rows=8)
    here, there = ([row["input_ids"].tolist() for row in DataLoader(rows, None, num_workers=n)] for n in (0, 1))
    assert here == there
