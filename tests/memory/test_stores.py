"""What the stores of the modes hold: free and used blocks, and which of their bytes are resident."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dilated.memory import MemoryPool
from hf_dilated.memory.pool.arena import Arena
from hf_dilated.memory.pool.buckets import Buckets
from hf_dilated.memory.pool.eviction import Usage
from hf_dilated.memory.pool.sizes import size_class

MIB = 1 << 20
STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 8 * MIB), st.integers(0, 99)), max_size=80)


@settings(deadline=None, max_examples=100)
@given(STEPS)
def test_the_arena_keeps_count(steps: list[tuple[bool, int, int]]) -> None:
    """Free and used ranges tile every segment; no two free ones touch; what is held is what is resident."""
    arena = Arena(Usage(), huge_pages=False, placement=None, segment_size=16 * MIB)
    used = []
    for take, size, choice in steps:
        if take or not used:
            used.append(arena.take(size, lasting=choice % 4 == 0)[0])
        elif choice % 5 == 0:
            arena.release(size)
        else:
            arena.give(used.pop(choice % len(used)))
        for segment in arena._segments:
            free = sorted(segment.by_start.values(), key=lambda r: r.start)
            waiting = [r for ranges in arena._waiting.values() for r in ranges]
            tiles = sorted([(r.start, r.size) for r in [*free, *used, *waiting] if r.segment is segment])
            assert [start for start, _ in tiles] == [0, *(start + size for start, size in tiles)][: len(tiles)]
            assert sum(size for _, size in tiles) == segment.mapping.size
            assert all(a.start + a.size < b.start for a, b in zip(free, free[1:], strict=False))
        assert arena.held == sum(s.resident.count(1) for s in arena._segments) * 2 * MIB
        assert len(arena._by_size) == sum(len(s.by_start) for s in arena._segments)


@settings(deadline=None, max_examples=100)
@given(STEPS)
def test_the_buckets_keep_count(steps: list[tuple[bool, int, int]]) -> None:
    """What is held is what is resident; a request is served by the smallest free block that is large enough."""
    buckets = Buckets(Usage(), huge_pages=False, placement=None)
    used = []
    for take, size, choice in steps:
        held, free = buckets.held, [block.resident for block in buckets._free]
        if take or not used:
            fits = [resident for resident in free if resident >= size_class(size)]
            block, fresh = buckets.take(size)
            used.append(block)
            assert (fresh == 0) == bool(fits)
            assert block.resident == min(fits, default=size_class(size))
            assert buckets.held == held + fresh
        elif choice % 5 == 0:
            _, released = buckets.release(size)
            idle = held - sum(block.size for block in used)
            assert released >= min(size, idle)
            assert buckets.held == held - released
        else:
            buckets.give(used.pop(choice % len(used)))
        assert buckets.held == sum(block.resident for block in [*buckets._free, *used])
        assert [block.resident for block in buckets._free] == sorted(block.resident for block in buckets._free)
        assert all(block.size <= block.resident <= block.mapping.size for block in used)
        assert set(buckets._idle.values()) == {block for block in used if block.resident > block.size}


def test_a_large_block_serves_a_small_request_until_its_rest_is_needed() -> None:
    pool = MemoryPool("lightweight")
    large = [pool.empty((8 * MIB,)).fill_(1) for _ in range(4)]
    addresses = {tensor.data_ptr() for tensor in large}
    large.clear()
    small = [pool.empty((MIB,)).fill_(2) for _ in range(4)]
    assert {tensor.data_ptr() for tensor in small} == addresses
    assert pool.stats()["hits"] == 4
    assert pool.stats()["bytes_cached"] == 4 * 28 * MIB
    large = [pool.empty((8 * MIB,)).fill_(3) for _ in range(4)]
    assert pool.stats()["bytes_cached"] <= 18 * MIB, "an eighth of what is in use"
    pool.trim()
    assert pool.stats()["bytes_cached"] == 0
    assert all((tensor == 2).all() for tensor in small)
    assert all((tensor == 3).all() for tensor in large)


def test_a_shortened_block_grows_again() -> None:
    pool = MemoryPool("lightweight")
    address = pool.empty((8 * MIB,)).data_ptr()
    small = pool.empty((MIB,)).fill_(2)
    pool.trim()
    del small
    again = pool.empty((8 * MIB,)).fill_(3)
    assert again.data_ptr() == address
    assert pool.stats()["misses"] == 2
    assert pool.stats()["bytes_live"] == pool.stats()["peak_bytes"] == 32 * MIB
