"""A pool in use by several threads, by destructors and signal handlers in the middle of a request, and after a fork."""

import faulthandler
import gc
import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_dilated.memory import MemoryPool

MIB = 1 << 20


def live(pool: MemoryPool) -> int:
    return pool.stats()["bytes_live"]


def test_eight_threads(pool: MemoryPool) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        kept: list[Tensor] = []
        for _ in range(150):
            size = int(torch.randint(1, 1 << 14, (1,), generator=generator))
            kept.append(pool.empty((size,), torch.int32).fill_(number))
            if len(kept) > 4:
                wrong.append(int((kept.pop(size % 5) != number).sum()))

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert sum(wrong) == 0
    assert len(wrong) == 8 * 146
    gc.collect()
    assert live(pool) == 0


def test_a_destructor_may_allocate(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run anything anywhere, also while the pool holds its lock."""
    take, found = pool._store.take, []

    def take_with_a_collection(size: int, **options: bool) -> object:
        found.append(pool.empty((1000,)))
        return take(size, **options)

    monkeypatch.setattr(pool._store, "take", take_with_a_collection)
    assert pool.empty((5,)).shape == (5,)
    assert found[0].shape == (1000,)
    assert pool.stats()["misses"] == 1


def call_within_take(pool: MemoryPool, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> object:
    """Call while the pool holds its lock, as finalizers and signal handlers may be; fail if that never ends."""
    take, results = pool._store.take, []

    def interrupted(size: int, **options: bool) -> object:
        results.append(call())
        return take(size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pool._store, "take", interrupted)
        thread = threading.Thread(target=lambda: pool.empty((500,)), daemon=True)
        thread.start()
        thread.join(20)
    assert not thread.is_alive(), "deadlock"
    return results[0]


def test_a_destructor_may_ask_for_figures(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pool.empty((1000,))
    figures = call_within_take(pool, pool.stats, monkeypatch)
    assert figures.keys() == pool.stats().keys()
    assert (figures["misses"], figures["bytes_live"]) == (1, kept.nbytes)


def test_a_destructor_may_trim(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of an allocation nothing can be taken away; the next call does it."""
    pool.empty((MIB,))
    cached = pool.stats()["bytes_cached"]
    assert call_within_take(pool, pool.trim, monkeypatch) == 0
    assert pool.stats()["bytes_cached"] >= cached
    assert pool.trim() >= cached


@pytest.mark.parametrize("name", ["clear", "clear_counts"])
def test_a_destructor_may_clear(name: str, pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.empty((MIB,))
    call_within_take(pool, getattr(pool, name), monkeypatch)
    stats = pool.stats()
    assert stats["hits"] + stats["misses"] == 2
    getattr(pool, name)()
    assert pool.stats()["misses"] == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_a_signal_handler_may_use_the_pool(pool: MemoryPool) -> None:
    """It comes between any two steps, also between taking the lock and saying so."""
    calls: list[object] = []
    actions = [pool.stats, pool.trim, pool.clear, lambda: pool.empty((700,)).fill_(1)]

    def handler(*_: object) -> None:
        calls.append(actions[len(calls) % len(actions)]())
        signal.setitimer(signal.ITIMER_REAL, 2e-4)

    before = signal.signal(signal.SIGALRM, handler)
    faulthandler.dump_traceback_later(60, exit=True)  # a deadlock would never end
    signal.setitimer(signal.ITIMER_REAL, 2e-4)
    try:
        kept: list[Tensor] = []
        while len(calls) < 1000:
            kept = [*kept[-7:], pool.empty((1000,), torch.int32).fill_(len(calls))]
            pool.stats()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    calls.clear()
    assert live(pool) == sum(tensor.nbytes for tensor in kept)
    kept.clear()
    assert live(pool) == 0


def test_a_failing_store_leaves_the_pool_usable(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pool._store, "take", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            pool.empty((1000,))
    assert pool.empty((1000,)).shape == (1000,)
    assert live(pool) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_on_its_own(pool: MemoryPool) -> None:
    tensor = pool.empty((MIB,), torch.int32).fill_(1)
    pool.empty((MIB,))
    pool._lock.acquire()  # as another thread may at the moment of the fork
    child = os.fork()
    if child == 0:
        try:
            good = live(pool) == 0 and pool.stats()["bytes_cached"] == 0
            mine = pool.empty((MIB,), torch.int32).fill_(2)
            tensor.fill_(3)
            good &= bool((mine == 2).all())
            del mine
            good &= pool.stats()["bytes_cached"] == 4 * MIB
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    pool._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tensor == 1).all()
    assert live(pool) == 4 * MIB
