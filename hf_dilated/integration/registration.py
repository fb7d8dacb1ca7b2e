"""Transformers learns the backends: attention function and mask function under one name."""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_dilated.integration import persistence
from hf_dilated.integration.attention import dilated_attention_forward
from hf_dilated.integration.masks import position_mask


def register() -> None:
    """Register ``"dilated"`` and the attribute ``config.hf_dilated``. Safe to repeat."""
    AttentionInterface.register("dilated", dilated_attention_forward)
    AttentionMaskInterface.register("dilated", position_mask)
    persistence.install()
