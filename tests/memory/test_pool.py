"""Memory returns with the last user of a storage; tensors that live never share a byte."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dilated.memory import MemoryPool
from hf_dilated.memory.pool import pool as pool_module
from hf_dilated.memory.pool.eviction import Usage
from hf_dilated.memory.pool.sizes import size_class
from hf_dilated.memory.system import System
from hf_dilated.memory.system import Usage as MemoryUsage

MIB = 1 << 20
POOLED = ["lightweight", "full"]


def live(pool: MemoryPool) -> int:
    return pool.stats()["bytes_live"]


def test_memory_waits_for_a_view(pool: MemoryPool) -> None:
    tensor = pool.empty((1000, 1000))
    view = tensor[5]
    del tensor
    assert live(pool) == 4_000_000
    del view
    assert live(pool) == 0


def test_memory_waits_for_autograd(pool: MemoryPool) -> None:
    weight = torch.randn(100, 100, requires_grad=True)
    x = pool.empty((100, 100)).fill_(1)
    loss = (x * weight).sum()
    del x
    gc.collect()
    assert live(pool) == 40_000
    loss.backward()
    del loss
    gc.collect()
    assert live(pool) == 0
    assert torch.equal(weight.grad, torch.ones(100, 100))


def test_memory_waits_for_a_list_and_a_cycle(pool: MemoryPool) -> None:
    kept = [pool.empty((64, 64)).view(-1)[7:]]
    kept.append(kept)
    gc.collect()
    assert live(pool) == 64 * 64 * 4
    del kept
    gc.collect()
    assert live(pool) == 0


def test_memory_waits_for_numpy(pool: MemoryPool) -> None:
    array = pool.empty((64, 64)).fill_(3).numpy()
    other = pool.empty((64, 64)).fill_(4)
    assert (array == 3).all()
    del array
    assert live(pool) == other.numel() * 4


def test_memory_returns_after_an_exception(pool: MemoryPool) -> None:
    def fails() -> None:
        tensor = pool.empty((1000,))
        raise RuntimeError(str(tensor.shape))

    with pytest.raises(RuntimeError):
        fails()
    assert live(pool) == 0


def test_a_tensor_is_like_any_other(pool: MemoryPool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64):
        tensor = pool.empty((3, 5, 7), dtype)
        assert (tensor.shape, tensor.dtype) == ((3, 5, 7), dtype)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 105 * dtype.itemsize
        assert torch.equal(tensor.fill_(1), torch.ones(3, 5, 7, dtype=dtype))
    assert pool.empty((0, 4)).shape == (0, 4)
    assert pool.empty(()).shape == ()


def test_memory_is_reused(pool: MemoryPool) -> None:
    for _ in range(50):
        pool.empty((1 << 20,)).fill_(0)
    stats = pool.stats()
    assert (stats["hits"], stats["misses"]) == (49, 1)
    assert stats["hit_rate"] == 0.98
    assert stats["bytes_cached"] == stats["peak_bytes"] == 4 * MIB


def test_neighbours_become_one() -> None:
    pool = MemoryPool("full")
    parts = [pool.empty((1 << 19,)) for _ in range(4)]
    start = parts[0].data_ptr()
    for index in (1, 3, 0, 2):
        parts[index] = torch.empty(0)
        if index == 3:
            assert pool.empty((3 << 18,)).data_ptr() > start  # the pieces of before become free in between
    whole = pool.empty((1 << 21,))
    assert whole.data_ptr() == start


def test_what_lasts_lies_apart() -> None:
    pool = MemoryPool("full")
    scratch, cache, more = pool.empty((MIB,)), pool.empty((MIB,), lasting=True), pool.empty((MIB,))
    assert cache.data_ptr() - scratch.data_ptr() > 1 << 30
    assert more.data_ptr() - scratch.data_ptr() == 4 * MIB
    del scratch, more
    assert pool.empty((2 * MIB,)).data_ptr() + 8 * MIB < cache.data_ptr()


@given(st.integers(1, 1 << 40))
def test_a_class_wastes_at_most_an_eighth(size: int) -> None:
    found = size_class(size)
    assert size <= found
    assert found <= max(size * 1.125, size + 4095)
    if size >= 32 << 10:
        assert found <= size * 1.125
    assert size_class(found) == found


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    step = st.tuples(
        st.sampled_from(["empty", "empty", "lasting", "view", "save", "free", "free", "trim"]),
        st.integers(0, 1 << 18),
        st.integers(0, 1 << 16),
    )
    return draw(st.lists(step, max_size=60))


Held = list[tuple[int, Tensor]]


def run(pool: MemoryPool, held: Held, number: int, action: str, size: int, choice: int) -> None:
    """One step of a program; every tensor is filled with the number of the step that made it."""
    if action in ("empty", "lasting"):
        held.append((number, pool.empty((size,), torch.int32, lasting=action == "lasting").fill_(number)))
    elif action == "trim":
        pool.trim(choice)
    elif held:
        value, tensor = held[choice % len(held)]
        if action == "view":
            held.append((value, tensor[len(tensor) // 3 :]))
        elif action == "save":
            held.append((value, (torch.ones(1, requires_grad=True) * tensor).grad_fn._saved_other))
        else:
            del held[choice % len(held)]


@settings(deadline=None, max_examples=50)
@given(programs(), st.sampled_from(POOLED), st.sampled_from([0, 1 << 20, 1 << 30]))
def test_live_tensors_never_share_bytes(program: list[tuple[str, int, int]], mode: str, budget: int) -> None:
    """Programs of allocate, view, save for backward and free, checked by addresses and by content."""
    pool = MemoryPool(mode, budget=budget)
    held: Held = []
    for number, step in enumerate(program):
        run(pool, held, number, *step)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in held}
        storages.pop(0, None)  # of empty tensors
        ends = sorted(storages.items())
        assert all(a + size <= b for (a, size), (b, _) in zip(ends, ends[1:], strict=False))
        stats = pool.stats()
        assert stats["bytes_live"] == sum(storages.values())
        assert stats["bytes_cached"] >= 0
    assert all((tensor == value).all() for value, tensor in held)
    held.clear()
    assert pool.stats()["bytes_live"] == 0
    pool.trim()
    assert pool.stats()["bytes_cached"] == 0


def test_the_budget_holds(pool: MemoryPool) -> None:
    pool.budget = 8 * MIB
    tensors = [pool.empty((MIB,)) for _ in range(8)]
    assert pool.stats()["bytes_cached"] == 0
    tensors.clear()
    stats = pool.stats()
    assert stats["bytes_cached"] <= 8 * MIB
    assert stats["evictions"] > 0


def test_no_more_is_held_than_was_needed(pool: MemoryPool) -> None:
    """Sizes that never come back do not pile up."""
    for size in range(1, 200):
        pool.empty((size * 37_777,)).fill_(1)
    stats = pool.stats()
    assert stats["fragmentation"] < 0.15
    assert stats["bytes_cached"] < 199 * 37_777 * 4 * 1.2


def test_a_burst_is_forgotten(pool: MemoryPool) -> None:
    burst = [pool.empty((4 * MIB,)) for _ in range(8)]
    burst.clear()
    for size in range(3000):
        pool.empty((MIB + size * 2048,))
    assert pool.stats()["bytes_cached"] < 64 * MIB


def step(pool: MemoryPool, length: int) -> None:
    """What a training step of two layers takes: outputs live until backward, scratch comes and goes (untouched)."""
    saved = []
    for _ in range(2):
        output, lse = pool.empty((length, 512)), pool.empty((length, 8))
        for part in (4, 8):
            pool.empty((length // part, 512))
        saved.append((output, lse, pool.empty((length, 512), torch.bfloat16)))
    while saved:
        grads = [pool.empty((length, 512)) for _ in range(3)]
        pool.empty((length // 4, 512))
        converted = [pool.empty((length, 512), torch.bfloat16) for _ in grads]
        saved.pop()
        del grads, converted


@pytest.mark.parametrize("mode", POOLED)
@pytest.mark.parametrize("varies", [False, True])
def test_a_thousand_steps(mode: str, varies: bool) -> None:
    """No growth, little fragmentation, and nearly all are hits, also where lengths vary."""
    pool = MemoryPool(mode)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2048, 16384, (1000,), generator=generator).tolist() if varies else [8192] * 1000
    held = []
    for number, length in enumerate(lengths):
        step(pool, length)
        stats = pool.stats()
        held.append(stats["bytes_cached"])
        if number == 99:
            pool.clear_counts()
    assert stats["bytes_live"] == 0
    assert max(held[100:]) <= max(held[:100]) * 1.1
    assert stats["fragmentation"] < 0.1
    assert stats["hit_rate"] >= 0.999


def test_eviction_prefers_what_is_old_rare_and_large() -> None:
    usage = Usage()
    for _ in range(20):
        usage.touch(4 * MIB)
    usage.touch(2 * MIB)
    often = usage.worth(4 * MIB, used=10)
    assert often > usage.worth(2 * MIB, used=10)
    assert often > usage.worth(4 * MIB, used=5)
    usage.touch(8 * MIB)
    assert usage.worth(2 * MIB, used=21) > usage.worth(8 * MIB, used=21) * 0.9
    for _ in range(5000):
        usage.touch(MIB)
    assert usage.frequency(4 * MIB) < 0.01


class Pressed(System):
    """A machine whose memory runs out."""

    available = 100 << 30

    def usage(self) -> MemoryUsage:
        return MemoryUsage(100 << 30, self.available)


@pytest.mark.parametrize("mode", POOLED)
def test_pressure_trims(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PRESSURE_SECONDS", -1)
    machine = Pressed()
    pool = MemoryPool(mode, machine=machine)
    kept = pool.empty((MIB,)).fill_(5)
    pool.empty((16 * MIB,))
    assert pool.stats()["bytes_cached"] >= 60 * MIB
    machine.available = 1 << 30
    large = pool.empty((32 * MIB,))
    assert pool.stats()["bytes_cached"] <= 4 * MIB
    assert large.shape == (32 * MIB,)
    assert (kept == 5).all()


def test_memory_really_goes_back(pool: MemoryPool) -> None:
    machine = System()
    if not machine.resident():
        pytest.skip("the system does not tell what is resident")
    before = machine.resident()
    pool.empty((16 * MIB,)).fill_(1)
    assert machine.resident() - before > 60 * MIB
    pool.trim()
    assert machine.resident() - before < 8 * MIB


def test_poisoned_memory_is_poisoned_here_too(pool: MemoryPool) -> None:
    pool.empty((100,)).fill_(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert pool.empty((100,)).isnan().all()
        assert (pool.empty((100,), torch.int16) == 32767).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_clear_keeps_what_lives(pool: MemoryPool) -> None:
    tensor = pool.empty((MIB,)).fill_(7)
    pool.empty((2 * MIB,))
    pool.clear()
    stats = pool.stats()
    assert (stats["hits"], stats["misses"], stats["bytes_live"], stats["bytes_cached"]) == (0, 0, 4 * MIB, 0)
    assert (tensor == 7).all()


def test_small_and_disabled_are_torch(pool: MemoryPool) -> None:
    pool.smallest = 100
    pool.empty((24,))
    disabled = MemoryPool("disabled")
    disabled.empty((1 << 20,))
    assert pool.stats()["misses"] == disabled.stats()["misses"] == 0


def test_a_pool_may_die_before_its_tensors() -> None:
    pool = MemoryPool("full")
    tensor = pool.empty((MIB,)).fill_(9)
    del pool
    gc.collect()
    assert (tensor == 9).all()
