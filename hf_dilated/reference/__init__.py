"""The oracle: every attention straight from its definition, dense and in float64.

Nothing here is shared with the engine, and nothing is fast. Every backend is tested against these files.
"""

from hf_dilated.reference.block_sparse import block_sparse_attention, visible_blocks
from hf_dilated.reference.dense import positions
from hf_dilated.reference.dilated import dilated_attention, multiplicity, residue

__all__ = [
    "block_sparse_attention",
    "dilated_attention",
    "multiplicity",
    "positions",
    "residue",
    "visible_blocks",
]
