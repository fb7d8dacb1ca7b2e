"""How keys and values reach the ranks that attend to them, and how their gradients come home.

A transport yields *portions*: keys and values that have arrived, and the plan that attends to them. What comes next is
on its way while a portion is computed with. Gradients travel in the dtype of the keys; what comes from several ranks is
added in the order of the ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hf_dilated.distributed.communication import Arrival, Wire
from hf_dilated.distributed.shares import (
    Problem,
    Seen,
    gathered_plan,
    needs,
    own_plan,
    pair_plan,
    seen_plan,
)
from hf_dilated.engine.plan import Plan

Homecoming = Callable[[Tensor, Tensor], None]  # adds what has arrived to the gradients of a rank's keys and values


@dataclass(frozen=True)
class Portion:
    """Keys (M, G, D) and values (M, G, Dv) that are here, and what attends to them."""

    plan: Plan
    key: Tensor
    value: Tensor
    place: int  # of the ranks' exchange it came by; 0 is the rank's own


class Transport(Protocol):
    """Brings keys and values to queries; one object serves one forward or one backward pass."""

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        """Yield what there is to attend to, the rank's own tokens first."""
        ...

    def send_home(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        """Begin to send the gradients of a portion's keys and values to where they came from."""
        ...

    def arrivals(self) -> Iterator[Homecoming]:
        """Yield what adds the gradients from other ranks, in a fixed order."""
        ...


@dataclass
class Here:
    """Everything is here already."""

    plan: Plan

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        yield Portion(self.plan, key, value, 0)

    def send_home(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        raise AssertionError("nothing came from elsewhere")

    def arrivals(self) -> Iterator[Homecoming]:
        return iter(())


@dataclass
class Gather:
    """Everything to everybody at once: the fewest and largest kernel calls; memory for the keys of all ranks."""

    wire: Wire
    problem: Problem
    _home: list[Arrival] = field(default_factory=list)

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        arriving = self.wire.gather(key), self.wire.gather(value)
        share = gathered_plan(self.problem, self.wire.rank)
        yield Portion(own_plan(self.problem, self.wire.rank), key, value, 0)
        gathered = [arrival.wait().flatten(0, 1)[share.index.on(key.device)] for arrival in arriving]
        yield Portion(share.plan, gathered[0], gathered[1], 1)

    def send_home(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        index = gathered_plan(self.problem, self.wire.rank).index
        even = [self.problem.tokens] * self.wire.ranks
        for grad in (grad_key, grad_value):
            spread = grad.new_zeros(sum(even), *grad.shape[1:])
            spread[index.on(grad.device)] = grad
            self._home.append(self.wire.exchange(spread, even, even))

    def arrivals(self) -> Iterator[Homecoming]:
        def add(grad_key: Tensor, grad_value: Tensor) -> None:
            for total, arrival in zip((grad_key, grad_value), self._home, strict=True):
                for part in arrival.wait().unflatten(0, (self.wire.ranks, -1)):
                    total += part

        yield add


@dataclass
class Exchange:
    """Shard after shard from rank to rank: memory for three shards, whatever the number of ranks."""

    wire: Wire
    problem: Problem
    _home: list[list[Arrival]] = field(default_factory=list)

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        rank, ranks = self.wire.rank, self.wire.ranks
        arriving = [self._begin(x, 1) for x in (key, value)]
        yield Portion(own_plan(self.problem, rank), key, value, 0)
        for distance in range(1, ranks):
            current = arriving
            arriving = [self._begin(x, distance + 1) for x in (key, value)] if distance + 1 < ranks else []
            plan = pair_plan(self.problem, rank, (rank - distance) % ranks)
            yield Portion(plan, current[0].wait(), current[1].wait(), distance)

    def _begin(self, x: Tensor, distance: int) -> Arrival:
        sends = needs(self.problem, self.wire.rank + distance, self.wire.rank)
        receives = self.problem.tokens * needs(self.problem, self.wire.rank, self.wire.rank - distance)
        return self.wire.shift(x, distance, sends=sends, receives=receives)

    def send_home(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        distance = portion.place
        sends = needs(self.problem, self.wire.rank, self.wire.rank - distance)
        receives = self.problem.tokens * needs(self.problem, self.wire.rank + distance, self.wire.rank)
        pair = [self.wire.shift(x, -distance, sends=sends, receives=receives) for x in (grad_key, grad_value)]
        self._home.append(pair)

    def arrivals(self) -> Iterator[Homecoming]:
        for pair in self._home:

            def add(grad_key: Tensor, grad_value: Tensor, pair: list[Arrival] = pair) -> None:
                for total, arrival in zip((grad_key, grad_value), pair, strict=True):
                    if len(part := arrival.wait()):
                        total += part

            yield add


@dataclass
class SeenRows:
    """Only the rows that a rank's queries see: of a branch with rate R one token in R, of a window its length."""

    wire: Wire
    problem: Problem
    _home: list[Arrival] = field(default_factory=list)

    @property
    def _seen(self) -> Seen:
        return seen_plan(self.problem, self.wire.rank)

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        seen, places = self._seen, self._places(key.device)
        arriving = [self.wire.exchange(x[places], seen.send, seen.receive) for x in (key, value)]
        yield Portion(own_plan(self.problem, self.wire.rank), key, value, 0)
        key_rows, value_rows = (x.wait().unflatten(0, (-1, 1)) if seen.head is not None else x.wait() for x in arriving)
        yield Portion(seen.plan, key_rows, value_rows, 1)

    def _places(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(index.tensor(device) for index in (self._seen.token, self._seen.head) if index is not None)

    def send_home(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        for grad in (grad_key, grad_value):
            rows = grad if self._seen.head is None else grad.squeeze(1)
            self._home.append(self.wire.exchange(rows, self._seen.receive, self._seen.send))

    def arrivals(self) -> Iterator[Homecoming]:
        def add(grad_key: Tensor, grad_value: Tensor) -> None:
            for total, arrival in zip((grad_key, grad_value), self._home, strict=True):
                total.index_put_(self._places(total.device), arrival.wait().to(total.dtype), accumulate=True)

        yield add
