"""Lightweight: free blocks in buckets of one size class each."""

from collections import defaultdict

from hf_dilated.memory.numa import Placement
from hf_dilated.memory.pool.eviction import Usage
from hf_dilated.memory.pool.mapping import Mapping
from hf_dilated.memory.pool.sizes import size_class


class Bucket:
    """One block: pages of its own."""

    __slots__ = ("mapping", "size", "used")

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.size = mapping.size
        self.used = 0

    @property
    def address(self) -> int:
        """Where it lies."""
        return self.mapping.address

    def view(self, size: int) -> memoryview:
        """Return a new object over its first bytes."""
        return self.mapping.view(0, size)


class Buckets:
    """Takes the block that was returned last; never splits one."""

    def __init__(self, usage: Usage, *, huge_pages: bool, placement: Placement | None) -> None:
        self.held = 0
        self._usage = usage
        self._options = {"huge_pages": huge_pages, "placement": placement}
        self._free: dict[int, list[Bucket]] = defaultdict(list)

    def take(self, size: int, *, lasting: bool = False) -> tuple[Bucket, int]:
        """Return a block and how many of its bytes are fresh; ``lasting`` makes no difference here."""
        size = size_class(size)
        self._usage.touch(size)
        if free := self._free[size]:
            return free.pop(), 0
        block = Bucket(Mapping(size, **self._options))  # type: ignore[arg-type]
        self.held += size
        return block, size

    def give(self, block: Bucket) -> None:
        """Take a block back."""
        block.used = self._usage.tick
        self._free[block.size].append(block)

    def release(self, wanted: int) -> tuple[int, int]:
        """Give the least valuable free blocks back to the system; return how many, and their bytes."""
        free = [block for blocks in self._free.values() for block in blocks]
        free.sort(key=lambda block: self._usage.worth(block.size, block.used))
        count = released = 0
        for block in free:
            if released >= wanted:
                break
            self._free[block.size].remove(block)
            released += block.size
            count += 1
        self.held -= released
        return count, released
