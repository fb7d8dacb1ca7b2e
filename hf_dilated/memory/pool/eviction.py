"""What free memory is worth keeping: by recency, frequency and size (greedy dual size frequency)."""

HALF_LIFE = 256  # requests after which an old request counts half
MISS_BYTES = 32 << 10  # a miss costs system calls worth as much as touching this many fresh bytes


class Usage:
    """Counts requests by size class; older ones count less."""

    def __init__(self) -> None:
        self.tick = 0
        self._counts: dict[int, tuple[float, int]] = {}

    def touch(self, size_class: int) -> None:
        """Note a request."""
        self.tick += 1
        self._counts[size_class] = self.frequency(size_class) + 1, self.tick

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
