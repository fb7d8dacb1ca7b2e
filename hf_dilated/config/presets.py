"""What ``from_model_config`` chooses beyond lengths: the one place to change when a better pattern was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of a pattern that suit any model.

    Args:
        dense_every: Of every so many layers, counted from the end, the last one stays dense; 0 for none.
        dense_first: Whether the first layer stays dense.
        options: Further fields of the pattern's configuration, other than those that follow from the length (segments
            and rates; the window, for blocks of 128) and the ``layers`` of a block-sparse one.

    Example:
        >>> Preset(dense_every=4, dense_first=True, options={"sink_tokens": 4}).for_layers(12)
        {'sink_tokens': 4, 'dense_layers': (0, 3, 7, 11)}
    """

    dense_every: int = 0
    dense_first: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_layers(self, layers: int) -> dict[str, Any]:
        """Return the fields for a model of so many layers."""
        dense = set(range((layers - 1) % self.dense_every, layers, self.dense_every)) if self.dense_every else set()
        if self.dense_first and layers:
            dense.add(0)
        return {**self.options, **({"dense_layers": tuple(sorted(dense))} if dense else {})}


DILATED = Preset()
BLOCK_SPARSE = Preset()
