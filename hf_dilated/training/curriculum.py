"""Ever longer documents."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LengthCurriculum:
    """How long documents may be in each part of the training.

    Rows keep their length, so a step costs the same number of tokens throughout; only the longest document in them
    grows.

    Args:
        stages: Longest document in tokens, and share of the rows, of each stage in turn. The shares add up to 1.

    Raises:
        ValueError: If a stage is malformed or the shares do not add up to 1.

    Example:
        >>> curriculum = LengthCurriculum.parse("2048:0.25,32768:0.75")
        >>> [curriculum.longest_at(row, rows=8) for row in (0, 1, 2, 7)]
        [2048, 2048, 32768, 32768]
    """

    stages: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        if not self.stages or any(length < 2 or share <= 0 for length, share in self.stages):
            raise ValueError(
                f"curriculum: expected lengths of at least 2 tokens and positive shares, got {self.stages}"
            )
        if abs(sum(share for _, share in self.stages) - 1) > 1e-6:
            raise ValueError(f"curriculum: the shares add up to {sum(share for _, share in self.stages):g}, not to 1")

    @classmethod
    def parse(cls, text: str) -> "LengthCurriculum":
        """Read ``length:share,length:share,…``.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            pairs = [stage.split(":") for stage in text.split(",")]
            return cls(tuple((int(length), float(share)) for length, share in pairs))
        except ValueError as error:
            raise ValueError(f"curriculum: expected length:share,length:share,… got {text!r} ({error})") from error

    def longest_at(self, row: int, rows: int) -> int:
        """Return the longest document, in tokens, of this row out of ``rows``."""
        done = 0.0
        for length, share in self.stages:
            done += share
            if row < round(done * rows):
                return length
        return self.stages[-1][0]
