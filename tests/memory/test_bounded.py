"""What is remembered stays within its bytes."""

import threading
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


def test_plans_and_layouts_are_bounded() -> None:
    make_plan.cache_clear()
    for length in range(300, 310):
        make_plan(DensePattern(window=5), Documents.whole_rows(1, length, length), 2, 1, True, False)
    assert 10_000 < make_plan.nbytes <= make_plan.limit
    assert make_plan.most >= 10
    assert op._layout.limit <= make_plan.limit
