"""Memory pools: size buckets, and best fit with coalescing."""

from hf_dilated.memory.pool.pool import MemoryPool

__all__ = ["MemoryPool"]
