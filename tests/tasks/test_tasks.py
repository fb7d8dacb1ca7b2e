"""Tasks: their exact length, where the needle lies, and that the answer follows from the text alone."""

import re
from collections import Counter
from random import Random

import pytest

from hf_dilated.tasks import TASKS, Haystack, lesson
from hf_dilated.tasks.suite import COMMON, HOPS, NEEDLES
from tests.tiny_checkpoint import TEXT, tokenizer


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(tokenizer(), TEXT)


def decoded(haystack: Haystack, tokens: list[int]) -> str:
    return haystack.tokenizer.decode(tokens)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [400, 1023])
def test_prompt_and_answer_have_the_length(haystack: Haystack, task: str, length: int) -> None:
    sample = TASKS[task](haystack, length, Random(3), 0.5)
    assert sample.task == task
    assert len(sample.prompt) + len(sample.completion) == length
    assert sample.score(decoded(haystack, sample.completion)) == 1
    assert sample.score("something else") == 0


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_the_seed_alone(haystack: Haystack, task: str) -> None:
    first, again, other = (TASKS[task](haystack, 500, Random(seed), 0.5) for seed in (1, 1, 2))
    assert first == again
    assert first.prompt != other.prompt


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_pass_key_lies_where_it_should(haystack: Haystack, depth: float) -> None:
    sample = TASKS["passkey"](haystack, 2000, Random(0), depth)
    text = decoded(haystack, sample.prompt)
    (key,) = sample.answers
    assert len(re.findall(rf"pass key is {key}\.", text)) == 2
    assert text.endswith("The pass key is")
    found = len(haystack.encode(text[: text.index("The pass key is")]))
    assert found == pytest.approx(depth * 2000, abs=100)  # a line, the needle and the question


def test_one_of_several_needles(haystack: Haystack) -> None:
    sample = TASKS["needles"](haystack, 1000, Random(0), 0.5)
    facts = dict(re.findall(r"The magic number of (\w+) is (\d+)\.", decoded(haystack, sample.prompt)))
    assert len(facts) == NEEDLES
    (asked,) = re.findall(r"What is the magic number of (\w+)\?", decoded(haystack, sample.prompt))
    assert sample.answers == (facts[asked],)


def test_a_chain_of_variables(haystack: Haystack) -> None:
    sample = TASKS["variables"](haystack, 1000, Random(0))
    text = decoded(haystack, sample.prompt)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        values[name] = values.get(source, source)
    (value,) = re.findall(r"have the value (\d+)\?", text)
    assert len(sample.answers) == HOPS + 1
    assert {name for name, found in values.items() if found == value} == set(sample.answers)


def test_the_most_common_words(haystack: Haystack) -> None:
    sample = TASKS["common_words"](haystack, 4000, Random(0))
    words = Counter(re.findall(r" (\w+)", decoded(haystack, sample.prompt).partition("\n")[0]))
    assert {word for word, _ in words.most_common(COMMON)} == set(sample.answers)
    assert words.most_common(COMMON)[-1][1] > 3 * words.most_common(COMMON + 1)[-1][1]


FACT = re.compile(r"The magic number of (\w+) is (\d+)\.|The (pass key) is (\d+)\. Remember")
QUESTION = re.compile(r"What is the (?:magic number of )?(\w+(?: key)?)\? The [\w ]+ is (\d+)\.")


def test_lessons_can_be_known_from_what_came_before(haystack: Haystack) -> None:
    asked: Counter[str] = Counter()
    for seed in range(20):
        tokens = lesson(haystack, 1500, Random(seed))
        assert len(tokens) == 1500
        text = decoded(haystack, tokens)
        for question in QUESTION.finditer(text):
            told = [tuple(filter(None, fact.groups())) for fact in FACT.finditer(text[: question.start()])]
            assert question.groups() in told
            asked[question[1]] += 1
    assert sum(asked.values()) > 60
    assert asked["pass key"] > 15


def test_the_last_question_is_as_likely_far_from_its_fact_as_near(haystack: Haystack) -> None:
    shares: list[float] = []
    for seed in range(60):
        text = decoded(haystack, lesson(haystack, 3000, Random(seed)))
        last = {question[1]: question.start() for question in QUESTION.finditer(text)}
        told = {fact[1] or fact[3]: fact.start() for fact in reversed([*FACT.finditer(text)])}  # not in answers
        if len(last) > 1:  # many facts, not one task
            shares += [(last[name] - told[name]) / len(text) for name in last]
    assert len(shares) > 300
    assert [sum(share < cut for share in shares) / len(shares) for cut in (0.25, 0.5, 0.75)] == pytest.approx(
        [0.25, 0.5, 0.75], abs=0.06
    )


def test_lessons_have_any_length(haystack: Haystack) -> None:
    lengths = [256, 257, 300, 2048, 5000]
    assert [len(lesson(haystack, length, Random(length))) for length in lengths] == lengths


def test_needles_that_do_not_fit(haystack: Haystack) -> None:
    with pytest.raises(ValueError, match="tokens: .* too few for needles of"):
        TASKS["passkey"](haystack, 30, Random(0), 0.5)
    with pytest.raises(ValueError, match="too few for the words"):
        TASKS["common_words"](haystack, 10, Random(0))
    with pytest.raises(ValueError, match="text: expected at least one line"):
        Haystack(tokenizer(), " \n")


def test_needles_of_one_place_keep_their_order(haystack: Haystack) -> None:
    tokens = haystack.around([(0.5, [1, 2]), (0.5, [3]), (0.0, [4])], 100, Random(0))
    assert len(tokens) == 100
    assert tokens[0] == 4
    place = tokens.index(3)
    assert tokens[place - 2 : place + 1] == [1, 2, 3]
