"""How keys and values reach the ranks that attend to them, and how their gradients come home.

A transport yields *portions*: keys and values that have arrived, and the plan that attends to them. What comes next is
on its way while a portion is computed with. Gradients travel in the dtype of the keys; what comes from several ranks is
added in one order, rows that a pattern sees (on a GPU) under ``torch.use_deterministic_algorithms(True)``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from hf_dilated.distributed.communication import Arrival, Wire
from hf_dilated.distributed.pieces import Group, Trade, trade_of
from hf_dilated.distributed.shares import Problem, Seen, own_plan, seen_plan
from hf_dilated.engine.plan import Plan
from hf_dilated.engine.streamed import wide

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Portion:
    """Keys (M, G, D) and values (M, G, Dv) that are here, and what attends to them."""

    plan: Plan
    key: Tensor
    value: Tensor
    place: int  # in the order of portions; 0 is the rank's own


class Transport(Protocol):
    """Brings keys and values to queries; one object serves one forward or one backward pass."""

    @property
    def count(self) -> int:
        """How many portions there are."""
        ...

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        """Yield what there is to attend to, the rank's own tokens first."""
        ...

    def take(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        """Take the gradients of a portion's keys and values, and begin to send them to where these came from."""
        ...

    def gradients(self) -> Pair:
        """Return the gradients of the rank's own keys and values, with what came from other ranks."""
        ...


@dataclass
class Here:
    """Everything is here already."""

    plan: Plan
    count: int = 1
    _own: Pair = field(init=False)

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        yield Portion(self.plan, key, value, 0)

    def take(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        self._own = grad_key, grad_value

    def gradients(self) -> Pair:
        return self._own


@dataclass
class Pieces:
    """Pieces of the shards of other ranks, one group of ranks after the other, and each group's at once.

    One group of all takes the fewest and largest kernel calls, groups of one the least memory: three shards.
    """

    wire: Wire
    problem: Problem
    groups: tuple[Group, ...]
    _own: Pair = field(init=False)
    _home: list[Arrival[tuple[Tensor, ...]]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return 1 + len(self.groups)

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        trades = [trade_of(self.problem, self.wire.rank, group) for group in self.groups]
        arriving = self._begin(trades[0], key, value)
        yield Portion(own_plan(self.problem, self.wire.rank), key, value, 0)
        for number, trade in enumerate(trades, 1):
            arrived = arriving.wait()
            if number < len(trades):
                arriving = self._begin(trades[number], key, value)
            yield Portion(trade.plan, arrived[0], arrived[1], number)

    def _begin(self, trade: Trade, key: Tensor, value: Tensor) -> Arrival[tuple[Tensor, ...]]:
        return self.wire.trade((key, value), trade.out)

    def take(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        grads = grad_key, grad_value
        if portion.place == 0:
            self._own = grads
            return
        trade = trade_of(self.problem, self.wire.rank, self.groups[portion.place - 1])
        self._home.append(self.wire.trade(grads, trade.home))
        if len(self._home) > 1:  # what is on its way has the time of the next portion
            self._add(self._home.pop(0))

    def gradients(self) -> Pair:
        for arrival in self._home:
            self._add(arrival)
        return self._own

    def _add(self, arrival: Arrival[tuple[Tensor, ...]]) -> None:
        grad_key, grad_value = (self._sum(*pair) for pair in zip(self._own, arrival.wait(), strict=True))
        self._own = grad_key, grad_value

    def _sum(self, own: Tensor, arrived: Tensor) -> Tensor:
        """Add the layers that have arrived; those of all ranks in one go, which torch does in float32."""
        layers = arrived.unflatten(0, (-1, self.problem.tokens))
        if len(self.groups) > 1:
            total = own.to(wide(own.dtype))
            for layer in layers[1:]:
                total += layer
            return total
        if len(layers) == 2:
            return own + layers[1]
        layers[0] = own
        return layers.sum(0)


@dataclass
class SeenRows:
    """Only the rows that a rank's queries see: of a branch with rate R one token in R, of a window its length."""

    wire: Wire
    problem: Problem
    count: int = 2
    _own: Pair = field(init=False)
    _home: list[Arrival[Tensor]] = field(default_factory=list)

    @property
    def _seen(self) -> Seen:
        return seen_plan(self.problem, self.wire.rank)

    def portions(self, key: Tensor, value: Tensor) -> Iterator[Portion]:
        seen = self._seen
        arriving = [self.wire.exchange(seen.index.of(self._rows(x)), seen.send, seen.receive) for x in (key, value)]
        yield Portion(own_plan(self.problem, self.wire.rank), key, value, 0)
        key_rows, value_rows = (x.wait().unsqueeze(1) if seen.per_head else x.wait() for x in arriving)
        yield Portion(seen.plan, key_rows, value_rows, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """One row a token, or one a token and head, of x (T, G, D)."""
        return x.flatten(0, 1) if self._seen.per_head else x

    def take(self, portion: Portion, grad_key: Tensor, grad_value: Tensor) -> None:
        if portion.place == 0:
            self._own = grad_key, grad_value
            return
        seen = self._seen
        self._home = [self.wire.exchange(self._rows(x), seen.receive, seen.send) for x in (grad_key, grad_value)]

    def gradients(self) -> Pair:
        totals = [x.to(wide(x.dtype)).contiguous() for x in self._own]
        for total, arrival in zip(totals, self._home, strict=True):
            arrived = arrival.wait().to(total.dtype)
            self._rows(total).index_add_(0, self._seen.index.tensor(total.device), arrived)
        return totals[0], totals[1]
