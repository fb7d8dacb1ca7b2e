"""A question about a long text, and its answers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt in tokens, and what a model should write after it.

    Attributes:
        task: Name of the task.
        prompt: Tokens, without those that a tokenizer puts around every text.
        answers: Strings that the continuation should contain.
        completion: The continuation in tokens, as a model is taught it.
        depth: Where the needle lies, from 0 (the beginning) to 1; None where the answer is spread out.
    """

    task: str
    prompt: list[int]
    answers: tuple[str, ...]
    completion: list[int]
    depth: float | None = None

    def score(self, continuation: str) -> float:
        """Return the share of the answers that ``continuation`` contains.

        Example:
            >>> sample = Sample(task="variables", prompt=[], answers=("AB", "CD"), completion=[])
            >>> sample.score(" AB, CE")
            0.5
        """
        return sum(answer in continuation for answer in self.answers) / len(self.answers)
