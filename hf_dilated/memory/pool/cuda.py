"""CUDA: a ``torch.cuda.MemPool`` of attention's own, so that its buffers fragment nobody else's memory.

The caching allocator already reuses memory, and orders its reuse by stream; this adds isolation, nothing else.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_dilated.memory.pool.statistics import Counters


class CudaPool:
    """The pool of one device.

    Args:
        device: A CUDA device.
        smallest: Bytes of the smallest tensor that is pooled; others are torch's own.
    """

    def __init__(self, device: torch.device, smallest: int = 1) -> None:
        self.device = device
        self.smallest = smallest
        self._pool = torch.cuda.MemPool()
        self._lock = threading.Lock()
        self._kinds: dict[str, Counters] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, kind: str = "temp", lasting: bool = False) -> Tensor:
        """Return an uninitialised tensor; a graph that is being captured keeps its own pool."""
        del lasting  # the allocator places it
        if math.prod(shape) * dtype.itemsize < self.smallest or torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=dtype, device=self.device)
        with torch.cuda.use_mem_pool(self._pool, self.device):
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        with self._lock:
            self._kinds.setdefault(kind, Counters(kind)).hits += 1
        return tensor

    def stats(self) -> dict[str, Any]:
        """Return what the allocator says of this pool; a miss is a segment that the device had to give."""
        segments = self._pool.snapshot()
        live = sum(segment["active_size"] for segment in segments)
        held = sum(segment["total_size"] for segment in segments)
        requests, misses = sum(c.hits for c in self._kinds.values()), len(segments)
        return {
            "hits": max(0, requests - misses),
            "misses": misses,
            "hit_rate": max(0, requests - misses) / max(1, requests),
            "bytes_live": live,
            "bytes_cached": held - live,
            "peak_bytes": held,
            "fragmentation": 1 - live / held if held and live else 0.0,
            "evictions": 0,
            "types": {kind: {"hits": counters.hits} for kind, counters in sorted(self._kinds.items())},
        }

    def trim(self, wanted: int | None = None) -> int:
        """Give unused segments back to the device, with those of the default pool."""
        del wanted
        before = sum(segment["total_size"] for segment in self._pool.snapshot())
        torch.cuda.empty_cache()
        return before - sum(segment["total_size"] for segment in self._pool.snapshot())

    clear = trim
