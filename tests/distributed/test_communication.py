"""What a process remembers of a group goes with it."""

import gc
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dilated import sequence_parallel
from hf_dilated.distributed import communication
from hf_dilated.distributed.communication import Wire, bytes_sent
from tests.distributed.processes import run_on_ranks


def meet(rank: int) -> tuple[list[int], Any, Any]:
    """Return how much was sent at every meeting, and what is left of the session and the group."""
    group, sent = dist.new_group([0, 1]), []
    with sequence_parallel(group) as sp:
        watch = weakref.ref(sp.watch)
        for wire in (sp.wire, Wire.of(group)):
            with bytes_sent() as record:
                communication._meet(wire, torch.device("cpu"))
            sent.append(sum(record))
    del sp, wire
    until = time.monotonic() + 10
    while gc.collect() >= 0 and watch() is not None and time.monotonic() < until:
        time.sleep(0.05)  # its threads end
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return sent, watch(), len(communication._met)


@pytest.mark.timeout(60)
def test_ranks_meet_once_and_leave_nothing() -> None:
    assert run_on_ranks(2, meet, limit=40) == [([1, 0], None, 0)] * 2
