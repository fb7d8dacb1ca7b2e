"""What ranks send one another: a thin layer over ``torch.distributed``.

Everything travels as bytes, so every dtype does on every backend. Calls return at once; ``wait`` lets the current
stream (on a CPU: the program) wait for the data.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dilated.memory import BufferType, buffers

# torch 2.13 has renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Result = TypeVar("Result")


@dataclass
class Arrival(Generic[Result]):
    """Something on its way."""

    result: Result
    works: list[Any]  # each has ``wait()``
    sent: tuple[Tensor, ...]  # must live until it has left
    wire: "Wire"

    def wait(self) -> Result:
        """Return the result once it is complete.

        Raises:
            RuntimeError: If the communication fails or takes too long; a session names the rank behind it.
        """
        if self.works:
            self.wire.finish(self._wait, not self.sent[0].is_cuda)
        self.works = []
        return self.result

    def _wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of a tensor that travel from the rank that holds them to one that asks for them.

    Attributes:
        rank: The other end.
        held: The first of these rows where they are held.
        place: Where it stands among the rows that arrive.
        count: How many they are.
    """

    rank: int
    held: int
    place: int
    count: int


@dataclass(frozen=True)
class Route:
    """What a rank sends and receives at the same time; both ends of a piece name it in the same order.

    Attributes:
        sends: Pieces of its tensors, and the ranks that ask for them.
        receives: Pieces of other ranks' tensors.
        rows: Rows of what arrives; those of no piece are 0 if there are ``gaps``, else unwritten.
        most: Rows of the largest tensor that any rank holds.
    """

    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]
    rows: int
    most: int
    gaps: bool = False


@dataclass(frozen=True)
class Wire:
    """The ranks of a group; every method is called by all of them, in the same order."""

    group: dist.ProcessGroup | None  # None: a process alone
    rank: int
    ranks: int
    finish: Callable[[Callable[[], None], bool], None] = lambda wait, blocks: wait()  # of a session: Watch.finish

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Wire":
        """Describe a group from the view of this process."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    @classmethod
    def alone(cls) -> "Wire":
        """Describe one process without a group."""
        return cls(None, 0, 1)

    def gather(self, x: Tensor) -> Arrival[Tensor]:
        """Bring everybody's x (…), equally large, together as (P, …)."""
        sent = buffers.contiguous(BufferType.COMM, x)
        if self.group is None:
            return Arrival(sent[None], [], (sent,), self)
        out = empty_rows(sent, self.ranks, *sent.shape)
        work = _all_gather(_bytes(out), _bytes(sent), group=self.group, async_op=True)
        _note(sent.nbytes * (self.ranks - 1))
        return Arrival(out, [work], (sent,), self)

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival[Tensor]:
        """Send the first ``send[0]`` rows of x (R, …) to rank 0 and so on; receive ``receive[s]`` rows from rank s."""
        sent = buffers.contiguous(BufferType.COMM, x)
        out = empty_rows(sent, sum(receive), *sent.shape[1:])
        row = row_bytes(sent)
        work = dist.all_to_all_single(
            _bytes(out), _bytes(sent), [n * row for n in receive], [n * row for n in send], group=self.group,
            async_op=True,
        )  # fmt: skip
        _note((sum(send) - send[self.rank]) * row)
        return Arrival(out, [work], (sent,), self)

    def trade(self, tensors: Sequence[Tensor], route: Route) -> Arrival[tuple[Tensor, ...]]:
        """Send pieces of tensors (R, …), of all of them the same rows, and receive those of others."""
        sent = tuple(x.contiguous() for x in tensors)
        arriving = tuple(arriving_rows(x, route) for x in sent)
        ops = []
        for x, out in zip(sent, arriving, strict=True):
            for piece in route.sends:
                rows_sent = _bytes(x[piece.held : piece.held + piece.count])
                ops.append(dist.P2POp(dist.isend, rows_sent, group=self.group, group_peer=piece.rank))
            for piece in route.receives:
                into = _bytes(out[piece.place : piece.place + piece.count])
                ops.append(dist.P2POp(dist.irecv, into, group=self.group, group_peer=piece.rank))
        if sent[0].is_cuda:
            _meet(self, sent[0].device)
        note_trade(sent, route)
        return Arrival(arriving, list(dist.batch_isend_irecv(ops)) if ops else [], sent, self)


_met: WeakKeyDictionary[dist.ProcessGroup, set[torch.device]] = WeakKeyDictionary()


def _meet(wire: Wire, device: torch.device) -> None:
    """Let all ranks connect: NCCL wants every rank in the first communication, and not all of them have a piece."""
    assert wire.group is not None
    met = _met.setdefault(wire.group, set())
    if device not in met:
        wire.gather(torch.zeros(1, dtype=torch.uint8, device=device)).wait()
        met.add(device)


_records: list[list[int]] = []


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """Record what this process sends to others, in bytes, one entry for every communication."""
    record: list[int] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def note_trade(sent: Sequence[Tensor], route: Route) -> None:
    """Record what a trade sends."""
    _note(sum(piece.count for piece in route.sends) * sum(row_bytes(x) for x in sent))


def _note(count: int) -> None:
    for record in _records:
        record.append(count)


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """Return unwritten memory."""
    return buffers.empty(BufferType.COMM, shape, like.dtype, like.device)


def arriving_rows(x: Tensor, route: Route) -> Tensor:
    """Return memory for what arrives of tensors like x (R, …)."""
    out = empty_rows(x, route.rows, *x.shape[1:])
    return out.zero_() if route.gaps else out


def row_bytes(x: Tensor) -> int:
    """Bytes of a row of x (R, …)."""
    return x.shape[1:].numel() * x.element_size()


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
