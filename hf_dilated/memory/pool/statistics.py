"""What a pool counts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WINDOW = 1024  # requests; what was needed at once is remembered for one to two windows


@dataclass(slots=True)
class Counters:
    """Hits and misses of one kind of buffer, and its bytes in use.

    A hit is served without new memory from the system.
    """

    kind: str
    hits: int = 0
    misses: int = 0
    live: int = 0
    peak: int = 0

    def took(self, size: int, *, hit: bool) -> None:
        """Count a buffer that was handed out."""
        if hit:
            self.hits += 1
        else:
            self.misses += 1
        self.live += size
        if self.live > self.peak:
            self.peak = self.live

    @classmethod
    def total(cls, kinds: Iterable["Counters"]) -> "Counters":
        """Add up kinds; the largest sum that was in use at once does not follow from theirs."""
        found = cls("")
        for counters in kinds:
            found.hits += counters.hits
            found.misses += counters.misses
            found.live += counters.live
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / max(1, self.hits + self.misses),
            "bytes_live": self.live,
            "peak_bytes": self.peak,
        }


@dataclass(slots=True)
class Need:
    """The most bytes that were in use at once of late."""

    now: int = 0
    _requests: int = 0
    _windows: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, size: int) -> bool:
        """Note a buffer that was handed out; return whether it begins a window."""
        self.now += size
        self._requests += 1
        is_first = self._requests % WINDOW == 0
        if is_first:
            self._windows = [self._windows[1], self.now]
        if self.now > self._windows[1]:
            self._windows[1] = self.now
        return is_first

    @property
    def recent(self) -> int:
        """The peak of this window and the one before."""
        return max(self._windows)
