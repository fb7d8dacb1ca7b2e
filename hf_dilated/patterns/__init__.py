"""Patterns: which queries attend to which keys, as lists of dense partial attentions."""

from hf_dilated.patterns.dense import DensePattern
from hf_dilated.patterns.dilated import DilatedPattern

__all__ = ["DensePattern", "DilatedPattern"]
