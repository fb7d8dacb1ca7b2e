"""A second way to run a pattern inside Transformers, for comparison: slow, dense, with nothing of ours but the oracle.

Its mask function is Transformers' own dense mask; the attention function reads the positions off what that mask lets
every query see. Registered as ``"oracle"``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_dilated import BlockSparseConfig, DilatedConfig, reference

DEFINITIONS: dict[str, Any] = {
    "dilated": (DilatedConfig, reference.dilated_attention),
    "block_sparse": (BlockSparseConfig, reference.block_sparse_attention),
}
# Ordinal of every layer that runs the pattern, where it is not simply layer_idx.
ORDINALS: dict[str, dict[int, int]] = {
    "gemma2": {1: 0},
    "gemma3_text": {1: 0, 3: 1},
    "gpt_oss": {1: 0, 3: 1},
    "qwen3_next": {1: 0, 3: 1},
    "modernbert": {0: 0, 2: 1},
}


def install() -> None:
    """Register the backend."""
    AttentionInterface.register("oracle", oracle_attention)
    AttentionMaskInterface.register("oracle", dense_mask)


def dense_mask(*args: Any, **options: Any) -> Tensor | None:
    """Transformers' dense mask, never left out."""
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def oracle_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What the backend of the stored pattern should compute, in float64."""
    B, N, M = query.shape[0], query.shape[2], key.shape[2]
    visible = torch.ones(B, 1, N, M, dtype=torch.bool) if attention_mask is None else attention_mask
    visible = visible[:, 0].expand(B, N, M)
    is_causal = options.get("is_causal")
    is_causal = module.is_causal if is_causal is None else is_causal
    shared = {"is_causal": is_causal, "scale": options.get("scaling"), "return_lse": True}
    if options.get("sliding_window") is not None:
        output, lse = _masked(query, key, value, visible, options["scaling"])
    else:
        stored = module.config.hf_dilated
        config_class, attention = DEFINITIONS[stored["attn_implementation"]]
        config = config_class.from_dict(stored[stored["attn_implementation"]])
        positions = torch.stack([_positions(row, is_causal) for row in visible])
        layer = getattr(module, "layer_idx", 0)
        layer = ORDINALS.get(module.config.model_type, {}).get(layer, layer)
        output, lse = attention(query, key, value, config, key_positions=positions, layer=layer, **shared)
    if options.get("s_aux") is not None:
        output = output * torch.sigmoid(lse - options["s_aux"].double()[:, None]).unsqueeze(-1)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _positions(visible: Tensor, is_causal: bool) -> Tensor:
    """Positions (M,) from who sees whom (N, M): a token's position is its rank among what its document sees."""
    N, M = visible.shape
    seen = visible.any(0)
    rank = torch.where(visible, visible.long().cumsum(1) - 1, -1).amax(0)
    if not is_causal:
        return torch.where(seen, rank, -1)
    if not seen.any():  # a chunk of padding
        return torch.full((M,), -1)
    last = int(seen.nonzero()[-1])
    query = int(visible[:, last].nonzero()[0])  # the first to see the last key is that key's own token
    end = last + N - query
    slot = torch.arange(M)
    return torch.where(slot >= end, -2, torch.where(seen, rank, -1))


def _masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    key, value = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scale).masked_fill(~visible[:, None], -1e30)
    weights = scores.softmax(-1) * visible.any(-1)[:, None, :, None]
    return weights @ value, scores.logsumexp(-1)
