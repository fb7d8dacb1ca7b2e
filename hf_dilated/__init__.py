"""Long-context attention for the Transformers models you already have."""

from hf_dilated.config import (
    BlockParts,
    BlockSparseConfig,
    ConfigError,
    DilatedConfig,
    MemoryConfig,
    RingConfig,
    StoredConfig,
    block_mask_of,
)
from hf_dilated.distributed import (
    DisagreementError,
    RankLostError,
    SequenceLayout,
    ring_attention,
    sequence_parallel,
)
from hf_dilated.factory import (
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from hf_dilated.functional import block_sparse_attention, dilated_attention
from hf_dilated.integration.cache import BlockSparseCache, DilatedCache
from hf_dilated.integration.memory import model_memory
from hf_dilated.integration.registration import register
from hf_dilated.integration.ring import ring_generate
from hf_dilated.memory import AttentionBufferManager, BufferType, MemoryPolicy, MemoryPool, auto_configure_memory_pool
from hf_dilated.patching import PatchError, patch_checkpoint, patch_model, unpatch_checkpoint, unpatch_model
from hf_dilated.training.sequence_parallel import SequenceParallelTrainerMixin

__version__ = "0.1.0"
__all__ = [
    "AttentionBufferManager",
    "BlockParts",
    "BlockSparseCache",
    "BlockSparseConfig",
    "BufferType",
    "ConfigError",
    "DilatedCache",
    "DilatedConfig",
    "DisagreementError",
    "MemoryConfig",
    "MemoryPolicy",
    "MemoryPool",
    "PatchError",
    "RankLostError",
    "RingConfig",
    "SequenceLayout",
    "SequenceParallelTrainerMixin",
    "StoredConfig",
    "auto_configure_memory_pool",
    "block_mask_of",
    "block_sparse_attention",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    "dilated_attention",
    "model_memory",
    "patch_checkpoint",
    "patch_model",
    "ring_attention",
    "ring_generate",
    "sequence_parallel",
    "unpatch_checkpoint",
    "unpatch_model",
]

register()
