"""Times are taken in turns, and peak memory is that of the call alone."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hf_dilated import timing


def test_interleaving_is_complete_and_repeatable() -> None:
    def orders() -> list[str]:
        seen: list[str] = []
        calls = {name: (lambda name=name: seen.append(name)) for name in "abcd"}
        seconds = timing.interleave(calls, dict.fromkeys("abcd", 1), "cpu", rounds=6)
        assert [len(x) for x in seconds.values()] == [6] * 4
        return seen

    first = orders()
    assert first == orders()
    rounds = [first[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(x) == list("abcd") for x in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_the_device_that_is_meant_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    for name in ("cpu", "cuda:1"):
        with timing.on_device(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_peak_memory_on_the_cpu() -> None:
    extra = timing.peak_memory_cpu(prepare_allocation, 64)
    assert extra is not None
    assert 60 << 20 < extra < 80 << 20


def prepare_allocation(mebibytes: int) -> object:
    def call() -> Tensor:
        torch.ones(mebibytes << 18)
        return torch.ones(1 << 20)

    return call
