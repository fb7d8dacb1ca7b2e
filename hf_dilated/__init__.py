"""Long-context attention for the Transformers models you already have."""

from hf_dilated.config import ConfigError, DilatedConfig, StoredConfig
from hf_dilated.functional import dilated_attention
from hf_dilated.integration.registration import register

__version__ = "0.1.0"
__all__ = ["ConfigError", "DilatedConfig", "StoredConfig", "dilated_attention"]

register()
