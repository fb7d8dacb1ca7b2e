"""Memory that returns when the last user of a tensor's storage dies."""

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import deterministic

from hf_dilated.config.memory import MemoryMode
from hf_dilated.memory import numa
from hf_dilated.memory.pool.arena import Arena
from hf_dilated.memory.pool.buckets import Buckets
from hf_dilated.memory.pool.eviction import Usage
from hf_dilated.memory.pool.statistics import Counters, Need
from hf_dilated.memory.recording import Recording
from hf_dilated.memory.system import System, system

HEADROOM = 8  # at most an eighth more is held than was needed at once of late
RESERVE = 20  # less than a twentieth of the limit available is memory pressure
PRESSURE_SECONDS = 0.1  # between two looks at it

T = TypeVar("T")


class Block(Protocol):
    """Memory that a store has handed out."""

    size: int

    @property
    def address(self) -> int:
        """Where it lies."""
        ...

    def view(self, size: int) -> memoryview:
        """Return a new object over its first bytes."""
        ...


class Store(Protocol):
    """Free blocks of a mode; not thread-safe."""

    held: int

    def take(self, size: int, *, lasting: bool = False) -> tuple[Any, int]:
        """Return a block and how many of its bytes are fresh."""
        ...

    def give(self, block: Any) -> None:
        """Take a block back."""
        ...

    def release(self, wanted: int) -> tuple[int, int]:
        """Evict; return how many pieces, and their bytes."""
        ...


class _Lease(weakref.ref):
    """Dies with the buffer behind a storage."""

    __slots__ = ("block", "counters", "size")
    block: Block
    counters: Counters
    size: int

    __hash__ = object.__hash__  # a reference is a lease of its own, whatever it refers to
    __eq__ = object.__eq__


class MemoryPool:
    """A pool of CPU memory for tensors.

    A tensor's memory returns when the last user of its storage dies, whoever that is: autograd, a view, a Python list.
    Tensors that live never share bytes. Threads may share a pool. Finalizers and signal handlers may use it, too: what
    interrupts the pool in its own thread gets torch's memory, and neither trims nor clears anything. A forked child
    starts with an empty pool; tensors that it inherits stay its own.

    Args:
        mode: ``"disabled"``, ``"lightweight"`` (size buckets) or ``"full"`` (best fit with coalescing).
        smallest: Bytes of the smallest tensor that is pooled; others are torch's own.
        budget: Bytes that are kept for reuse at most; by default a quarter of what the process may have.
        huge_pages: Ask the kernel for huge pages.
        placement: Where memory is placed on a machine with several NUMA nodes.
        machine: What tells of limits and pressure.

    Example:
        >>> pool = MemoryPool(mode="full")
        >>> first = pool.empty((1024, 1024)); address = first.data_ptr(); del first
        >>> pool.empty((512, 2048)).data_ptr() == address
        True
        >>> pool.stats()["hits"], pool.stats()["misses"]
        (1, 1)
    """

    def __init__(
        self,
        mode: MemoryMode = "full",
        *,
        smallest: int = 1,
        budget: int | None = None,
        huge_pages: bool = True,
        placement: numa.Placement | None = None,
        machine: System | None = None,
    ) -> None:
        self.mode = mode
        self.smallest = smallest
        self._machine = machine or system()
        self.budget = self._machine.usage().limit // 4 if budget is None else budget
        self._options: dict[str, Any] = {
            "huge_pages": huge_pages and self._machine.has_huge_pages(),
            "placement": placement,
        }
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        """Begin with nothing; leases of before are nobody's, their tensors keep their pages to themselves."""
        self._lock = threading.RLock()  # a signal handler may come between taking it and saying so
        self._owner: int | None = None
        self._leases: set[_Lease] = set()
        self._returned: deque[_Lease] = deque()
        self.recording: Recording | None = None
        self._looked = -math.inf
        self.evictions = 0
        self._live = self._peak = 0
        self._need = Need()
        self._kinds: dict[str, Counters] = {}
        kind = Arena if self.mode == "full" else Buckets
        self._store: Store = kind(Usage(), **self._options)

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        kind: str = "temp",
        lasting: bool = False,
    ) -> Tensor:
        """Return an uninitialised contiguous CPU tensor, as ``torch.empty`` does.

        Args:
            shape: Its sizes.
            dtype: Its type.
            kind: Under which name it is counted.
            lasting: Whether it outlives many others, as caches do; it is placed away from them.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < self.smallest or self.mode == "disabled" or not size or self._owner == threading.get_ident():
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(self._lease(size, kind, lasting), dtype=dtype, count=count)
        if len(shape) != 1:
            tensor = tensor.view(shape)
        if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
            tensor.fill_(math.nan if dtype.is_floating_point or dtype.is_complex else _largest(dtype))
        return tensor

    def _lease(self, size: int, kind: str, lasting: bool) -> memoryview:
        recording = self.recording
        view = self._alone(self._take, size, kind, lasting, recording)
        if recording is not None:
            recording.add(kind, size)
        return view

    def _take(self, size: int, kind: str, lasting: bool, recording: Recording | None) -> memoryview:
        if self._returned:
            self._drain()
        block, fresh = self._store.take(size, lasting=lasting)
        try:
            view = block.view(size)
            lease = _Lease(view, self._returned.append if recording is None else self._record_return)
        except BaseException:
            self._store.give(block)
            raise
        counters = self._kinds.get(kind)
        if counters is None:
            counters = self._kinds[kind] = Counters(kind)
        lease.block, lease.counters, lease.size = block, counters, size
        self._leases.add(lease)
        self._live += block.size
        counters.took(size, hit=fresh == 0)
        if self._need.add(size) or fresh:
            self._shrink(fresh)
        return view

    def _alone(self, action: Callable[..., T], *arguments: Any) -> T:
        """Run while no other thread is inside, and :meth:`_is_interrupted` says so to this one."""
        with self._lock:
            self._owner = threading.get_ident()
            try:
                return action(*arguments)
            finally:
                self._owner = None

    def _is_interrupted(self) -> bool:
        """Whether this thread is inside already: a finalizer or signal handler is running, between any two steps."""
        return self._owner == threading.get_ident()

    def _record_return(self, lease: _Lease) -> None:
        if (recording := self.recording) is not None:
            recording.add(lease.counters.kind, -lease.size)
        self._returned.append(lease)

    def _drain(self) -> None:
        """Put away what has come back; finalizers only note it, since they may run anywhere."""
        while self._returned:
            lease = self._returned.popleft()
            self._leases.remove(lease)
            self._live -= lease.block.size
            self._need.now -= lease.size
            lease.counters.live -= lease.size
            self._store.give(lease.block)
        if (excess := self._store.held - self._live - self.budget) > 0:
            self._evict(excess)

    def _shrink(self, fresh: int) -> None:
        """Before the caller touches fresh memory, give back what is no longer needed, or what others need."""
        self._peak = max(self._peak, self._store.held)
        allowed = max(self._live, self._need.recent + self._need.recent // HEADROOM)
        excess = self._store.held - allowed
        now = time.monotonic()
        if now - self._looked > PRESSURE_SECONDS:
            self._looked = now
            usage = self._machine.usage()
            excess = max(excess, fresh + usage.limit // RESERVE - usage.available)
        if excess > 0:
            self._evict(excess)

    def _evict(self, wanted: int) -> int:
        count, released = self._store.release(wanted)
        self.evictions += count
        return released

    def preallocate(self, plan: Sequence[int]) -> None:
        """Take, touch and return tensors of these sizes in bytes, so that a run finds its memory there."""
        tensors = [self.empty((size,), torch.uint8, kind="plan").zero_() for size in plan]
        del tensors

    def trim(self, wanted: int | None = None) -> int:
        """Give unused memory back to the system, the least valuable first.

        Args:
            wanted: Bytes; all by default.

        Returns:
            Bytes given back; 0, with nothing done, if it interrupts the pool.
        """
        return 0 if self._is_interrupted() else self._alone(lambda: self._trim(wanted))

    def _trim(self, wanted: int | None) -> int:
        self._drain()
        return self._evict(self._store.held if wanted is None else wanted)

    def clear(self) -> None:
        """Give back all that is unused and start counting anew; tensors that live are not touched.

        Does nothing if it interrupts the pool.
        """
        self.trim()
        self.clear_counts()

    def clear_counts(self) -> None:
        """Start counting anew; does nothing if it interrupts the pool."""
        if not self._is_interrupted():
            self._alone(self._clear_counts)

    def _clear_counts(self) -> None:
        self.evictions = 0
        self._peak = self._store.held
        for counters in self._kinds.values():
            counters.hits = counters.misses = 0
            counters.peak = counters.live

    def stats(self) -> dict[str, Any]:
        """Return what was counted.

        Returns:
            ``hits``, ``misses`` (a hit needs no new memory of the system), ``hit_rate``, ``bytes_live`` (asked for
            and in use), ``bytes_cached`` (kept for reuse), ``peak_bytes`` (the most that was held, both together),
            ``fragmentation`` (the part of what is held beyond the most that was in use at once of late),
            ``evictions``, and ``types``: the same by kind of buffer, as far as it makes sense. If it interrupts the
            pool, what has just come back still counts as in use.
        """
        return self._figures() if self._is_interrupted() else self._alone(self._drained_figures)

    def _drained_figures(self) -> dict[str, Any]:
        self._drain()
        return self._figures()

    def _figures(self) -> dict[str, Any]:
        held, need = self._store.held, self._need.recent
        total = Counters.total(self._kinds.values())
        return total.to_dict() | {
            "bytes_cached": held - self._live,
            "peak_bytes": self._peak,
            "fragmentation": max(0.0, 1 - need / held) if held else 0.0,
            "evictions": self.evictions,
            "types": {kind: counters.to_dict() for kind, counters in sorted(self._kinds.items())},
        }


_pools: weakref.WeakSet[MemoryPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
