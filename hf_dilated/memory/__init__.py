"""Memory: which pool a model gets, the pools, and the buffers that attention takes from them."""

from hf_dilated.memory.buffers import AttentionBufferManager, BufferType
from hf_dilated.memory.policy import MemoryPolicy, auto_configure_memory_pool
from hf_dilated.memory.pool import MemoryPool

__all__ = ["AttentionBufferManager", "BufferType", "MemoryPolicy", "MemoryPool", "auto_configure_memory_pool"]
