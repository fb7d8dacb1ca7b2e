"""Attention patterns as data: frozen, validated, and stored in a model's ``config.json``."""

from hf_dilated.config.block_sparse import BlockParts, BlockSparseConfig, block_mask_of
from hf_dilated.config.checks import ConfigError
from hf_dilated.config.dilated import DilatedConfig, Offset, Overlap, Phase
from hf_dilated.config.memory import MemoryConfig
from hf_dilated.config.ring import RingConfig
from hf_dilated.config.stored import StoredConfig

__all__ = [
    "BlockParts",
    "BlockSparseConfig",
    "ConfigError",
    "DilatedConfig",
    "MemoryConfig",
    "Offset",
    "Overlap",
    "Phase",
    "RingConfig",
    "StoredConfig",
    "block_mask_of",
]
