"""Ranks as processes: every test function runs on all of them, within a hard limit of time."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

LIMIT = 120  # seconds for all ranks together
Key, Result = TypeVar("Key"), TypeVar("Result")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_on_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT, lost: Collection[int] = ()
) -> list[Any]:
    """Call ``function(rank, *arguments)`` in a process for every rank.

    Args:
        lost: Ranks that are not expected to answer.

    Returns:
        What the ranks returned; of a rank that raised, its traceback; of one that was killed, its exit code; of a
        lost one, None.

    Raises:
        TimeoutError: If a rank has not ended in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_enter, args=(rank, ranks, port, pipe[1], function, arguments), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit
    try:
        results: list[Any] = []
        for (receiver, sender), process in zip(pipes, processes, strict=True):
            sender.close()
            if len(results) in lost:
                results.append(None)
                continue
            if not receiver.poll(max(0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {len(results)} has not ended within {limit} seconds")
            try:
                results.append(receiver.recv())
            except EOFError:
                process.join(5)
                results.append(process.exitcode)
        return results
    finally:
        for process in processes:
            process.join(2)
            process.kill()


def divided(keys: Sequence[Key], compute: Callable[[Key], Result]) -> dict[Key, Result]:
    """Return what ``compute`` gives for every key, on all ranks; each computes a part of it."""
    own = {key: compute(key) for key in keys[dist.get_rank() :: dist.get_world_size()]}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: result for part in parts for key, result in part.items()}


def _enter(rank: int, ranks: int, port: int, pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        result = function(rank, *arguments)
    except BaseException:
        result = traceback.format_exc()
    pipe.send(result)
    pipe.close()
