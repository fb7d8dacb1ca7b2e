"""Pulls from symmetric memory, with files that all processes map in place of it: contents, order, refusals."""

import gc
import random
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from hf_dilated import RankLostError, RingConfig, SequenceLayout, ring_attention, sequence_parallel
from hf_dilated.distributed.ring import _fits
from hf_dilated.distributed.shares import Problem
from hf_dilated.distributed.symmetric import SymmetricWire
from hf_dilated.patterns import DensePattern
from tests.distributed.processes import divided, run_on_ranks
from tests.distributed.test_ring import Case, differences, shards_of


class Files:
    """Symmetric memory: the n-th buffer of every rank is a file."""

    def __init__(self, folder: str, rank: int) -> None:
        self.folder, self.rank, self.count, self.numbers = folder, rank, 0, dict[int, int]()
        self.buffers: list[weakref.ref[torch.Tensor]] = []

    def open(self, rank: int, number: int, size: int) -> torch.Tensor:
        return torch.from_file(f"{self.folder}/{rank}-{number}", shared=True, size=size, dtype=torch.uint8)

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.count += 1
        buffer = self.open(self.rank, self.count, size)
        self.numbers[buffer.data_ptr()] = self.count
        self.buffers.append(weakref.ref(buffer))
        return buffer

    def rendezvous(self, buffer: torch.Tensor, group: str) -> "Handle":
        return Handle(self, self.numbers[buffer.untyped_storage().data_ptr()])


class Handle:
    """Reaches a buffer of all ranks; some come to a barrier late, and leave it late."""

    def __init__(self, files: Files, number: int) -> None:
        self.files, self.number, self.draw = files, number, random.Random(files.rank)

    def barrier(self, channel: int) -> None:
        time.sleep(self.draw.random() * 2e-3)
        dist.barrier()
        time.sleep(self.draw.random() * 2e-3)

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return self.files.open(rank, self.number, count * dtype.itemsize).view(dtype).view(shape)


def pretend(folder: str, rank: int) -> Files:
    """Let files of this process stand for symmetric memory, and its CPU for a GPU."""
    files = Files(folder, rank)
    symmetric_memory.empty, symmetric_memory.rendezvous = files.empty, files.rendezvous
    SymmetricWire.over = classmethod(lambda cls, wire, device: cls(wire.group, wire.rank, wire.ranks, wire.finish))  # type: ignore[method-assign]
    return files


def check(rank: int, ranks: int, folder: str) -> list[str]:
    pretend(folder, rank)
    seeds, wrong = range(20), []
    expected = divided(seeds, lambda seed: Case(seed).expected())
    for seed in seeds:
        case = Case(seed)
        layout = SequenceLayout.of((case.rows, case.length), ranks, kind=case.kind, **case.options)
        *inputs, grad = shards_of(case, layout, rank)
        inputs = [x.requires_grad_() for x in inputs]
        config = RingConfig(transport="symmetric", gather_bytes=0 if seed % 2 else 1 << 30)
        output, lse = ring_attention(
            *inputs, layout, group=dist.group.WORLD, pattern=case.pattern, is_causal=case.is_causal, config=config,
            return_lse=True,
        )  # fmt: skip
        found = [output.detach(), lse, *torch.autograd.grad(output, inputs, grad)]
        wrong += differences(case, layout, rank, found, expected[seed])
    return wrong


@pytest.mark.timeout(100)
def test_pulled_pieces_give_the_oracles_results(tmp_path: Path) -> None:
    for rank, wrong in enumerate(run_on_ranks(3, check, 3, str(tmp_path))):
        assert wrong == [], f"rank {rank}"


def refused(rank: int) -> str:
    layout = SequenceLayout.of((1, 8), 2)
    inputs: Any = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    try:
        ring_attention(*inputs, layout, group=dist.group.WORLD, config=RingConfig(transport="symmetric"))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.timeout(60)
def test_tensors_on_a_cpu_are_refused() -> None:
    for message in run_on_ranks(2, refused):
        assert 'transport="symmetric": needs GPUs, the tensors are on cpu; use "auto"' in message


def sessions(rank: int, folder: str) -> list[Any]:
    """Return what sessions leave: how many buffers live at every point, and whether results are those of the first."""
    files, group = pretend(folder, rank), dist.new_group([0, 1])
    config = RingConfig(transport="symmetric", timeout_seconds=3)
    layout = SequenceLayout.of((1, 8), 2)
    torch.manual_seed(rank)
    inputs: Any = [torch.randn(1, 2, 4, 8) for _ in range(3)]

    def live() -> int:
        gc.collect()
        return sum(buffer() is not None for buffer in files.buffers)

    with sequence_parallel(group, config):
        first = ring_attention(*inputs, layout, config=config)
        found: list[Any] = [live()]
    found.append(live())
    try:
        with sequence_parallel(group, config):
            ring_attention(*inputs, layout, config=config)
            raise KeyError
    except (KeyError, RankLostError):
        found.append(live())
    with sequence_parallel(group, config):
        found += [torch.equal(ring_attention(*inputs, layout, config=config), first), live()]
    found.append(live())
    ring_attention(*inputs, layout, group=group, config=config)
    found.append(live())
    dist.destroy_process_group(group)
    del group
    return [*found, live()]


@pytest.mark.timeout(60)
def test_buffers_go_with_their_session_or_group(tmp_path: Path) -> None:
    of_a_failure = 2  # a barrier may still wait there
    expected = [2, 0, of_a_failure, True, 2 + of_a_failure, of_a_failure, 2 + of_a_failure, of_a_failure]
    assert run_on_ranks(2, sessions, str(tmp_path), limit=50) == [expected] * 2


def test_what_goes_home_counts() -> None:
    problem = Problem(SequenceLayout.of((1, 80), 8), DensePattern().spec, 1, 1, is_causal=True, packs=False)
    key = torch.zeros(10, 1, 4)
    for transport, shards in (("gather", 8), ("symmetric", 8 + 2 * 7)):
        limits = [2 * shards * key.nbytes - missing for missing in (0, 1)]
        configs = [RingConfig(transport=transport, gather_bytes=limit) for limit in limits]
        assert [_fits(problem, config, key, key) for config in configs] == [True, False]
