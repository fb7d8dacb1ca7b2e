"""What ranks send one another: a thin layer over ``torch.distributed``.

Everything travels as bytes, so every dtype does on every backend. Calls return at once; ``wait`` lets the current
stream (on a CPU: the program) wait for the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dilated.memory import BufferType, buffers

# torch 2.13 has renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Arrival:
    """A tensor on its way."""

    tensor: Tensor
    works: list[Any]
    sent: Tensor  # must live until it has left
    wire: "Wire"

    def wait(self) -> Tensor:
        """Return the tensor once it is complete.

        Raises:
            RuntimeError: If the communication fails or takes too long; a session names the rank behind it.
        """
        if self.works:
            self.wire.finish(self._wait, not self.tensor.is_cuda)
        self.works = []
        return self.tensor

    def _wait(self) -> None:
        for work in self.works:
            work.wait()


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

    def gather(self, x: Tensor) -> Arrival:
        """Bring everybody's x (…), equally large, together as (P, …)."""
        if self.group is None:
            return Arrival(x[None], [], x, self)
        sent = x.contiguous()
        out = _buffer(sent, self.ranks, *sent.shape)
        work = _all_gather(_bytes(out), _bytes(sent), group=self.group, async_op=True)
        return Arrival(out, [work], sent, self)

    def shift(self, x: Tensor, distance: int, *, sends: bool = True, receives: int) -> Arrival:
        """Send x (T, …) to the rank ``distance`` places on; receive ``receives`` rows from the one as far back.

        Both ends must agree on what travels: ``sends`` is False where the receiver expects nothing.
        """
        sent = x.contiguous()
        out = _buffer(sent, receives, *sent.shape[1:])
        to, from_ = (self.rank + distance) % self.ranks, (self.rank - distance) % self.ranks
        ops = [dist.P2POp(dist.isend, _bytes(sent), group=self.group, group_peer=to)] if sends else []
        if receives:
            ops.append(dist.P2POp(dist.irecv, _bytes(out), group=self.group, group_peer=from_))
        return Arrival(out, list(dist.batch_isend_irecv(ops)) if ops else [], sent, self)

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        """Send the first ``send[0]`` rows of x (R, …) to rank 0 and so on; receive ``receive[s]`` rows from rank s."""
        sent = x.contiguous()
        out = _buffer(sent, sum(receive), *sent.shape[1:])
        row = sent.element_size() * (sent[0].numel() if len(sent) else out[0].numel() if len(out) else 0)
        work = dist.all_to_all_single(
            _bytes(out), _bytes(sent), [n * row for n in receive], [n * row for n in send], group=self.group,
            async_op=True,
        )  # fmt: skip
        return Arrival(out, [work], sent, self)


def _buffer(like: Tensor, *shape: int) -> Tensor:
    return buffers.empty(BufferType.COMM, shape, like.dtype, like.device)


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
