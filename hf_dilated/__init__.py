"""Long-context attention for the Transformers models you already have."""

from hf_dilated.config import ConfigError, DilatedConfig, StoredConfig
from hf_dilated.functional import dilated_attention

__version__ = "0.1.0"
__all__ = ["ConfigError", "DilatedConfig", "StoredConfig", "dilated_attention"]
