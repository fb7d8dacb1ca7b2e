"""Patterns: which queries attend to which keys, as lists of dense partial attentions."""

import ast
from functools import lru_cache

from hf_dilated.patterns.block_sparse import BlockSparsePattern
from hf_dilated.patterns.dense import DensePattern
from hf_dilated.patterns.dilated import DilatedPattern
from hf_dilated.patterns.partials import Pattern

__all__ = ["BlockSparsePattern", "DensePattern", "DilatedPattern", "Pattern", "parse"]


@lru_cache(maxsize=1024)
def parse(spec: str) -> Pattern:
    """Read a pattern from its ``spec``, the text that operators carry.

    Example:
        >>> parse(DensePattern(window=128).spec)
        DensePattern(window=128)
    """
    kind, _, fields = spec.partition(" ")
    values = ast.literal_eval(fields)
    if kind == "dense":
        return DensePattern(window=values)
    if kind == "dilated":
        return DilatedPattern.from_fields(values)
    assert kind == "block_sparse", kind
    return BlockSparsePattern.from_fields(values)
