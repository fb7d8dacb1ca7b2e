"""Packed rows against a plain reading of the same documents."""

from collections.abc import Iterable
from itertools import chain, cycle, islice
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_dilated.training.curriculum import LengthCurriculum
from hf_dilated.training.packing import IGNORED, PackedRows
from tests.tiny_checkpoint import TEXT, tokenizer

LESSON = 10_000  # a token that no document has


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different."""
    numbers = iter(range(10_000))
    return [list(islice(numbers, length)) for length in lengths]


def documents_of(row: dict[str, torch.Tensor]) -> list[list[int]]:
    starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["input_ids"])]
    return [row["input_ids"][a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    length=st.integers(2, 50),
    rows=st.integers(1, 7),
    longest=st.integers(2, 60),
)
def test_every_token_once_and_in_order(lengths: list[int], length: int, rows: int, longest: int) -> None:
    documents = numbered(lengths)
    whole = set(chain.from_iterable(zip(part, part[1:], strict=False) for part in documents))
    packed = list(
        PackedRows(lambda epoch: documents, length=length, rows=rows, curriculum=LengthCurriculum(((longest, 1.0),)))
    )
    assert len(packed) == rows
    tokens = chain.from_iterable(row["input_ids"].tolist() for row in packed)
    assert list(tokens) == list(islice(cycle(chain.from_iterable(documents)), rows * length))
    for row in packed:
        parts = documents_of(row)
        assert sum(map(len, parts)) == len(row["input_ids"]) == length
        assert max(map(len, parts)) <= longest
        assert row["position_ids"].tolist() == [position for part in parts for position in range(len(part))]
        for part in parts:
            assert whole.issuperset(zip(part, part[1:], strict=False))
        assert torch.equal(row["labels"] == IGNORED, row["position_ids"] == 0)
        kept = row["labels"] != IGNORED
        assert torch.equal(row["labels"][kept], row["input_ids"][kept])


def test_a_cut_is_never_where_none_is_needed() -> None:
    (row,) = PackedRows(lambda epoch: numbered([3, 4, 2]), length=9, rows=1)
    assert list(map(len, documents_of(row))) == [3, 4, 2]


def test_each_epoch_is_asked_for() -> None:
    asked: list[int] = []

    def documents(epoch: int) -> Iterable[list[int]]:
        asked.append(epoch)
        return [[epoch] * 4]

    rows = list(PackedRows(documents, length=4, rows=3))
    assert [row["input_ids"][0].item() for row in rows] == asked == [0, 1, 2]


def test_the_curriculum_lengthens_documents() -> None:
    curriculum = LengthCurriculum.parse("8:0.5,32:0.25,64:0.25")
    rows = list(PackedRows(lambda epoch: numbered([1000]), length=64, rows=8, curriculum=curriculum))
    assert [max(map(len, documents_of(row))) for row in rows] == [8, 8, 8, 8, 32, 32, 64, 64]


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_lessons_have_their_share_and_the_length_of_the_stage(share: float) -> None:
    def lesson(tokens: int, random: Random) -> list[int]:
        return [LESSON] * tokens

    curriculum = LengthCurriculum.parse("512:0.5,4096:0.5")
    options = {"length": 4096, "rows": 40, "curriculum": curriculum, "lesson": lesson, "lesson_share": share}
    rows = list(PackedRows(lambda epoch: numbered([700, 900]), **options))
    tokens = torch.cat([row["input_ids"] for row in rows])
    assert (tokens == LESSON).float().mean().item() == pytest.approx(share, abs=0.03)
    lessons = [[len(part) for part in documents_of(row) if part[0] == LESSON] for row in rows]
    assert 256 <= max(chain(*lessons[:20])) <= 512 < max(chain(*lessons[20:])) <= 4096
    again = list(PackedRows(lambda epoch: numbered([700, 900]), **options))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="not a single token"):
        list(PackedRows(lambda epoch: [[]], length=4, rows=1))
    with pytest.raises(ValueError, match="lesson_share: there is no lesson"):
        PackedRows(lambda epoch: [[1]], length=4, rows=1, lesson_share=0.1)
    with pytest.raises(ValueError, match="lesson_share: expected a share"):
        PackedRows(lambda epoch: [[1]], length=4, rows=1, lesson_share=1.0)


def test_several_workers_are_refused() -> None:
    rows = PackedRows(lambda epoch: [[1, 2]], length=4, rows=4)
    with pytest.raises(ValueError, match="2 workers would each read everything"):
        next(iter(DataLoader(rows, batch_size=2, num_workers=2)))


def test_a_worker_that_is_forked_does_not_wait_for_threads_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokens = tokenizer()
    expected = tokens([TEXT] * 64).input_ids[0]
    rows = PackedRows(lambda epoch: tokens([TEXT] * 64).input_ids, length=len(expected), rows=1)
    (row,) = DataLoader(rows, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert row["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("text", ["", "2048", "2048:0.5,a:0.5", "2048:0.5", "1:1.0", "8:1.5,16:-0.5"])
def test_malformed_curricula(text: str) -> None:
    with pytest.raises(ValueError, match="curriculum: "):
        LengthCurriculum.parse(text)
