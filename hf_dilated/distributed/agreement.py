"""Ranks that stay together: they agree on every batch before it is sharded, and none waits for one that is lost.

All of this goes through the key-value store by which the processes have found one another, not through collectives:
a missing rank can be named there, and nothing hangs.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hf_dilated.distributed.communication import Wire

GRACE_SECONDS = 10.0  # for a rank to notice by itself that another one is lost, before its process is ended
_sessions = count()


class DisagreementError(RuntimeError):
    """Ranks were given different batches or settings."""


class RankLostError(RuntimeError):
    """A rank has failed, was killed, or gives no sign of life; the message names it and the step."""


class Watch:
    """Signs of life of the ranks of a group, and what they agree on.

    Args:
        wire: The group.
        timeout_seconds: After this time without a sign of life a rank counts as lost.
    """

    def __init__(self, wire: Wire, timeout_seconds: float) -> None:
        self.wire, self.timeout = wire, timeout_seconds
        self.step = 0
        self._names = dist.get_process_group_ranks(wire.group)
        self._prefix = f"hf_dilated/{next(_sessions)}/{'-'.join(map(str, self._names))}"
        self._store, self._own_store = self._client(), self._client()  # one for each thread
        self._lost: RankLostError | None = None
        self._lost_rank = -1
        self._over, self._found = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hf_dilated watch", daemon=True)

    def _client(self) -> dist.Store:
        default: Any = dist.distributed_c10d._get_default_store()
        store = default.clone()
        store.set_timeout(timedelta(seconds=self.timeout))
        return dist.PrefixStore(self._prefix, store)

    def __enter__(self) -> "Watch":
        self._beat(self._store)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; if an error is under way, say so to the others, or name the rank that is behind it."""
        lost = self._lost
        if error is not None and lost is None and _is_of_communication(error):
            lost = self._await_loss()
        if lost is not None:
            self._linger()
        self._over.set()
        if error is not None and lost is None:
            self._try_set(f"failed/{self.wire.rank}", f"{self.step}\n{type(error).__name__}: {error}")
        self._try_set(f"left/{self.wire.rank}", str(self.step))
        self._thread.join(self.timeout)
        if lost is not None and error is not lost:
            raise lost from error

    def _linger(self) -> None:
        """Give the others time to learn of the loss before this process, which may hold the store, is gone."""
        self._try_set(f"left/{self.wire.rank}", str(self.step))
        until = time.monotonic() + 3 * self._interval
        others = [f"left/{rank}" for rank in range(self.wire.ranks) if rank != self._lost_rank]
        while time.monotonic() < until and not self._store_has(others):
            time.sleep(0.02)

    def _store_has(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        except (RuntimeError, dist.DistError):
            return True

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks bring the same facts; every rank of the group calls this, and a step begins.

        Raises:
            DisagreementError: On every rank, if a fact differs; the message names it and the ranks.
            RankLostError: If a rank does not come within the time.
        """
        self.step += 1
        mine = "\n".join(f"{name}={value}" for name, value in facts.items())
        self._beat(self._store)
        self._store.set(f"facts/{self.step}/{self.wire.rank}", mine)
        given = [self._facts(rank) for rank in range(self.wire.ranks)]
        if self.step > 2:
            self._store.delete_key(f"facts/{self.step - 2}/{self.wire.rank}")
        for name in facts:
            values = [fact.get(name) for fact in given]
            if len(set(values)) > 1:
                said = ", ".join(f"rank {self._names[rank]}: {value}" for rank, value in enumerate(values))
                raise DisagreementError(
                    f"step {self.step}: the ranks of a sequence must get the same batch and settings, but {name} "
                    f"differs ({said})"
                )

    def _facts(self, rank: int) -> dict[str, str]:
        key, deadline = f"facts/{self.step}/{rank}", time.monotonic() + self.timeout
        while not self._store.check([key]):
            if self._store.check([f"left/{rank}"]) and not self._found.is_set():
                self._lose(rank, "has left, while others go on")
            if self._lost is not None:
                raise self._lost
            if time.monotonic() > deadline:
                self._lose(rank, f"has not come to step {self.step} within {self.timeout:g} seconds")
            time.sleep(0.001)
        lines = self._store.get(key).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def explain(self, error: RuntimeError) -> RuntimeError:
        """Return the error that names the rank behind a failed communication, or the error itself."""
        return self._await_loss() or error

    def _await_loss(self) -> RankLostError | None:
        self._found.wait(self.timeout + 2 * self._interval)
        return self._lost

    @property
    def _interval(self) -> float:
        return min(1.0, self.timeout / 5)

    def _beat(self, store: dist.Store) -> None:
        store.set(f"alive/{self.wire.rank}", f"{self.step} {time.monotonic()}")

    def _watch(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in range(self.wire.ranks) if rank != self.wire.rank}
        while not self._over.wait(self._interval) and self._lost is None:
            try:
                self._beat(self._own_store)
                for rank in seen:
                    self._look_at(rank, seen)
            except (RuntimeError, dist.DistError) as error:
                if not self._over.is_set():
                    self._lose(0, f"no longer answers ({type(error).__name__}): it holds the store of the group")
        if self._lost is not None and not self._over.wait(GRACE_SECONDS):
            print(f"hf_dilated: {self._lost}; this process waits for it in vain and ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _look_at(self, rank: int, seen: dict[int, tuple[str, float]]) -> None:
        if self._own_store.check([f"failed/{rank}"]):
            step, _, message = self._own_store.get(f"failed/{rank}").decode().partition("\n")
            self._lose(rank, f"failed at step {step}: {message}")
        elif not self._own_store.check([f"left/{rank}"]):
            alive = self._own_store.get(f"alive/{rank}").decode()
            before, since = seen[rank]
            if alive != before:
                seen[rank] = alive, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                step = alive.partition(" ")[0]
                self._lose(rank, f"gave its last sign of life {self.timeout:g} seconds ago, at step {step}")

    def _lose(self, rank: int, what: str) -> None:
        if self._lost is None:
            self._lost_rank = rank
            self._lost = RankLostError(f"rank {self._names[rank]} {what}; this is rank {self._names[self.wire.rank]}, "
                                       f"at step {self.step}")  # fmt: skip
        self._found.set()

    def _try_set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except (RuntimeError, dist.DistError):
            self._lose(0, "no longer answers: it holds the store of the group")


def _is_of_communication(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection", "process group", "timed out", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
