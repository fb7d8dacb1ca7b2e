"""Levers of the whole process, beside the pool: what glibc's malloc keeps, and huge pages for torch's allocations.

They reach what a pool of ours cannot: tensors that torch's own operators allocate.
"""

import ctypes
import os
import platform
from dataclasses import dataclass

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = 1 << 30  # bytes
LARGEST_DYNAMIC = 32 << 20  # glibc's own limit for the mmap threshold; the trim threshold is twice that
TORCH_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


@dataclass(frozen=True)
class Levers:
    """What was set.

    Attributes:
        malloc: Whether malloc keeps large blocks.
        huge_pages: Whether torch will ask for huge pages, which it decides at its first large allocation.
    """

    malloc: bool
    huge_pages: bool


def pull_levers(*, malloc: bool = True, huge_pages: bool = True) -> Levers:
    """Let the process keep large blocks of memory and use huge pages. Call it before the first tensor.

    Malloc then takes blocks below 1 GiB from its heap instead of mapping each anew, and gives less than 1 GiB at the
    end of the heap back. That is memory which other processes do not get. :func:`release_levers` undoes it.

    Args:
        malloc: Set glibc's ``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD`` to 1 GiB.
        huge_pages: Set ``THP_MEM_ALLOC_ENABLE``, which torch reads at its first allocation of 2 MiB or more.

    Returns:
        What could be set: malloc on glibc only, huge pages on Linux.

    Example:
        >>> pull_levers(malloc=False, huge_pages=False)
        Levers(malloc=False, huge_pages=False)
    """
    done = malloc and _mallopt(M_MMAP_THRESHOLD, KEEP) and _mallopt(M_TRIM_THRESHOLD, KEEP)
    asked = huge_pages and platform.system() == "Linux"
    if asked:
        os.environ[TORCH_HUGE_PAGES] = "1"
    return Levers(malloc=done, huge_pages=asked)


def release_levers() -> int:
    """Undo :func:`pull_levers` and give malloc's free memory back.

    Glibc's thresholds grow by themselves until they are set once; they are left at what they grow to at most, 32 and
    64 MiB. Torch keeps the answer that it has read about huge pages.

    Returns:
        1 if memory went back to the system, else 0.
    """
    os.environ.pop(TORCH_HUGE_PAGES, None)
    _mallopt(M_MMAP_THRESHOLD, LARGEST_DYNAMIC)
    _mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_DYNAMIC)
    trim = getattr(_libc(), "malloc_trim", None)
    return int(trim(0)) if trim else 0


def _mallopt(option: int, value: int) -> bool:
    mallopt = getattr(_libc(), "mallopt", None)
    # mallopt takes an int, and glibc refuses an mmap threshold above half a heap
    return bool(mallopt and mallopt(option, min(value, (1 << 31) - 1)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
