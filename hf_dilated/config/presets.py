"""What ``from_model_config`` chooses beyond lengths: the one place to change when a better pattern was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_GROUPS = 16  # of heads


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of a pattern that suit any model.

    Args:
        dense_every: Of every so many layers, counted from the end, the last one stays dense; 0 for none.
        dense_first: Whether the first layer stays dense.
        dense_heads: Share of the query heads of every layer, the first ones, that see everything (block-sparse only).
        options: Further fields of the pattern's configuration, other than those that follow from the length (segments
            and rates; the window, for blocks of 128) and the ``layers`` of a block-sparse one.

    Example:
        >>> Preset(dense_every=4, dense_first=True, options={"sink_tokens": 4}).for_layers(12)
        {'sink_tokens': 4, 'dense_layers': (0, 3, 7, 11)}
    """

    dense_every: int = 0
    dense_first: bool = False
    dense_heads: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_layers(self, layers: int) -> dict[str, Any]:
        """Return the fields for a model of so many layers."""
        dense = set(range((layers - 1) % self.dense_every, layers, self.dense_every)) if self.dense_every else set()
        if self.dense_first and layers:
            dense.add(0)
        return {**self.options, **({"dense_layers": tuple(sorted(dense))} if dense else {})}

    def for_heads(self, heads: int) -> tuple[int, int]:
        """Return how many of how many equal groups of query heads are dense: about the share, as heads divide.

        None are where few groups, of which each has lists of its own, cannot come near it.

        Example:
            >>> [Preset(dense_heads=0.25).for_heads(heads) for heads in (32, 14, 9, 2, 71)]
            [(1, 4), (2, 7), (2, 9), (0, 1), (0, 1)]
        """
        shares = {
            round(groups * self.dense_heads) / groups: (round(groups * self.dense_heads), groups)
            for groups in range(min(heads, MOST_GROUPS), 1, -1)
            if heads % groups == 0
        }
        nearest = min(shares, key=lambda share: abs(share - self.dense_heads), default=0.0)
        return shares[nearest] if nearest and abs(nearest / self.dense_heads - 1) <= 1 / 3 else (0, 1)


DILATED = Preset()
BLOCK_SPARSE = Preset(dense_heads=0.25)  # scripts/benchmarks/ablation-h200.jsonl
