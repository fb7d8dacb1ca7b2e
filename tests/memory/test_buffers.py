"""Kinds of buffers, which manager allocates, and buffers that stay."""

import threading

import pytest
import torch

from hf_dilated.memory import AttentionBufferManager, BufferType, auto_configure_memory_pool, buffers
from hf_dilated.memory.buffers import RULES, rules_for
from hf_dilated.memory.persistent import PersistentBuffers
from hf_dilated.memory.recording import Recording

CPU = torch.device("cpu")


def manager(length: int = 8192, kind: str = "dilated", **settings: object) -> AttentionBufferManager:
    return AttentionBufferManager(auto_configure_memory_pool(length, kind, **settings))


def test_ten_kinds_with_a_rule_each() -> None:
    assert len(BufferType) == 10
    assert set(RULES) == set(BufferType)


@pytest.mark.parametrize("kind", ["dilated", "ring", "ring_dilated", "block_sparse", "ring_block_sparse"])
def test_rules_differ_where_backends_do(kind: str) -> None:
    rules = rules_for(kind)
    assert (rules[BufferType.MASK].lifetime == "sequence") == kind.startswith("block_sparse")
    assert rules[BufferType.CACHE].lifetime == "sequence"


@pytest.mark.parametrize("mode", ["disabled", "lightweight", "full"])
def test_the_mode_is_that_of_the_object_that_allocates(mode: str) -> None:
    own = manager(mode=mode, smallest=1, budget=1 << 20)
    assert own.mode == own.pool().mode == mode
    before = own.pool().stats()["misses"]
    kept = own.empty(BufferType.TEMP, (1000,))
    assert own.pool().stats()["misses"] == before + (mode != "disabled")
    assert kept.shape == (1000,)


def test_each_kind_is_counted() -> None:
    own = manager(smallest=1, budget=3 << 20)
    kept = [own.empty(kind, (100,)) for kind in BufferType]
    stats = own.stats()["cpu"]
    assert set(stats["types"]) == {kind.value for kind in BufferType} - {"mask"}
    assert all(figures["bytes_live"] == 400 for figures in stats["types"].values())
    assert set(stats) == {
        "hits", "misses", "hit_rate", "bytes_live", "bytes_cached", "peak_bytes", "fragmentation", "evictions", "types",
    }  # fmt: skip
    assert len(kept) == 10


def test_caches_lie_away_from_scratch() -> None:
    own = manager(smallest=1, budget=4 << 20)
    scratch, cache = own.empty(BufferType.TEMP, (1 << 20,)), own.empty(BufferType.CACHE, (1 << 20,))
    assert cache.data_ptr() - scratch.data_ptr() > 1 << 30


def test_what_ranks_send_is_scratch() -> None:
    """It lives for a call: the next one gets the same bytes at once, beside other scratch."""
    own = manager(kind="ring_dilated", smallest=1, budget=7 << 20)
    scratch, sent = own.empty(BufferType.TEMP, (1 << 20,)), own.empty(BufferType.COMM, (1 << 20,))
    assert abs(sent.data_ptr() - scratch.data_ptr()) < 1 << 30
    address = sent.data_ptr()
    del sent
    assert own.empty(BufferType.COMM, (1 << 20,)).data_ptr() == address
    assert rules_for("ring")[BufferType.COMM] == RULES[BufferType.COMM]


def test_managers_share_pools() -> None:
    assert manager().pool() is manager(16384, "ring").pool()
    assert manager().pool() is not manager(budget=5).pool()
    assert manager().pool() is not manager(mode="lightweight").pool()


def test_using_nests_and_survives_exceptions() -> None:
    outer, inner = (auto_configure_memory_pool(n).spec for n in (4096, 8192))
    assert buffers.in_use() is None
    with buffers.using(outer):
        with pytest.raises(ZeroDivisionError), buffers.using(inner):
            _ = 1 / (buffers.in_use().mode != "full")
        assert buffers.in_use().mode == "lightweight"
        with buffers.using(""):
            assert buffers.in_use() is None
    assert buffers.in_use() is None


def test_threads_do_not_see_each_others_manager() -> None:
    found = []
    with buffers.using(auto_configure_memory_pool(8192).spec):
        thread = threading.Thread(target=lambda: found.append(buffers.in_use()))
        thread.start()
        thread.join()
    assert found == [None]


def test_without_a_manager_it_is_torch() -> None:
    tensor = buffers.full(BufferType.TEMP, (3,), 2.0, torch.float64, CPU)
    assert torch.equal(tensor, torch.full((3,), 2.0, dtype=torch.float64))
    x = torch.randn(2, 3, 4)
    index = (torch.tensor([1, 0]), torch.tensor([2, 2]))
    with buffers.using(auto_configure_memory_pool(8192, smallest=1).spec):
        pooled = buffers.gathered(x, index)
    assert torch.equal(pooled, buffers.gathered(x, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_taken_from_a_pool_is_what_torch_makes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 4).to(dtype).transpose(1, 2)
    index = torch.randint(0, 5, (2, 3, 5, 4))
    calls = (
        lambda: buffers.contiguous(BufferType.TEMP, x),
        lambda: buffers.joined(BufferType.CACHE, [x, x[:, :, :2]], 2),
        lambda: buffers.chosen(BufferType.CACHE, x, 2, index),
        lambda: buffers.scaled(BufferType.OUTPUT, x, torch.linspace(0, 1, 5)[:, None]),
        lambda: buffers.converted(BufferType.OUTPUT, x, torch.float64),
    )
    own = auto_configure_memory_pool(8192, smallest=1, budget=66 << 20).spec
    pool = buffers.manager_of(own).pool()
    for call in calls:
        before = pool.stats()["hits"] + pool.stats()["misses"]
        with buffers.using(own):
            pooled = call()
            assert pool.stats()["hits"] + pool.stats()["misses"] > before
        assert pooled.dtype == call().dtype
        assert torch.equal(pooled, call())


def test_what_is_joined_has_the_dtype_that_torch_gives_it() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64)
    for tensors in ([x, y], [y, x], [x.bfloat16(), x], [x.half(), x.bfloat16()]):
        with buffers.using(auto_configure_memory_pool(8192, smallest=1).spec):
            joined = buffers.joined(BufferType.CACHE, tensors, 1)
        assert joined.dtype == torch.cat(tensors, 1).dtype
        assert torch.equal(joined, torch.cat(tensors, 1))


def test_what_autograd_has_to_see_is_torchs_own() -> None:
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    with buffers.using(auto_configure_memory_pool(8192, smallest=1).spec):
        joined = buffers.joined(BufferType.CACHE, [x, x], 2)
        chosen = buffers.chosen(BufferType.CACHE, joined, 2, torch.zeros(2, 3, 1, 4, dtype=torch.long))
        buffers.scaled(BufferType.OUTPUT, chosen, torch.ones(1)).sum().backward()
    assert x.grad.sum() == 24


def test_a_plan_is_there_before_the_run() -> None:
    own = manager(smallest=1, budget=64 << 20)
    sizes = [3 << 20, 3 << 20, 1 << 20]
    own.preallocate(sizes)
    before = own.pool().stats()
    kept = [own.empty(BufferType.OUTPUT, (size,), torch.uint8) for size in sizes]
    after = own.pool().stats()
    assert after["hits"] - before["hits"] == len(kept)
    assert after["misses"] == before["misses"]


def test_a_policy_with_a_plan() -> None:
    policy = auto_configure_memory_pool(8192, smallest=1, budget=65 << 20)
    own = AttentionBufferManager(policy.__class__(**vars(policy) | {"plan": (5 << 20,)}))
    own.empty(BufferType.OUTPUT, (5 << 20,), torch.uint8)
    assert own.stats()["cpu"]["types"]["output"]["misses"] == 0


def test_a_recording_sees_takes_and_returns() -> None:
    own = manager(smallest=1, budget=6 << 20)
    before = own.empty(BufferType.CACHE, (10,))
    with own.record() as recording:
        first = own.empty(BufferType.OUTPUT, (1000,))
        own.empty(BufferType.TEMP, (500,))
        second = own.empty(BufferType.TEMP, (250,))
        del first, second, before
    own.empty(BufferType.TEMP, (1,))
    assert [(e.kind, e.size) for e in recording.events] == [
        ("output", 4000), ("temp", 2000), ("temp", -2000), ("temp", 1000), ("output", -4000), ("temp", -1000),
    ]  # fmt: skip
    seconds, lines = recording.timeline()
    assert seconds == sorted(seconds)
    assert lines == {"output": [4000, 4000, 4000, 4000, 0, 0], "temp": [0, 2000, 0, 1000, 1000, 0]}
    assert recording.peak() == 6000
    assert recording.plan() == [4000, 2000]


def test_an_empty_recording() -> None:
    assert (Recording().peak(), Recording().plan(), Recording().timeline()) == (0, [], ([], {}))


def test_persistent_buffers_stay() -> None:
    own = PersistentBuffers()
    first = own.get("key 0", (4, 4), torch.float32, CPU)
    other = own.get("key 1", (4, 4), torch.float32, CPU)
    assert own.get("key 0", (2, 4), torch.bfloat16, CPU).data_ptr() == first.data_ptr() != other.data_ptr()
    larger = own.get("key 0", (8, 4), torch.float32, CPU)
    assert own.get("key 0", (4, 4), torch.float32, CPU).data_ptr() == larger.data_ptr()
    assert own.size() == 128 + 64
    own.clear()
    assert own.size() == 0


def test_all_managers_share_what_stays() -> None:
    try:
        first = manager().persistent("test", (5,), torch.float32)
        assert manager(16, "ring").persistent("test", (5,), torch.float32).data_ptr() == first.data_ptr()
    finally:
        buffers.persistent_buffers.clear()
