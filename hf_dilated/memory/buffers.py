"""The one place where attention allocates.

The engine asks :func:`empty`, which asks the manager that is in use in this thread, or torch if there is none. The
policy of a model reaches it as text with every call of an operator (:func:`using`), forward and backward, in whatever
thread that runs.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

from hf_dilated.config.memory import MemoryMode
from hf_dilated.memory import numa
from hf_dilated.memory.persistent import PersistentBuffers
from hf_dilated.memory.policy import MemoryPolicy
from hf_dilated.memory.pool import MemoryPool
from hf_dilated.memory.pool.cuda import CudaPool
from hf_dilated.memory.recording import Recording


class BufferType(StrEnum):
    """What a buffer holds; ``OUTPUT`` is whatever a forward or backward pass returns."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    SCORES = "scores"
    WEIGHTS = "weights"
    TEMP = "temp"
    COMM = "comm"
    MASK = "mask"
    CACHE = "cache"


Lifetime = Literal["call", "graph", "sequence"]
Place = Literal["pool", "torch"]


@dataclass(frozen=True)
class Rule:
    """How long a kind of buffer lives, and where its memory comes from.

    Attributes:
        lifetime: ``"call"`` (scratch), ``"graph"`` (until backward has used it, or the caller drops it),
            or ``"sequence"`` (outlives many calls: placed away from what comes and goes).
        place: ``"pool"`` or ``"torch"`` (too small or too rare to pool).
    """

    lifetime: Lifetime
    place: Place = "pool"


RULES: dict[BufferType, Rule] = {
    BufferType.QUERY: Rule("call"),
    BufferType.KEY: Rule("call"),
    BufferType.VALUE: Rule("call"),
    BufferType.OUTPUT: Rule("graph"),
    BufferType.SCORES: Rule("call"),
    BufferType.WEIGHTS: Rule("call"),
    BufferType.TEMP: Rule("call"),
    BufferType.COMM: Rule("call"),
    BufferType.MASK: Rule("graph", "torch"),
    BufferType.CACHE: Rule("sequence"),
}
# What differs from these by backend: the first prefix of its name that fits.
BACKEND_RULES: dict[str, dict[BufferType, Rule]] = {
    "block_sparse": {BufferType.MASK: Rule("sequence")},
}


def rules_for(attention_type: str) -> dict[BufferType, Rule]:
    """Return the rules of a backend.

    Example:
        >>> rules_for("block_sparse")[BufferType.MASK].lifetime
        'sequence'
    """
    own = next((rules for prefix, rules in BACKEND_RULES.items() if attention_type.startswith(prefix)), {})
    return RULES | own


class AttentionBufferManager:
    """Hands out the buffers of one policy; managers of policies that agree on memory share their pools.

    Args:
        policy: Where memory comes from.

    Example:
        >>> from hf_dilated.memory import auto_configure_memory_pool
        >>> manager = AttentionBufferManager(auto_configure_memory_pool(8192))
        >>> manager.mode
        'full'
        >>> manager.empty(BufferType.OUTPUT, (2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy = policy
        self.rules = rules_for(policy.attention_type)

    @property
    def mode(self) -> MemoryMode:
        """The mode of the pool that allocates."""
        return self.pool().mode

    def pool(self) -> MemoryPool:
        """Return the pool of the CPU; it is made when it is first needed."""
        policy = self.policy
        return shared_pool(policy.mode, policy.smallest, policy.budget, policy.huge_pages, policy.numa, policy.plan)

    def empty(
        self,
        kind: BufferType,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return an uninitialised contiguous tensor.

        Args:
            kind: What it is for; decides about its lifetime and place.
            shape: Its sizes.
            dtype: Its type.
            device: Where it lies.
        """
        device = torch.device(device)
        rule = self.rules[kind]
        if rule.place == "torch" or self.policy.mode == "disabled":
            return torch.empty(shape, dtype=dtype, device=device)
        lasting = rule.lifetime == "sequence"
        if device.type == "cpu":
            return self.pool().empty(shape, dtype, kind=kind, lasting=lasting)
        if device.type == "cuda" and self.policy.cuda:
            return shared_cuda_pool(device, self.policy.smallest).empty(shape, dtype, kind=kind, lasting=lasting)
        return torch.empty(shape, dtype=dtype, device=device)

    def persistent(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        symmetric_group: str | None = None,
    ) -> Tensor:
        """Return the buffer of a name, with a fixed address; see :class:`PersistentBuffers`.

        For what ranks exchange, and for workspaces of CUDA graphs. All managers of a process share them.
        """
        return persistent_buffers.get(name, shape, dtype, torch.device(device), symmetric_group=symmetric_group)

    def preallocate(self, plan: Sequence[int]) -> None:
        """Take and return buffers of these sizes in bytes, so that a run finds its memory there (CPU)."""
        if self.policy.mode != "disabled":
            self.pool().preallocate(plan)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Record every buffer that is taken from the pool, by any manager that shares it.

        Example:
            >>> from hf_dilated.memory import auto_configure_memory_pool
            >>> manager = AttentionBufferManager(auto_configure_memory_pool(8192, smallest=1))
            >>> with manager.record() as recording: _ = manager.empty(BufferType.TEMP, (1024,))
            >>> recording.peak()
            4096
        """
        pool, recording = self.pool(), Recording()
        pool.recording, before = recording, pool.recording
        try:
            yield recording
        finally:
            pool.recording = before

    def stats(self) -> dict[str, Any]:
        """Return the figures of the pools: ``cpu`` and, where they are pooled, CUDA devices by name.

        See :meth:`hf_dilated.memory.MemoryPool.stats`.
        """
        found = {"cpu": self.pool().stats()}
        if self.policy.cuda and torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                device = torch.device("cuda", index)
                found[str(device)] = shared_cuda_pool(device, self.policy.smallest).stats()
        return found

    def clear(self) -> None:
        """Give back all that is unused."""
        self.pool().clear()


@functools.cache
def shared_pool(
    mode: MemoryMode, smallest: int, budget: int, huge_pages: bool, use_numa: bool, plan: tuple[int, ...]
) -> MemoryPool:
    """Return the process's pool with these options."""
    placement = numa.own_placement() if use_numa else None
    pool = MemoryPool(mode, smallest=smallest, budget=budget, huge_pages=huge_pages, placement=placement)
    pool.preallocate(plan)
    return pool


def shared_cuda_pool(device: torch.device, smallest: int) -> CudaPool:
    """Return the process's pool on a device, by default on the current one."""
    return _cuda_pool(torch.cuda.current_device() if device.index is None else device.index, smallest)


@functools.cache
def _cuda_pool(index: int, smallest: int) -> CudaPool:
    return CudaPool(torch.device("cuda", index), smallest)


@functools.lru_cache(maxsize=64)
def manager_of(spec: str) -> AttentionBufferManager:
    """Return the manager of a policy that travels as text."""
    return AttentionBufferManager(MemoryPolicy.parse(spec))


persistent_buffers = PersistentBuffers()


class _InUse(threading.local):
    manager: AttentionBufferManager | None = None


_in_use = _InUse()


@contextmanager
def using(spec: str) -> Iterator[None]:
    """Allocate by a policy in this thread; of uses within one another the innermost counts.

    Args:
        spec: :attr:`MemoryPolicy.spec`; empty for torch's own allocations.
    """
    before = _in_use.manager
    _in_use.manager = manager_of(spec) if spec else None
    try:
        yield
    finally:
        _in_use.manager = before


def in_use() -> AttentionBufferManager | None:
    """Return the manager of this thread; None for torch's own allocations."""
    return _in_use.manager


def empty(kind: BufferType, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised contiguous tensor from the manager in use, or from torch."""
    manager = _in_use.manager
    if manager is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return manager.empty(kind, shape, dtype, device)


def full(kind: BufferType, shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of one number."""
    return empty(kind, shape, dtype, device).fill_(value)


def converted(kind: BufferType, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (B, H, N, …), stored token by token, in a dtype; x itself if it has that one."""
    if x.dtype == dtype:
        return x
    stored = x.transpose(1, 2)
    return empty(kind, stored.shape, dtype, x.device).copy_(stored).transpose(1, 2)


def contiguous(kind: BufferType, x: Tensor) -> Tensor:
    """Return x with its numbers in order; x itself if they are."""
    return x if x.is_contiguous() else empty(kind, x.shape, x.dtype, x.device).copy_(x)


def joined(kind: BufferType, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return tensors side by side, as ``torch.cat`` does."""
    if _in_use.manager is None or _needs_gradient(*tensors) or len({x.dtype for x in tensors}) > 1:
        return torch.cat(list(tensors), dim)
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return torch.cat(list(tensors), dim, out=empty(kind, shape, tensors[0].dtype, tensors[0].device))


def chosen(kind: BufferType, x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return entries of x along a dimension, as ``torch.gather`` does."""
    if _in_use.manager is None or _needs_gradient(x):
        return x.gather(dim, index)
    return torch.gather(x, dim, index, out=empty(kind, index.shape, x.dtype, x.device))


def _needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to know; it knows nothing of what is written into a given tensor."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def scaled(kind: BufferType, x: Tensor, factor: Tensor) -> Tensor:
    """Return x (B, H, N, D), stored token by token, times a factor in a dtype at least as wide; in the dtype of x."""
    if _in_use.manager is None or _needs_gradient(x, factor):
        return (x * factor).to(x.dtype)
    stored = x.transpose(1, 2)
    product = empty(kind, stored.shape, factor.dtype, x.device).transpose(1, 2)
    return converted(kind, torch.mul(x, factor, out=product), x.dtype)


def gathered(x: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """Return ``x[index]`` as scratch."""
    if _in_use.manager is None:
        return x[index]
    shape = torch.broadcast_shapes(*(i.shape for i in index)) + x.shape[len(index) :]
    return torch.ops.aten.index.Tensor_out(x, index, out=empty(BufferType.TEMP, shape, x.dtype, x.device))
