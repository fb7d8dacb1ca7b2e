"""Lightweight: blocks of a size class each; one that is idle also serves smaller requests.

A block has pages of its own and is never split. Of one that is larger than what it holds the rest is idle: it counts as
kept for reuse, and goes back to the system as free blocks do, while the block is in use.
"""

from bisect import bisect_left, insort_left
from operator import attrgetter

from hf_dilated.memory.numa import Placement
from hf_dilated.memory.pool.eviction import Usage
from hf_dilated.memory.pool.mapping import PAGE, Mapping
from hf_dilated.memory.pool.sizes import size_class


class Block:
    """Pages of its own, of which the first ``resident`` bytes have been handed out; ``size`` of them are in use."""

    __slots__ = ("mapping", "resident", "size", "used")

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.resident = 0
        self.size = 0
        self.used = 0

    @property
    def address(self) -> int:
        """Where it lies."""
        return self.mapping.address

    def view(self, size: int) -> memoryview:
        """Return a new object over its first bytes."""
        return self.mapping.pages[:size]

    def shorten(self, wanted: int) -> int:
        """Give pages at the end that are not in use back to the system; return their bytes."""
        start = max(self.size, (self.resident - wanted) // PAGE * PAGE)
        released = self.resident - start
        self.mapping.drop(start, released)
        self.resident = start
        return released


resident_bytes = attrgetter("resident")


class Buckets:
    """Takes the smallest free block that is large enough, of equals the one that was returned last."""

    def __init__(self, usage: Usage, *, huge_pages: bool, placement: Placement | None) -> None:
        self.held = 0
        self._usage = usage
        self._options = {"huge_pages": huge_pages, "placement": placement}
        self._free: list[Block] = []  # by resident bytes
        self._idle: dict[int, Block] = {}  # blocks in use that are larger than that, by address

    def take(self, size: int, *, lasting: bool = False) -> tuple[Block, int]:
        """Return a block and how many of its bytes are fresh; ``lasting`` makes no difference here."""
        size = size_class(size)
        self._usage.touch(size)
        found = bisect_left(self._free, size, key=resident_bytes)
        block = self._free.pop(found) if found < len(self._free) else self._grown(size)
        block.size = size
        fresh = max(0, size - block.resident)
        block.resident += fresh
        self.held += fresh
        if block.resident > size:
            self._idle[block.address] = block
        return block, fresh

    def _grown(self, size: int) -> Block:
        """Return the free block with the most pages that has the addresses, or else a new one."""
        for index in reversed(range(len(self._free))):
            if self._free[index].mapping.size >= size:
                return self._free.pop(index)
        return Block(Mapping(size, **self._options))  # type: ignore[arg-type]

    def give(self, block: Block) -> None:
        """Take a block back."""
        block.used = self._usage.tick
        self._idle.pop(block.address, None)
        insort_left(self._free, block, key=resident_bytes)

    def release(self, wanted: int) -> tuple[int, int]:
        """Give back idle ends of blocks in use, then the least valuable free blocks; return how many, and the bytes."""
        count = released = 0
        for block in list(self._idle.values()):
            if released >= wanted:
                break
            released += block.shorten(wanted - released)
            if block.resident == block.size:
                del self._idle[block.address]
            count += 1
        for block in sorted(self._free, key=self._worth):
            if released >= wanted:
                break
            self._free.remove(block)
            released += block.resident
            count += 1
        self.held -= released
        return count, released

    def _worth(self, block: Block) -> float:
        """What it saves for every byte that it holds."""
        return self._usage.worth(block.size, block.used) * block.size / block.resident
