"""Full: best fit with coalescing in large reservations of addresses, whose pages come and go.

A segment reserves addresses, which cost nothing. Its memory is counted, and given back, in chunks of a huge page: a
chunk is resident from the first block that covers it until the free range around it is evicted.
"""

from bisect import bisect_left, insort

from hf_dilated.memory.numa import Placement
from hf_dilated.memory.pool.eviction import Usage
from hf_dilated.memory.pool.mapping import HUGE_PAGE, PAGE, Mapping

SEGMENT = 16 << 30  # bytes of addresses
GRANULE = 64 << 10
CHUNK = HUGE_PAGE


class Range:
    """A free or used piece of a segment."""

    __slots__ = ("segment", "size", "start", "used", "wanted")

    def __init__(self, segment: "Segment", start: int, size: int) -> None:
        self.segment = segment
        self.start = start
        self.size = size
        self.used = 0
        self.wanted = size

    @property
    def address(self) -> int:
        """Where it lies."""
        return self.segment.mapping.address + self.start

    def view(self, size: int) -> memoryview:
        """Return a new object over its first bytes."""
        return self.segment.mapping.pages[self.start : self.start + size]


class Segment:
    """A reservation: its free ranges by their ends, and which chunks are resident."""

    def __init__(self, number: int, mapping: Mapping) -> None:
        self.number = number
        self.mapping = mapping
        self.by_start: dict[int, Range] = {}
        self.by_end: dict[int, Range] = {}
        self.resident = bytearray(-(-mapping.size // CHUNK))

    def touch(self, start: int, size: int) -> int:
        """Count the chunks of a block as resident; return the bytes that are new."""
        first, last = start // CHUNK, -(-(start + size) // CHUNK)
        fresh = self.resident.count(0, first, last)
        if fresh:
            self.resident[first:last] = b"\1" * (last - first)
        return fresh * CHUNK

    def within(self, free: Range) -> tuple[int, int]:
        """Chunks that lie wholly inside a free range."""
        return -(-free.start // CHUNK), (free.start + free.size) // CHUNK

    def idle(self, free: Range) -> int:
        """Return the resident bytes that a free range could give back."""
        return self.resident.count(1, *self.within(free)) * CHUNK

    def drop(self, free: Range, wanted: int) -> int:
        """Give back what is wanted of them, or a little more."""
        lowest, last = self.within(free)
        released = 0
        while released < wanted and (last := self.resident.rfind(1, lowest, last) + 1):
            first = max(lowest, last - -(-(wanted - released) // CHUNK))
            released += self.resident.count(1, first, last) * CHUNK
            self.mapping.drop(first * CHUNK, (last - first) * CHUNK)
            self.resident[first:last] = bytes(last - first)
        return released


class Arena:
    """Best fit: the smallest free range that is large enough; neighbours that are free become one.

    What returns waits for a request of its own size; it joins its neighbours when a request finds nothing waiting.
    What outlives a step (``lasting``) is taken from the far end of the addresses, away from what comes and goes.
    """

    def __init__(
        self, usage: Usage, *, huge_pages: bool, placement: Placement | None, segment_size: int = SEGMENT
    ) -> None:
        self.held = 0
        self._usage = usage
        self._options = {"huge_pages": huge_pages, "placement": placement}
        self._segment_size = segment_size
        self._segments: list[Segment] = []
        self._by_size: list[tuple[int, int, int]] = []  # size, segment, start of every free range
        self._waiting: dict[int, list[Range]] = {}

    def take(self, size: int, *, lasting: bool = False) -> tuple[Range, int]:
        """Return a block and how many of its bytes are fresh."""
        granule = GRANULE if size >= 8 * GRANULE else PAGE
        size = -(-size // granule) * granule
        self._usage.touch(size)
        if not lasting and (waiting := self._waiting.get(size)):
            return waiting.pop(), 0
        self._join()
        free = self._largest(size) if lasting else self._best(size)
        self._remove(free)
        segment, rest = free.segment, free.size - size
        start = free.start + rest * lasting
        if rest:
            left = Range(segment, free.start + size * (not lasting), rest)
            left.used, left.wanted = free.used, free.wanted
            self._insert(left)
        fresh = segment.touch(start, size)
        self.held += fresh
        return Range(segment, start, size), fresh

    def give(self, block: Range) -> None:
        """Take a block back."""
        block.used = self._usage.tick
        self._waiting.setdefault(block.size, []).append(block)

    def _join(self) -> None:
        """Let what waits become free, one with its free neighbours."""
        for waiting in self._waiting.values():
            for block in waiting:
                self._free(block)
        self._waiting.clear()

    def _free(self, block: Range) -> None:
        segment, start, size = block.segment, block.start, block.size
        for neighbour in (segment.by_end.get(start), segment.by_start.get(start + size)):
            if neighbour is not None:
                self._remove(neighbour)
                start, size = min(start, neighbour.start), size + neighbour.size
        free = Range(segment, start, size)
        free.used, free.wanted = block.used, block.size
        self._insert(free)

    def release(self, wanted: int) -> tuple[int, int]:
        """Give pages of the least valuable free ranges back to the system; return how many ranges, and the bytes."""
        self._join()
        free = [r for segment in self._segments for r in segment.by_start.values() if segment.idle(r)]
        free.sort(key=lambda r: self._usage.worth(r.wanted, r.used))
        count = released = 0
        for candidate in free:
            if released >= wanted:
                break
            released += candidate.segment.drop(candidate, wanted - released)
            count += 1
        self.held -= released
        return count, released

    def _best(self, size: int) -> Range:
        found = bisect_left(self._by_size, (size, -1, -1))
        return self._at(found) if found < len(self._by_size) else self._grow(size)

    def _largest(self, size: int) -> Range:
        fits = bool(self._by_size) and self._by_size[-1][0] >= size
        return self._at(len(self._by_size) - 1) if fits else self._grow(size)

    def _at(self, index: int) -> Range:
        _, segment, start = self._by_size[index]
        return self._segments[segment].by_start[start]

    def _grow(self, size: int) -> Range:
        segment = Segment(len(self._segments), self._reserve(size))
        self._segments.append(segment)
        free = Range(segment, 0, segment.mapping.size)
        self._insert(free)
        return free

    def _reserve(self, size: int) -> Mapping:
        whole = -(-size // CHUNK) * CHUNK
        try:
            return Mapping(max(self._segment_size, whole), **self._options)  # type: ignore[arg-type]
        except OSError:  # addresses are limited (ulimit -v, strict overcommit): no more than is needed
            return Mapping(whole, **self._options)  # type: ignore[arg-type]

    def _insert(self, free: Range) -> None:
        free.segment.by_start[free.start] = free
        free.segment.by_end[free.start + free.size] = free
        insort(self._by_size, (free.size, free.segment.number, free.start))

    def _remove(self, free: Range) -> None:
        del free.segment.by_start[free.start]
        del free.segment.by_end[free.start + free.size]
        del self._by_size[bisect_left(self._by_size, (free.size, free.segment.number, free.start))]
