"""Long-context attention for the Transformers models you already have."""

from hf_dilated.config import ConfigError, DilatedConfig, MemoryConfig, StoredConfig
from hf_dilated.functional import dilated_attention
from hf_dilated.integration.registration import register
from hf_dilated.memory import MemoryPolicy, MemoryPool, auto_configure_memory_pool

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DilatedConfig",
    "MemoryConfig",
    "MemoryPolicy",
    "MemoryPool",
    "StoredConfig",
    "auto_configure_memory_pool",
    "dilated_attention",
]

register()
