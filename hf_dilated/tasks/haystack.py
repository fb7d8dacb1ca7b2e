"""Text in which needles are hidden."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any

Needle = tuple[float, list[int]]


class Haystack:
    """The lines of a text, tokenised one by one, so that needles fit between them and lengths are exact.

    Args:
        tokenizer: A tokenizer of Transformers.
        text: At least one line that is not empty; it starts anew where it is too short.

    Raises:
        ValueError: If the text is empty.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        lines = [line for line in text.splitlines(keepends=True) if line.strip()]
        if not lines:
            raise ValueError("text: expected at least one line that is not empty")
        self.lines = self.encode_each(lines)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text`` alone."""
        return self.encode_each([text])[0]

    def encode_each(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of every text alone."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def around(self, needles: Sequence[Needle], tokens: int, random: Random) -> list[int]:
        """Return exactly ``tokens`` tokens of text, from a random line on, with needles between its lines.

        Args:
            needles: Depth, from 0 to 1, and tokens of each. Those of the same depth keep their order.
            tokens: Length of text and needles.

        Raises:
            ValueError: If the needles alone are longer.
        """
        room = tokens - sum(len(needle) for _, needle in needles)
        if room < 0:
            raise ValueError(f"tokens: {tokens} are too few for needles of {tokens - room}; choose a greater length")
        lines = self._take(room, random)
        starts = [0, *accumulate(map(len, lines))]
        before: list[list[int]] = [[] for _ in starts]
        for depth, needle in needles:
            before[_nearest(starts, depth * room)] += needle
        return [token for parts in zip(before, [*lines, []], strict=True) for part in parts for token in part]

    def _take(self, tokens: int, random: Random) -> list[list[int]]:
        line = random.randrange(len(self.lines))
        taken: list[list[int]] = []
        while tokens > 0:
            taken.append(self.lines[line][:tokens])
            tokens -= len(taken[-1])
            line = (line + 1) % len(self.lines)
        return taken


def _nearest(ascending: list[int], value: float) -> int:
    right = min(bisect_left(ascending, value), len(ascending) - 1)
    left = max(right - 1, 0)
    return right if ascending[right] - value <= value - ascending[left] else left
