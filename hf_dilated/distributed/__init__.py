"""One sequence over many devices: layout, transports and attention."""

from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.distributed.ring import ring_attention

__all__ = ["SequenceLayout", "ring_attention"]
