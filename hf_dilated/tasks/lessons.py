"""Documents that teach a model to look things up far away."""

from random import Random

from hf_dilated.tasks.haystack import Haystack
from hf_dilated.tasks.suite import TASKS, number, words

SHARE_OF_FACTS = 0.5  # of the lessons; the others are one task each
TOKENS_PER_FACT = 256
ONE_TASK = ("passkey", "passkey", "needles", "variables", "common_words")  # the first twice as often


def lesson(haystack: Haystack, tokens: int, random: Random) -> list[int]:
    """Write a document of exactly ``tokens`` tokens whose later parts can be known from its earlier ones.

    Half of the documents end with one question of :data:`hf_dilated.tasks.TASKS`. The others state many facts
    and ask for each of them once, at any distance: they teach more for their length.

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
    needles = []
    for name in words(random, max(1, tokens // TOKENS_PER_FACT)):
        value = number(random)
        told, asked = sorted((random.random(), random.random()))
        needles.append((told, haystack.encode(f"The magic number of {name} is {value}.\n")))
        question = f"What is the magic number of {name}? The magic number of {name} is {value}.\n"
        needles.append((asked, haystack.encode(question)))
    return haystack.around(needles, tokens, random)
