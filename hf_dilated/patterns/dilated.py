"""Dilated attention: segments, dilation rates and sinks."""

from dataclasses import dataclass

from hf_dilated.config import DilatedConfig


@dataclass(frozen=True, kw_only=True)
class DilatedPattern:
    """The pattern of one layer.

    Args:
        config: Branches, overlap, offset and sinks.
        layer: Ordinal of the layer among those that run the pattern; phase and rotation depend on it.
    """

    config: DilatedConfig
    layer: int = 0
