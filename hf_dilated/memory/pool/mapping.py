"""Memory of the operating system's, outside of malloc's heap."""

import ctypes
import mmap
import sys

from hf_dilated.memory import numa

HUGE_PAGE = 2 << 20
PAGE = mmap.PAGESIZE
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python 3.13 names it


class Mapping:
    """Private anonymous pages, aligned to huge pages where they are large enough; they cost nothing until touched.

    A slice of ``pages`` keeps all of them alive, whatever becomes of the mapping. They are private: after a fork nobody
    sees what the other writes.
    """

    def __init__(self, size: int, *, huge_pages: bool, placement: numa.Placement | None) -> None:
        aligned = size >= HUGE_PAGE
        self._map = _anonymous(size + HUGE_PAGE * aligned)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._first = -address % HUGE_PAGE if aligned else 0
        self.address = address + self._first
        self.size = size
        if aligned and huge_pages:
            self._map.madvise(mmap.MADV_HUGEPAGE, self._first, size // PAGE * PAGE)
        if placement is not None:
            numa.place(self.address, size, placement)
        self.pages = memoryview(self._map)[self._first : self._first + size]

    def drop(self, start: int, size: int) -> None:
        """Give whole pages back; they read as zeros when touched again."""
        self._map.madvise(mmap.MADV_DONTNEED, self._first + start, size)


def _anonymous(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):  # shared, the default, is for talking to forked processes
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return mmap.mmap(-1, size)
