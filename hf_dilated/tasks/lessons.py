"""Documents that teach a model to look things up far away."""

from math import exp, log
from random import Random

from hf_dilated.tasks.haystack import Haystack
from hf_dilated.tasks.suite import TASKS, number, words

SHARE_OF_FACTS = 0.75  # of the lessons; the others are one task each
TOKENS_PER_MENTION = (48, 384)  # of the densest and of the sparsest facts
MOST_QUESTIONS = 3  # for one fact
ONE_TASK = ("passkey", "passkey", "needles", "variables", "common_words")  # the first twice as often


def lesson(haystack: Haystack, tokens: int, random: Random) -> list[int]:
    """Write a document of exactly ``tokens`` tokens whose later parts can be known from its earlier ones.

    Three quarters of the documents state many facts, a pass key among them, and ask for each of them one to three
    times, for the last time at a distance that is as likely long as short: almost every answer in them is a retrieval
    to learn from, and their density varies from document to document. The others end with one question of
    :data:`hf_dilated.tasks.TASKS`.

    Args:
        haystack: The text between.
        tokens: Length of the document; at least about 200.
        random: Chooses everything.

    Raises:
        ValueError: If ``tokens`` are too few.
    """
    if random.random() < SHARE_OF_FACTS:
        return _facts(haystack, tokens, random)
    sample = TASKS[random.choice(ONE_TASK)](haystack, tokens, random)
    return [*sample.prompt, *sample.completion]


def _facts(haystack: Haystack, tokens: int, random: Random) -> list[int]:
    """Facts at random places, each with its questions behind it."""
    densest, sparsest = map(log, TOKENS_PER_MENTION)
    mentions = max(2, int(tokens / exp(random.uniform(densest, sparsest))))
    questions: list[int] = []
    while (left := mentions - len(questions) - sum(questions)) > 1:
        questions.append(random.randint(1, min(MOST_QUESTIONS, left - 1)))
    depths: list[float] = []
    texts: list[str] = []
    for name, count in zip(["", *words(random, len(questions) - 1)], questions, strict=True):
        statement, question = _fact(name, number(random))
        distance = random.random()
        told = random.uniform(0, 1 - distance)
        asked = sorted(random.uniform(told, told + distance) for _ in range(count - 1))
        depths += [told, *asked, told + distance]
        texts += [statement, *[question] * count]
    return haystack.around(list(zip(depths, haystack.encode_each(texts), strict=True)), tokens, random)


def _fact(name: str, value: str) -> tuple[str, str]:
    """Return statement and question with its answer; the fact without a name is the pass key."""
    if not name:
        return (
            f"The pass key is {value}. Remember it: the pass key is {value}.\n",
            f"\nWhat is the pass key? The pass key is {value}.\n",
        )
    return (
        f"The magic number of {name} is {value}.\n",
        f"What is the magic number of {name}? The magic number of {name} is {value}.\n",
    )
