"""Documents laid end to end in rows of one length, each a world of its own."""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from random import Random

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hf_dilated.training.curriculum import LengthCurriculum

IGNORED = -100
SHORTEST_LESSON = 256
WHOLE_LESSONS = 0.5  # of them

Documents = Callable[[int], Iterable[list[int]]]
Lesson = Callable[[int, Random], list[int]]


class PackedRows(IterableDataset[dict[str, Tensor]]):
    """A stream of rows for ``Trainer``, the same at every run.

    A row holds whole documents as far as they fit; what is longer than the rest of the row, or than the curriculum
    allows, is cut, and what is cut off goes on as a document of its own. Positions start at 0 with every document,
    which is how attention tells them apart, and its first token is no target.

    Args:
        documents: Returns the documents of an epoch in tokens, given its number from 0; called again at its end.
        length: Tokens in a row.
        rows: Rows of the whole training: the curriculum is laid over them, and the stream ends after them.
        curriculum: Longest document in each part of the training; None for ``length`` throughout.
        lesson: Makes a document of the given length; see :func:`hf_dilated.tasks.lesson`.
        lesson_share: Share of all tokens that lessons make.
        seed: Of lessons.

    Example:
        >>> rows = PackedRows(lambda epoch: [[5, 6, 7], [8, 9]], length=4, rows=2)
        >>> [row["input_ids"].tolist() for row in rows]
        [[5, 6, 7, 8], [9, 5, 6, 7]]
        >>> [row["position_ids"].tolist() for row in rows]
        [[0, 1, 2, 0], [0, 0, 1, 2]]
    """

    def __init__(
        self,
        documents: Documents,
        *,
        length: int,
        rows: int,
        curriculum: LengthCurriculum | None = None,
        lesson: Lesson | None = None,
        lesson_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= lesson_share < 1:
            raise ValueError(f"lesson_share: expected a share of at least 0 and below 1, got {lesson_share}")
        if lesson_share and lesson is None:
            raise ValueError("lesson_share: there is no lesson; pass lesson=… or a share of 0")
        self.documents = documents
        self.length = length
        self.rows = rows
        self.curriculum = curriculum or LengthCurriculum(((length, 1.0),))
        self.lesson = lesson
        self.lesson_share = lesson_share
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers: {worker.num_workers} workers would each read everything; set it to 0 or 1"
            )
        if worker is not None:  # the threads of a tokenizer are not there behind a fork
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        parts = _Parts(self)
        for row in range(self.rows):
            yield _row(parts.fill(min(self.length, self.curriculum.longest_at(row, self.rows))))


class _Parts:
    """Hands out texts and lessons, and remembers what was cut off."""

    def __init__(self, dataset: PackedRows) -> None:
        self.dataset = dataset
        self.random = Random(dataset.seed)
        self.texts = _without_end(dataset.documents)
        self.rest: list[int] = []
        self.taught = self.given = 0

    def fill(self, longest: int) -> list[list[int]]:
        """Return documents of at most ``longest`` tokens that fill one row."""
        parts: list[list[int]] = []
        room = self.dataset.length
        while room:
            parts.append(self._next(min(room, longest)))
            room -= len(parts[-1])
        return parts

    def _next(self, fits: int) -> list[int]:
        lesson = self.dataset.lesson
        if lesson and self.taught < self.dataset.lesson_share * (self.given + fits) and fits >= SHORTEST_LESSON:
            part = lesson(self._lesson_length(fits), self.random)
            self.taught += len(part)
        else:
            self.rest = self.rest or next(self.texts)
            part, self.rest = self.rest[:fits], self.rest[fits:]
        self.given += len(part)
        return part

    def _lesson_length(self, fits: int) -> int:
        """All that fits half of the time, so that what is far apart comes often enough; else any length."""
        if self.random.random() < WHOLE_LESSONS:
            return fits
        return self.random.randint(max(SHORTEST_LESSON, fits // 8), fits)


def _without_end(documents: Documents) -> Iterator[list[int]]:
    for epoch in count():
        empty = True
        for document in filter(None, documents(epoch)):
            empty = False
            yield document
        if empty:
            raise ValueError("documents: there is not a single token to train on")


def _row(parts: list[list[int]]) -> dict[str, Tensor]:
    tokens = torch.frombuffer(array("q", chain.from_iterable(parts)), dtype=torch.int64)
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return {"input_ids": tokens, "position_ids": positions, "labels": tokens.masked_fill(positions == 0, IGNORED)}
