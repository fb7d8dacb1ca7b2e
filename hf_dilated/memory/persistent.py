"""Buffers that stay: workspaces of CUDA graphs, and what ranks send and receive with."""

import importlib
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Key(NamedTuple):
    name: str
    device: torch.device
    group: str | None


class PersistentBuffers:
    """Memory with a fixed address, by name; it grows to the largest size that was asked for and is never reused.

    Who asks for a name again gets the same bytes, so one user at a time: name buffers by what they hold and by turn
    (``"key 0"``, ``"key 1"``). What a CUDA graph has captured stays where it is, also when a larger one is asked for.

    Example:
        >>> buffers = PersistentBuffers()
        >>> first = buffers.get("key 0", (4, 8), torch.float32, torch.device("cpu"))
        >>> first.data_ptr() == buffers.get("key 0", (2, 8), torch.float32, torch.device("cpu")).data_ptr()
        True
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[_Key, Tensor] = {}
        self._captured: set[_Key] = set()
        self._kept: list[Tensor] = []

    def get(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        symmetric_group: str | None = None,
    ) -> Tensor:
        """Return the buffer of a name.

        Args:
            name: What it is for.
            shape: Its sizes.
            dtype: Its type.
            device: Where it lies.
            symmetric_group: Name of a process group: allocate symmetric memory, which its ranks can read directly. All
                of them must then ask for the same buffers in the same order.
                A name may come again after its group was destroyed, with other ranks: ``clear()`` before that.
        """
        key = _Key(name, device, symmetric_group)
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < size:
                if buffer is not None and key in self._captured:
                    self._kept.append(buffer)
                buffer = self._buffers[key] = _allocate(size, device, symmetric_group)
                self._captured.discard(key)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._captured.add(key)
        return buffer[:size].view(dtype).view(shape)

    def size(self) -> int:
        """Return the bytes of all buffers."""
        with self._lock:
            return sum(buffer.numel() for buffer in [*self._buffers.values(), *self._kept])

    def clear(self) -> None:
        """Forget all buffers; CUDA graphs that captured one must not be replayed any more."""
        with self._lock:
            self._buffers.clear()
            self._captured.clear()
            self._kept.clear()


def _allocate(size: int, device: torch.device, symmetric_group: str | None) -> Tensor:
    if symmetric_group is None:
        return torch.empty(size, dtype=torch.uint8, device=device)
    symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")  # not in every build
    buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
    symmetric.rendezvous(buffer, symmetric_group)
    return buffer
