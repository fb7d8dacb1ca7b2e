"""What happens when a rank fails: the others end with an error that names it, in time, and training resumes."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dilated import RankLostError, RingConfig, sequence_parallel
from tests.distributed.processes import run_on_ranks

TIMEOUT = 3
LATEST = 60  # seconds; detection takes TIMEOUT, the grace of a rank that hangs elsewhere 10: a slow machine has time
BATCH = {"input_ids": torch.arange(24)[None]}


def fail(rank: int, how: str, victim: int, path: str) -> tuple[str, float]:
    """Two steps with a checkpoint each, then one rank fails; return what this one hears, and after how long."""
    start = time.monotonic()
    try:
        with sequence_parallel(config=RingConfig(timeout_seconds=TIMEOUT)) as sp:
            for step in range(1, 9):
                sp.shard(BATCH)
                if rank == 0 and step < 3:
                    (Path(path) / f"{step}.partial").write_text(str(step))
                    (Path(path) / f"{step}.partial").rename(Path(path) / f"{step}.done")
                if step == 3:
                    start = time.monotonic()
                    if rank == victim:
                        _fail(how)
                    sp.sum(torch.ones(3))
    except RankLostError as error:
        return str(error), time.monotonic() - start
    except KeyError as error:
        return repr(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


def _fail(how: str) -> None:
    match how:
        case "raises":
            raise KeyError("a bug")
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leaves":
            raise SystemExit
        case "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "victim", "words"),
    [
        ("raises", 1, "rank 1 failed at step 3: KeyError: 'a bug'"),
        ("is killed", 2, "rank 2 gave its last sign of life 3 seconds ago, at step 3"),
        ("hangs", 1, "rank 1 gave its last sign of life 3 seconds ago, at step 3"),
        ("is killed", 0, "rank 0 no longer answers"),
        ("hangs", 0, "rank 0 no longer answers for 3 seconds"),
    ],
)
def test_the_others_name_the_rank_and_the_step(tmp_path: Path, how: str, victim: int, words: str) -> None:
    results = run_on_ranks(3, fail, how, victim, str(tmp_path), limit=100, lost={victim} if how != "raises" else set())
    for rank, result in enumerate(results):
        if rank != victim:
            message, seconds = result
            assert words in message, message
            assert seconds < LATEST
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.done", "2.done"]


def missing(rank: int, where: str) -> str:
    """One rank lives, but keeps the other waiting for longer than the group allows."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    try:
        if rank == 1 and where == "outside":
            time.sleep(4)
        with sequence_parallel(group, RingConfig(timeout_seconds=1)) as sp:
            sp.shard(BATCH)
            if rank == 1:
                time.sleep(5)
            sp.shard(BATCH)
    except RankLostError as error:
        return str(error)
    return "nothing"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("where", "words"),
    [("inside", "is alive, but has not come to step 2"), ("outside", "has not opened the session")],
)
def test_a_rank_that_does_not_come(where: str, words: str) -> None:
    messages: list[Any] = run_on_ranks(2, missing, where, lost={1} if where == "outside" else set())
    expected = f"rank 1 {words} within 2 seconds, the timeout of the process group"
    assert expected in messages[0]
    if where == "inside":
        assert f"rank 0 failed at step 2: RankLostError: {expected}" in messages[1]


def slow(rank: int, where: str, slow_rank: int) -> str:
    """A rank takes thrice the time after which a silent one is lost."""
    with contextlib.ExitStack() as stack:
        for place in ("outside", "before a step", "before a communication"):
            if rank == slow_rank and place == where:
                time.sleep(3)
            if place == "outside":
                sp = stack.enter_context(sequence_parallel(config=RingConfig(timeout_seconds=1)))
                sp.shard(BATCH)
            elif place == "before a step":
                sp.shard(BATCH)
            elif place == "before a communication":
                sp.sum(torch.ones(3))
    return "fine"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_slow_rank_is_waited_for(slow_rank: int) -> None:
    places = ("outside", "before a step", "before a communication")
    with ThreadPoolExecutor() as sleeping:  # at the same time
        found = list(sleeping.map(lambda where: run_on_ranks(2, slow, where, slow_rank), places))
    assert found == [["fine", "fine"]] * 3


def leaves_last(rank: int, last: int) -> str:
    """One rank, be it the one whose process holds the store, leaves long before the other."""
    with sequence_parallel(config=RingConfig(timeout_seconds=5)) as sp:
        sp.shard(BATCH)
        if rank == last:
            time.sleep(3)
    return "fine"


@pytest.mark.timeout(60)
def test_ranks_may_leave_one_after_the_other() -> None:
    with ThreadPoolExecutor() as sleeping:
        found = list(sleeping.map(lambda last: run_on_ranks(2, leaves_last, last), (0, 1)))
    assert found == [["fine", "fine"]] * 2


def without_the_store(rank: int) -> str:
    """The process that holds the store dies; it is not of the group."""
    group = dist.new_group([1, 2])
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with sequence_parallel(group, RingConfig(timeout_seconds=1)) as sp:
            sp.shard(BATCH)
            time.sleep(3)
    except RankLostError as error:
        return str(error)
    return "nothing"


@pytest.mark.timeout(60)
def test_who_holds_the_store_is_named() -> None:
    for message in run_on_ranks(3, without_the_store, lost={0})[1:]:
        assert "rank 0 no longer answers" in message


def other_sessions(rank: int) -> str:
    """One rank has opened sessions of its own before the common ones."""
    alone = dist.new_group([0])
    for _ in range(2):
        if rank == 0:
            with sequence_parallel(alone) as sp:
                sp.shard(BATCH)
        with sequence_parallel(config=RingConfig(timeout_seconds=2)) as sp:
            sp.shard(BATCH)
            sp.sum(torch.ones(3))
    return "fine"


@pytest.mark.timeout(60)
def test_sessions_of_other_groups_do_not_count() -> None:
    assert run_on_ranks(2, other_sessions, limit=30) == ["fine", "fine"]


def nested(rank: int) -> str:
    """Sessions one after the other do not disturb one another."""
    for _ in range(3):
        with sequence_parallel() as sp:
            sp.shard(BATCH)
    dist.barrier()
    return "fine"


@pytest.mark.timeout(60)
def test_sessions_follow_one_another() -> None:
    assert run_on_ranks(2, nested) == ["fine", "fine"]


def raises_in_a_wait(rank: int) -> str:
    def wait() -> None:
        raise KeyError("a bug")

    try:
        with sequence_parallel() as sp:
            sp.watch.finish(wait, True)
    except KeyError as error:
        return repr(error)
    return "nothing"


@pytest.mark.timeout(60)
def test_an_error_of_any_kind_ends_a_wait() -> None:
    assert run_on_ranks(1, raises_in_a_wait, limit=30) == ["KeyError('a bug')"]
