"""What a run takes from a pool, moment by moment."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Event(NamedTuple):
    """Bytes taken (positive) or returned (negative) by a kind of buffer, seconds after the start."""

    seconds: float
    kind: str
    size: int


@dataclass
class Recording:
    """Every buffer of a run.

    Example:
        >>> recording = Recording()
        >>> for kind, size in (("output", 8), ("temp", 4), ("temp", -4), ("temp", 2)): recording.add(kind, size)
        >>> recording.peak(), recording.plan()
        (12, [8, 4])
    """

    events: list[Event] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    def add(self, kind: str, size: int) -> None:
        """Note a buffer; safe in any thread and in finalizers."""
        self.events.append(Event(time.perf_counter() - self._start, kind, size))

    def kinds(self) -> list[str]:
        """Return the kinds of buffer that appear, the largest first."""
        largest: Counter[str] = Counter()
        now: Counter[str] = Counter()
        for event in self.events:
            now[event.kind] += event.size
            largest[event.kind] = max(largest[event.kind], now[event.kind])
        return [kind for kind, _ in largest.most_common()]

    def timeline(self) -> tuple[list[float], dict[str, list[int]]]:
        """Return the moments, and for every kind the bytes in use after each."""
        lines: dict[str, list[int]] = {kind: [] for kind in self.kinds()}
        now = dict.fromkeys(lines, 0)
        for event in self.events:
            now[event.kind] += event.size
            for kind, line in lines.items():
                line.append(now[kind])
        return [event.seconds for event in self.events], lines

    def peak(self) -> int:
        """Return the most bytes that were in use at once."""
        return max(self._totals(), default=0)

    def plan(self) -> list[int]:
        """Return the sizes of the buffers that were in use at that moment: what to allocate before a run."""
        totals = self._totals()
        if not totals:
            return []
        live: Counter[int] = Counter()
        for event in self.events[: totals.index(max(totals)) + 1]:
            live[abs(event.size)] += 1 if event.size > 0 else -1
        return sorted(live.elements(), reverse=True)

    def _totals(self) -> list[int]:
        totals, total = [], 0
        for event in self.events:
            total += event.size
            totals.append(total)
        return totals
