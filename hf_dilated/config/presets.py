"""What ``from_model_config`` chooses beyond lengths: the one place to change when a better pattern was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of a pattern that suit any model.

    Args:
        dense_every: Of every so many layers the middle one stays dense; 0 for none.
        options: Further fields of the pattern's configuration.

    Example:
        >>> Preset(dense_every=4, options={"sink_tokens": 4}).for_layers(12)
        {'sink_tokens': 4, 'dense_layers': (2, 6, 10)}
    """

    dense_every: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_layers(self, layers: int) -> dict[str, Any]:
        """Return the fields for a model of so many layers."""
        if not self.dense_every:
            return dict(self.options)
        return {**self.options, "dense_layers": tuple(range(self.dense_every // 2, layers, self.dense_every))}


DILATED = Preset()
BLOCK_SPARSE = Preset()
