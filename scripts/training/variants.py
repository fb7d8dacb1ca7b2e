"""The attentions that the ablation compares."""

from dataclasses import dataclass, replace
from typing import Any

from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.config import BlockParts
from hf_dilated.config.presets import Preset

DENSE = "dense"
BLOCKS_IN_A_WINDOW = 16  # 16 × 128 tokens reach as far as the shortest segment
STRIDE = 16  # blocks
CHOSEN_BLOCKS = 16  # of 64 or 128 tokens


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A backend and its pattern.

    Attributes:
        backend: As ``attn_implementation``; the dense variant is a dilated one with a single segment, which reads
            packed rows fast.
        pattern: As its configuration's ``to_dict``.
    """

    backend: str
    pattern: dict[str, Any]


def variants(config: Any, length: int) -> dict[str, Variant]:
    """Return all of them, the promising ones first; they do not follow the presets that they are to decide.

    Args:
        config: Configuration of a model whose ``max_position_embeddings`` is the length that it was made for.
        length: Longest text afterwards, in tokens.
    """
    trained, layers = config.max_position_embeddings, config.num_hidden_layers
    branches = DilatedConfig.from_model_config(config, max_length=length)
    once = DilatedConfig(segment_lengths=branches.segment_lengths, dilation_rates=branches.dilation_rates)
    last, ends = (Preset(dense_every=layers, dense_first=first).for_layers(layers) for first in (False, True))
    size = min(128, max(1, trained // BLOCKS_IN_A_WINDOW))
    near = BlockParts(local_blocks=trained // size + 1, global_blocks=1)
    everything, by_content = BlockParts(stride_blocks=1), replace(near, topk_blocks=CHOSEN_BLOCKS)
    by_head = (everything, near, near, near)  # the first quarter sees every block
    window = BlockSparseConfig(block_size=size, local_blocks=near.local_blocks, global_blocks=1)
    small = max(1, size // 2)
    chosen = BlockSparseConfig(
        block_size=small, local_blocks=trained // small + 1, global_blocks=1, topk_blocks=CHOSEN_BLOCKS
    )
    strided = replace(window, local_blocks=max(1, trained // size), stride_blocks=STRIDE)
    wide = DilatedConfig(segment_lengths=(trained, min(4 * trained, length), length), dilation_rates=(1, 2, 4))
    patterns: dict[str, DilatedConfig | BlockSparseConfig] = {
        DENSE: DilatedConfig(segment_lengths=(length,), dilation_rates=(1,)),
        "window, last layer dense": replace(window, **last),
        "window, first and last layer dense": replace(window, **ends),
        "dilated, last layer dense": replace(once, sink_tokens=4, **last),
        "dilated, first and last layer dense": replace(once, sink_tokens=4, **ends),
        "window, a quarter of the heads dense": BlockSparseConfig(block_size=size, layers=(by_head,)),
        "window, last layer's first quarter dense": BlockSparseConfig(
            block_size=size, layers=(*[(near,)] * (layers - 1), by_head)
        ),
        "window, last layer top-k": BlockSparseConfig(
            block_size=size, layers=(*[(near,)] * (layers - 1), (by_content,))
        ),
        "window, middle layer dense": replace(window, dense_layers=(layers // 2,)),
        "top-k": chosen,
        "top-k, last layer dense": replace(chosen, **last),
        "dilated": once,
        "dilated, count": replace(once, overlap="count"),
        "dilated, sinks": replace(once, sink_tokens=4),
        "dilated, sinks, phase": replace(once, sink_tokens=4, phase="alternate"),
        "dilated, kv_head, rotate": replace(once, sink_tokens=4, offset="kv_head", rotate=True),
        "dilated, lower rates": replace(wide, sink_tokens=4),
        "dilated, lower rates, last layer dense": replace(wide, sink_tokens=4, **last),
        "window": window,
        "strided": strided,
        "strided, last layer dense": replace(strided, **last),
        "segments as in LongLoRA": DilatedConfig(segment_lengths=(trained,), dilation_rates=(1,), phase="alternate"),
    }
    return {
        name: Variant(
            backend="dilated" if isinstance(pattern, DilatedConfig) else "block_sparse", pattern=pattern.to_dict()
        )
        for name, pattern in patterns.items()
    }
