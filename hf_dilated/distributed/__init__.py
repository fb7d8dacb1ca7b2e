"""One sequence over many devices: layout, transports, attention, and ranks that stay together."""

from hf_dilated.distributed.agreement import DisagreementError, RankLostError
from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.distributed.ring import ring_attention
from hf_dilated.distributed.session import SequenceParallel, sequence_parallel

__all__ = [
    "DisagreementError",
    "RankLostError",
    "SequenceLayout",
    "SequenceParallel",
    "ring_attention",
    "sequence_parallel",
]
