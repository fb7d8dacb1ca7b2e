"""Transformers learns the backends: attention function and mask function under one name."""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_dilated.integration import persistence
from hf_dilated.integration.attention import attention_function
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.masks import position_mask


def register() -> None:
    """Register every backend and the attribute ``config.hf_dilated``. Safe to repeat."""
    for name in BACKENDS:
        AttentionInterface.register(name, attention_function(name))
        AttentionMaskInterface.register(name, position_mask)
    persistence.install()
