"""Attention to a cache that has dropped what no later token sees."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from hf_dilated.engine.streamed import wide
from hf_dilated.memory import BufferType, buffers
from hf_dilated.patterns.partials import ForgettingPattern


def decode_kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor,
    length: int,
    pattern: ForgettingPattern,
    scale: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend from the last token of a cache; nothing is synchronised.

    Nearly every key that is kept is visible, so all of them are read where they lie, once for each key-value head:
    its query heads come as queries. How often a key counts is a bias; on a CPU in the dtype of the query: where
    ``overlap="count"`` meets bfloat16, rounded like it.

    Args:
        query: (B, H, 1, D).
        key: (B, G, M, D).
        value: (B, G, M, Dv).
        key_positions: (B or 1, G, M) position of the key in each slot, -1 for none; the last one is the query's own.
        length: Larger than every position.
        pattern: Who attends to whom.
        scale: Factor of the scores.
        sink_logits: (H,) learned logits that take part in every softmax of their head without a value.

    Returns:
        Output (B, H, 1, Dv).
    """
    H, G = query.shape[1], key.shape[1]
    count = pattern.counts(key_positions[:, 0, -1], key_positions, length, H, G).to(wide(query.dtype))
    sees = count.any(2, keepdim=True)
    bias = torch.where(sees, count.log(), 0.0)
    if sink_logits is not None:
        bias = torch.where(sees, bias, -math.inf)
        bias = torch.cat([bias, sink_logits.to(bias)[:, None].expand(len(bias), H, 1)], 2)
        key, value = pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1))
    query, bias = (x.unflatten(1, (G, H // G)) for x in (query.squeeze(2), bias))
    output = (_products if query.is_cuda else _one_kernel)(query, key, value, bias, scale)
    return torch.where(sees, output.flatten(1, 2), 0).unsqueeze(2)


def _one_kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """On a GPU, where cuDNN's attention plans anew for every number of keys, and every token brings another."""
    dtype = wide(query.dtype)
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * scale + bias
    return (scores.softmax(-1) @ value.to(dtype)).to(query.dtype)


def spread(x: Tensor, key_positions: Tensor, past: int, queries: int) -> Tensor:
    """Put kept keys (or values) back where their positions say; what was dropped stays unwritten.

    Args:
        x: (B, G, M, D); the last ``queries`` slots are new.
        key_positions: (B or 1, G, M) as in :func:`decode_kept`.
        past: Tokens before the new ones, at most over the rows.
        queries: N.

    Returns:
        (B, G, past + N, D).
    """
    B, G, M, D = x.shape
    old = M - queries
    slot = key_positions[..., :old]
    slot = torch.where(slot >= 0, slot, past)  # nothing: where a new one will be written
    result = buffers.empty(BufferType.TEMP, (B, G, past + queries, D), x.dtype, x.device)
    result.scatter_(2, slot[..., None].expand(B, G, old, D), x[:, :, :old])
    result[:, :, past:] = x[:, :, old:]
    return result
