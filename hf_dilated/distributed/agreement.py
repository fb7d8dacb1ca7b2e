"""Ranks that stay together: they agree on every batch before it is sharded, and none waits for one that is lost.

All of this goes through the key-value store by which the processes have found one another, not through collectives:
a missing rank can be named there, and nothing hangs.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from hf_dilated.distributed.communication import Wire

STORE_HOST = 0  # the rank whose process usually holds the store
GRACE_SECONDS = 10.0  # for a rank to notice by itself that another one is lost, before its process is ended
_opened: Counter[str] = Counter()  # sessions of a group so far, by its ranks: all of them have opened as many


NO_ANSWER = "no longer answers {}: the store of all processes is there"

Result = TypeVar("Result")


class DisagreementError(RuntimeError):
    """Ranks were given different batches or settings."""


class RankLostError(RuntimeError):
    """A rank failed, was killed, stopped giving signs of life, or never came; the message names it and the step."""


class Watch:
    """Signs of life of the ranks of a group, and what they agree on.

    Args:
        wire: The group.
        timeout_seconds: After this time without a sign of life a rank counts as lost. One that lives, or has not opened
            the session yet, is waited for as long as the group's own timeout says.
    """

    def __init__(self, wire: Wire, timeout_seconds: float) -> None:
        assert wire.group is not None, "a process alone has nobody to watch"
        self.wire, self.timeout, self.patience = wire, timeout_seconds, _timeout_of(wire.group)
        self.step = 0
        self._names = dist.get_process_group_ranks(wire.group)
        group = "-".join(map(str, self._names))
        self._prefix = f"hf_dilated/{group}/{_opened[group]}"
        _opened[group] += 1
        self._store, self._own_store = self._client(), self._client()  # one for each thread
        self._lost: RankLostError | None = None
        self._over, self._found = threading.Event(), threading.Event()
        self._rounds, self._is_silent = 0, False  # looks at all ranks; whether the store has stopped answering
        self._thread = threading.Thread(target=self._watch, name="hf_dilated watch", daemon=True)

    def _client(self) -> dist.Store:
        default: Any = dist.distributed_c10d._get_default_store()
        store = default.clone()
        store.set_timeout(timedelta(seconds=self.timeout))
        return dist.PrefixStore(self._prefix, store)

    def __enter__(self) -> "Watch":
        self._beat(self._store)
        self._thread.start()
        threading.Thread(target=self._guard, name="hf_dilated guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; if an error is under way, say so to the others, or name the rank that is behind it."""
        lost = self._lost
        if error is not None and lost is None and _is_of_communication(error):
            lost = self._await_loss()
        if error is not None and lost is None:
            self._try_set(f"failed/{self.wire.rank}", f"{self.step}\n{type(error).__name__}: {error}")
        self._try_set(f"left/{self.wire.rank}", str(self.step))
        if lost is not None:
            self._linger(3 * self._interval)
        elif self._names[self.wire.rank] == STORE_HOST:
            self._linger(self.timeout)
        self._over.set()
        if not self._is_silent:
            self._thread.join(self.timeout)
        if lost is not None and error is not lost:
            raise lost from error

    def _linger(self, seconds: float) -> None:
        """Let the others leave, or learn of a loss, before this process, which may hold the store, is gone."""
        known, until = self._lost, time.monotonic() + seconds
        everybody = [f"left/{rank}" for rank in range(self.wire.ranks)]
        while self._lost is known and time.monotonic() < until and not self._store_has(everybody):
            time.sleep(0.02)

    def _store_has(self, keys: list[str]) -> bool:
        try:
            return self._beside(lambda: self._store.check(keys), of_store=True)
        except RuntimeError:
            return True

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks bring the same facts; every rank of the group calls this, and a step begins.

        Raises:
            DisagreementError: On every rank, if a fact differs; the message names it and the ranks.
            RankLostError: If a rank is lost, or does not come within the timeout of the group.
        """
        self.step += 1
        mine = "\n".join(f"{name}={value}" for name, value in facts.items())
        given = self._beside(lambda: self._exchange(mine))
        for name in facts:
            values = [fact.get(name) for fact in given]
            if len(set(values)) > 1:
                said = ", ".join(f"rank {self._names[rank]}: {value}" for rank, value in enumerate(values))
                raise DisagreementError(
                    f"step {self.step}: the ranks of a sequence must get the same batch and settings, but {name} "
                    f"differs ({said})"
                )

    def _exchange(self, mine: str) -> list[dict[str, str]]:
        self._beat(self._store)
        self._store.set(f"facts/{self.step}/{self.wire.rank}", mine)
        given = [self._facts(rank) for rank in range(self.wire.ranks)]
        if self.step > 2:
            self._store.delete_key(f"facts/{self.step - 2}/{self.wire.rank}")
        return given

    def _facts(self, rank: int) -> dict[str, str]:
        key, deadline = f"facts/{self.step}/{rank}", time.monotonic() + self.patience
        while not self._store.check([key]):
            if self._store.check([f"left/{rank}"]) and not self._found.is_set():
                self._lose(rank, "has left, while others go on")
            if self._lost is not None:
                raise self._lost
            if time.monotonic() > deadline:
                self._give_up(rank)
            time.sleep(0.001)
        lines = self._store.get(key).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def _give_up(self, rank: int) -> None:
        """Lose a rank that others have waited for long enough, and tell it, for it may be alive."""
        has_opened = self._store.check([f"alive/{rank}"])
        what = f"is alive, but has not come to step {self.step}" if has_opened else "has not opened the session"
        self._lose(rank, f"{what} within {self.patience:g} seconds, the timeout of the process group")
        self._try_set(f"failed/{self.wire.rank}", f"{self.step}\nRankLostError: {self._lost}")

    def finish(self, wait: Callable[[], None], blocks: bool) -> None:
        """Wait for a communication, but not for a rank that is lost.

        Args:
            wait: Returns when the communication is complete.
            blocks: Whether it holds up the program, not just a stream.

        Raises:
            RankLostError: If a rank is lost meanwhile, or is behind the failure of the communication.
            RuntimeError: If it fails otherwise, for instance by the timeout of the group.
        """
        try:
            if blocks:
                self._beside(wait)
            else:
                wait()
        except RankLostError:
            raise
        except RuntimeError as error:
            if (lost := self._await_loss()) is not None:
                raise lost from error
            raise

    def _beside(self, call: Callable[[], Result], *, of_store: bool = False) -> Result:
        """Call in a thread that can be left behind: what a lost rank does not answer cannot be called off.

        Args:
            call: What to do.
            of_store: Whether it needs the store alone, which answers also after another rank is lost.
        """
        done, results, errors = threading.Event(), list[Result](), list[BaseException]()

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        threading.Thread(target=run, name="hf_dilated wait", daemon=True).start()
        while not done.wait(0.02):
            if self._lost is not None and (self._is_silent or not of_store):
                raise self._lost
        if errors:
            raise errors[0]
        return results[0]

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
                self._rounds += 1
            except RuntimeError as error:
                if not self._over.is_set():
                    self._lose_store(error)

    def _guard(self) -> None:
        """Notice that the store does not answer, and end a process that waits in vain."""
        rounds, silent, before = self._rounds, 0.0, time.monotonic()
        while not self._over.wait(self._interval) and self._lost is None:
            now = time.monotonic()
            silent += min(now - before, 2 * self._interval)  # this process may have been stopped itself
            before = now
            if self._rounds != rounds:
                rounds, silent = self._rounds, 0.0
            elif silent > self.timeout + self._interval and self._lost is None:
                self._is_silent = True
                self._lose_named(STORE_HOST, NO_ANSWER.format(f"for {self.timeout:g} seconds"))
        if self._lost is not None and not self._over.wait(GRACE_SECONDS):
            print(f"hf_dilated: {self._lost}; this process waits for it in vain and ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _look_at(self, rank: int, seen: dict[int, tuple[str, float]]) -> None:
        if self._own_store.check([f"failed/{rank}"]):
            step, _, message = self._own_store.get(f"failed/{rank}").decode().partition("\n")
            self._lose(rank, f"failed at step {step}: {message}")
        elif self._own_store.check([f"alive/{rank}"]) and not self._own_store.check([f"left/{rank}"]):
            alive = self._own_store.get(f"alive/{rank}").decode()
            before, since = seen[rank]
            if alive != before:
                seen[rank] = alive, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                step = alive.partition(" ")[0]
                self._lose(rank, f"gave its last sign of life {self.timeout:g} seconds ago, at step {step}")

    def _lose(self, rank: int, what: str) -> None:
        self._lose_named(self._names[rank], what)

    def _lose_store(self, error: RuntimeError) -> None:
        if isinstance(error, dist.DistNetworkError):
            self._lose_named(STORE_HOST, NO_ANSWER.format(f"({type(error).__name__})"))
        else:
            self._lose(self.wire.rank, f"cannot use the store of all processes ({error})")

    def _lose_named(self, name: int, what: str) -> None:
        if self._lost is None:
            own = self._names[self.wire.rank]
            self._lost = RankLostError(f"rank {name} {what}; this is rank {own}, at step {self.step}")
        self._found.set()

    def _try_set(self, key: str, value: str) -> None:
        try:
            self._beside(lambda: self._store.set(key, value), of_store=True)
        except RuntimeError as error:
            if error is not self._lost:
                self._lose_store(error)


def _timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that the group itself waits for a rank."""
    seconds = [group._get_backend(device).options._timeout.total_seconds() for device in group._device_types]
    return float(max(seconds))


def _is_of_communication(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection", "process group", "timed out", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
