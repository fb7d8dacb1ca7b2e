"""The tasks: a pass key, one of several needles, chains of variables, the most common words.

The last three follow RULER (arXiv:2404.06654), with words and numbers of our own.
"""

from collections.abc import Callable, Sequence
from random import Random

from hf_dilated.tasks.haystack import Haystack
from hf_dilated.tasks.sample import Sample

Task = Callable[..., Sample]
NEEDLES = 4
HOPS = 3
COMMON = 5
ROUND = 64  # rare words that are listed with as many common ones
SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ji", "ko", "lu", "me", "ni", "po", "ra", "su", "ti", "vo", "we", "zu")


def passkey(haystack: Haystack, tokens: int, random: Random, depth: float | None = None) -> Sample:
    """Hide a number of five digits once, and ask for it at the end.

    Args:
        haystack: The text to hide it in.
        tokens: Length of prompt and answer together.
        random: Chooses the number, the text and, without ``depth``, the place.
        depth: Where the number lies, from 0 to 1.

    Raises:
        ValueError: If ``tokens`` are too few.
    """
    key, depth = number(random), random.random() if depth is None else depth
    needle = haystack.encode(f"The pass key is {key}. Remember it: the pass key is {key}.\n")
    question = "\nWhat is the pass key? The pass key is"
    return _ask("passkey", haystack, tokens, random, [(depth, needle)], question, (key,), depth)


def needles(haystack: Haystack, tokens: int, random: Random, depth: float | None = None) -> Sample:
    """Hide the numbers of several words, and ask for that of one; arguments as for :func:`passkey`.

    The number asked for lies at ``depth``, the others anywhere.
    """
    depth = random.random() if depth is None else depth
    facts = {name: number(random) for name in words(random, NEEDLES)}
    asked = next(iter(facts))
    hidden = [
        (depth if name == asked else random.random(), haystack.encode(f"The magic number of {name} is {value}.\n"))
        for name, value in facts.items()
    ]
    question = f"\nWhat is the magic number of {asked}? The magic number of {asked} is"
    return _ask("needles", haystack, tokens, random, hidden, question, (facts[asked],), depth)


def variables(haystack: Haystack, tokens: int, random: Random, depth: float | None = None) -> Sample:
    """Hide a chain of assignments, and ask for every variable that has the first one's value.

    The chain is spread over the text, so a ``depth`` means nothing and is not looked at.
    """
    value, names = number(random), [name.upper() for name in words(random, HOPS + 1)]
    sources = [value, *(f"VAR {name}" for name in names)]
    places = sorted(random.random() for _ in names)
    chain = [haystack.encode(f"VAR {name} = {source}.\n") for name, source in zip(names, sources, strict=False)]
    question = f"\nWhich variables have the value {value}? They are"
    hidden = list(zip(places, chain, strict=True))
    return _ask("variables", haystack, tokens, random, hidden, question, tuple(names), None)


def common_words(haystack: Haystack, tokens: int, random: Random, depth: float | None = None) -> Sample:
    """List words, half of them a few common ones and the others rare, and ask for these few.

    The list is the whole text: of ``haystack`` only the tokenizer is used, and a ``depth`` is not looked at.
    """
    common = words(random, COMMON)
    start, question = haystack.encode("Words:"), haystack.encode("\nWhich words are the most common? They are")
    completion = haystack.encode(f" {', '.join(common)}.")
    room = tokens - len(start) - len(question) - len(completion)
    if room < 0:
        raise ValueError(f"tokens: {tokens} are too few for the words to ask for; choose a greater length")
    body: list[int] = []
    while len(body) < room:
        listed = [f" {word}" for word in (*words(random, ROUND, apart_from=common), *random.choices(common, k=ROUND))]
        random.shuffle(listed)
        body += [token for word in haystack.encode_each(listed) for token in word]
    prompt = [*start, *body[:room], *question]
    return Sample(task="common_words", prompt=prompt, answers=tuple(common), completion=completion)


TASKS: dict[str, Task] = {
    "passkey": passkey,
    "needles": needles,
    "variables": variables,
    "common_words": common_words,
}


def number(random: Random) -> str:
    """Return five digits, the first of them not zero."""
    return str(random.randrange(10_000, 100_000))


def words(random: Random, count: int, apart_from: Sequence[str] = ()) -> list[str]:
    """Return ``count`` different invented words, none of ``apart_from``."""
    found = dict.fromkeys(apart_from)
    while len(found) < count + len(apart_from):
        found["".join(random.choices(SYLLABLES, k=4))] = None
    return list(found)[len(apart_from) :]


def _ask(
    task: str,
    haystack: Haystack,
    tokens: int,
    random: Random,
    hidden: list[tuple[float, list[int]]],
    question: str,
    answers: tuple[str, ...],
    depth: float | None,
) -> Sample:
    asked, completion = haystack.encode(question), haystack.encode(f" {', '.join(answers)}.")
    prompt = haystack.around(hidden, tokens - len(asked) - len(completion), random) + asked
    return Sample(task=task, prompt=prompt, answers=answers, completion=completion, depth=depth)
