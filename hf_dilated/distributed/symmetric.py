"""Pieces of other ranks' tensors, pulled by the copy engines of a GPU over NVLink from symmetric memory.

A rank puts its tensors where all ranks of the host can read them, and each copies the pieces that it asks for on a
stream of its own, so that no kernel of a communication library takes multiprocessors from attention. Two buffers take
turns: whoever writes one again has passed a barrier behind which all others have read it. They are a group's, and go
with it, or with its session.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dilated.distributed.communication import Arrival, Route, Wire, arriving_rows, note_trade, row_bytes
from hf_dilated.memory.persistent import PersistentBuffers


@dataclass
class _Pulls:
    """What this process remembers of a group: its buffers, the stream of its copies, and whose turn it is."""

    group: str
    stream: torch.cuda.Stream | None
    buffers: PersistentBuffers = field(default_factory=PersistentBuffers)
    turn: int = 0
    met: torch.cuda.Event | None = None  # the last barrier
    handle: Any = None  # the last one; all have the same ranks
    sizes: dict[str, int] = field(default_factory=dict)  # of buffers, in bytes

    def hand_out(self, number: int, x: Tensor, most: int) -> Any:
        """Put a tensor where the others reach it; return how theirs are reached."""
        name, shape = f"ring {self.turn} {number}", (most, *x.shape[1:])
        size = most * row_bytes(x)
        if size > self.sizes.get(name, 0):
            self.sizes[name] = size
            if x.is_cuda:
                torch.cuda.synchronize(x.device)  # a smaller buffer goes: nobody reads or writes it any more
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")  # not in every build
        try:
            buffer = self.buffers.get(name, shape, x.dtype, x.device, symmetric_group=self.group)
            handle = symmetric.rendezvous(buffer, self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f'transport="symmetric": the ranks cannot reach one another\'s memory ({error}); use "auto"'
            ) from error
        buffer[: len(x)].copy_(x)
        self.handle = handle
        return lambda rank: handle.get_buffer(rank, shape, x.dtype)

    def meet(self) -> None:
        """Wait until all ranks have handed out this turn's tensors; they have then read those of the turn before."""
        self.handle.barrier(channel=self.turn)
        self.met = None if self.stream is None else self.stream.record_event()


_of_group: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, _Pulls]] = WeakKeyDictionary()
_abandoned: list[dict[torch.device, _Pulls]] = []  # of failed sessions: freeing waits for barriers that may never end


def _pulls_of(group: dist.ProcessGroup, device: torch.device) -> _Pulls:
    pulls = _of_group.setdefault(group, {})
    if device not in pulls:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pulls[device] = _Pulls(group.group_name, stream)
    return pulls[device]


@contextmanager
def buffers_of_session(wire: Wire) -> Iterator[None]:
    """Give the buffers of a group back when its session ends; after a failure the next one starts with others."""
    assert wire.group is not None
    try:
        yield
        for device in _of_group.get(wire.group, {}):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            wire.gather(torch.zeros(1, device=device)).wait().cpu()  # all ranks have read what they pull
    except BaseException:
        if pulls := _of_group.pop(wire.group, None):
            _abandoned.append(pulls)
        raise
    _of_group.pop(wire.group, None)


@dataclass(frozen=True)
class SymmetricWire(Wire):
    """A wire that pulls what is traded; everything else travels as ever."""

    @classmethod
    def over(cls, wire: Wire, device: torch.device) -> "SymmetricWire":
        """Pull over the group of another wire.

        Raises:
            ValueError: If tensors are not on a GPU.
        """
        if device.type != "cuda":
            raise ValueError(f'transport="symmetric": needs GPUs, the tensors are on {device}; use "auto"')
        return cls(wire.group, wire.rank, wire.ranks, wire.finish)

    def trade(self, tensors: Sequence[Tensor], route: Route) -> Arrival[tuple[Tensor, ...]]:
        """Let other ranks pull pieces of tensors (R, …), and pull theirs.

        Raises:
            RuntimeError: If the ranks cannot reach one another's memory.
        """
        assert self.group is not None
        device = tensors[0].device
        arriving = tuple(arriving_rows(x, route) for x in tensors)
        note_trade(tensors, route)
        if not route.most:
            return Arrival(arriving, [], tuple(tensors), self)
        pulls = _pulls_of(self.group, device)
        if pulls.met is not None:
            pulls.met.wait()
        pulls.turn = 1 - pulls.turn
        theirs = [pulls.hand_out(number, x, route.most) for number, x in enumerate(tensors)]
        if pulls.stream is not None:
            pulls.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(pulls.stream):
            pulls.meet()
            for out, of_rank in zip(arriving, theirs, strict=True):
                for piece in route.receives:
                    held = of_rank(piece.rank)[piece.held : piece.held + piece.count]
                    out[piece.place : piece.place + piece.count].copy_(held)
        return Arrival(arriving, [_Pulled(pulls.stream)], tuple(tensors), self)


class _Pulled:
    """Copies on a stream."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.event = None if stream is None else stream.record_event()

    def wait(self) -> None:
        """Let the current stream wait for them."""
        if self.event is not None:
            self.event.wait()
