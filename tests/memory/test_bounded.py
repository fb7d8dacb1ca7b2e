"""What is remembered stays within its bytes."""

import queue
import threading
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_dilated.engine import op
from hf_dilated.engine.plan import make_plan
from hf_dilated.memory.bounded import BoundedCache, nbytes_of
from hf_dilated.patterns import DensePattern
from hf_dilated.patterns.documents import Documents


@dataclass(eq=False)
class Result:
    """Grows when it is used."""

    table: np.ndarray
    on_device: dict[str, torch.Tensor] = field(default_factory=dict)


def test_what_was_used_last_stays() -> None:
    calls: list[int] = []

    def make(number: int) -> Result:
        calls.append(number)
        return Result(np.zeros(100, np.uint8))

    cache = BoundedCache(make, limit=350, most=9)
    for number in (0, 1, 2, 0, 3, 0, 1):
        cache(number)
    assert calls == [0, 1, 2, 3, 1]
    assert cache.nbytes == 300


def test_entries_are_counted_and_grow() -> None:
    cache = BoundedCache(lambda number: Result(np.zeros(100, np.uint8)), limit=350, most=2)
    cache(0).on_device["cpu"] = torch.zeros(300, dtype=torch.uint8)
    cache(1)
    assert cache.nbytes == 100, "the first one has become too large beside it"
    for number in range(5):
        cache(number)
    assert cache.nbytes == 200


def test_what_does_not_grow_is_measured_once() -> None:
    cache = BoundedCache(lambda number: Result(np.zeros(100, np.uint8)), limit=350, most=9, grows=False)
    cache(0).on_device["cpu"] = torch.zeros(300, dtype=torch.uint8)
    cache(1)
    assert cache.nbytes == 200


def test_one_entry_may_be_larger_than_the_limit() -> None:
    cache = BoundedCache(lambda number: np.zeros(1000), limit=1, most=9)
    assert cache(0) is cache(0)
    cache.cache_clear()
    assert cache.nbytes == 0


def test_shared_arrays_count_once() -> None:
    array = np.zeros(10)
    tensor = torch.from_numpy(array)
    assert nbytes_of([array, array[1:], (array[5:],), None, "text", 3]) == 80
    assert nbytes_of({"a": Result(array, {"x": tensor, "y": tensor[1:]})}) == 80
    assert nbytes_of((array, torch.zeros(10))) == 120


def test_threads() -> None:
    cache = BoundedCache(lambda number: np.full(100, number), limit=2000, most=9)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(number for number in [*range(20)] * 20 if (cache(number) != number).any())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert cache.nbytes <= 2000


def test_all_entries_are_measured_again() -> None:
    cache = BoundedCache(lambda number: Result(np.zeros(100, np.uint8)), limit=10**6, most=99)
    first = cache(0)
    cache(1)
    first.on_device["cpu"] = torch.zeros(300, dtype=torch.uint8)
    cache(2)
    assert cache.nbytes == 600, "not only the newest may have grown"
    for number in range(40):
        cache(number)
    first.on_device.clear()
    for number in range(40, 50):
        cache(number)
    assert cache.nbytes == 5000, "of many entries all are measured now and then"


def test_arguments_count_once_and_are_let_go() -> None:
    def problem() -> Result:
        return Result(np.zeros(100, np.uint8))

    cache = BoundedCache(lambda problem, number: np.zeros(10, np.uint8), limit=350, most=99)
    problems = [problem() for _ in range(5)]
    dropped = weakref.ref(problems[0])
    for number in range(5):
        cache(problems[0], number)
    assert cache.nbytes == 150
    for each in problems[1:]:
        cache(each, 0)
    assert cache.nbytes == 330
    del problems
    assert dropped() is None
    text = BoundedCache(lambda content: None, limit=350, most=99)
    for number in range(5):
        text(bytes([number] * 100))
    assert text.nbytes == 300


def test_the_first_of_two_threads_gives_the_result() -> None:
    started, may_end = threading.Barrier(2), [threading.Event(), threading.Event()]

    def make(number: int) -> list[int]:
        if number == 0:
            turn = started.wait(10)
            may_end[turn].wait(10)
        return [number]

    cache = BoundedCache(make, limit=1, most=2)
    found: queue.Queue[list[int]] = queue.Queue()
    threads = [threading.Thread(target=lambda: found.put(cache(0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    may_end[0].set()
    first = found.get(timeout=10)
    cache(1)
    may_end[1].set()
    for thread in threads:
        thread.join(10)
    assert found.get(timeout=10) is first
    cache(2)
    assert cache(0) is first, "the second has used it, too, later than 1"


def test_plans_and_layouts_are_bounded() -> None:
    make_plan.cache_clear()
    for length in range(300, 310):
        make_plan(DensePattern(window=5), Documents.whole_rows(1, length, length), 2, 1, True, False)
    assert 10_000 < make_plan.nbytes <= make_plan.limit
    assert make_plan.most >= 10
    assert op._layout.limit <= make_plan.limit
