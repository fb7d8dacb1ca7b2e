"""What free memory is worth keeping: by recency, frequency and size (greedy dual size frequency)."""

HALF_LIFE = 256  # requests after which an old request counts half
LARGEST = 512  # sizes that are remembered
MISS_BYTES = 32 << 10  # a miss costs system calls worth as much as touching this many fresh bytes


class Usage:
    """Counts requests by size class; older ones count less."""

    def __init__(self) -> None:
        self.tick = 0
        self._counts: dict[int, tuple[float, int]] = {}

    def touch(self, size_class: int) -> None:
        """Note a request."""
        self.tick = tick = self.tick + 1
        count, before = self._counts.get(size_class, (0.0, tick))
        self._counts[size_class] = count * 0.5 ** ((tick - before) / HALF_LIFE) + 1, tick
        if len(self._counts) > LARGEST:
            self._forget()

    def _forget(self) -> None:
        """Keep the half that was asked for last."""
        recent = sorted(self._counts, key=lambda size: self._counts[size][1])[LARGEST // 2 :]
        self._counts = {size: self._counts[size] for size in recent}

    def frequency(self, size_class: int) -> float:
        """Return how often a class was asked for of late."""
        count, tick = self._counts.get(size_class, (0.0, self.tick))
        return count * 0.5 ** ((self.tick - tick) / HALF_LIFE)

    def worth(self, size_class: int, used: int) -> float:
        """Return what a free block saves for every byte that it holds: how soon it is wanted, and what a miss costs.

        Example:
            >>> usage = Usage()
            >>> for size in (1 << 20, 1 << 20, 8 << 20): usage.touch(size)
            >>> usage.worth(1 << 20, used=2) > usage.worth(1 << 20, used=1) > usage.worth(8 << 20, used=1)
            True
        """
        cost = 1 + MISS_BYTES / size_class
        return cost * self.frequency(size_class) / (self.tick - used + 1)
