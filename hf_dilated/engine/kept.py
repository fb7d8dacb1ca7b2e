"""Attention to a cache that has dropped what no later token sees."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_dilated.engine.kernels import attend_with_bias
from hf_dilated.memory import BufferType, buffers


def kept_bias(count: Tensor, used: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Turn how often keys count into a bias for :func:`decode_kept`.

    Slots that hold no key yet are far below every score: who sees a key, does not see them, and who sees none, sees
    their zeros.

    Args:
        count: (B or 1, G, H / G, C) numbers or bool.
        used: Slots that hold a key; at least one does not.
        rows: B.
        dtype: Of the query.

    Returns:
        (B · G, 1, H / G, C).
    """
    bias = count.to(dtype).log_()
    bias[..., used:] = torch.finfo(dtype).min / 4
    return bias.expand(rows, -1, -1, -1).flatten(0, 1).unsqueeze(1)


def decode_kept(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, sink_logits: Tensor | None = None
) -> Tensor:
    """Attend from the last token of a cache to all slots where they lie, in one call.

    Query heads that share keys come as queries, so that keys are read once. Where ``overlap="count"`` meets half
    precision, the logarithms of the numbers are rounded like it.

    Args:
        query: (B, H, 1, D).
        key: (B, G, C, D), zero in slots that hold no key; the last one never does.
        value: (B, G, C, Dv), alike.
        bias: (B · G, 1, H / G, C) from :func:`kept_bias`.
        scale: Factor of the scores.
        sink_logits: (H,) learned logits that take part in every softmax of their head without a value.

    Returns:
        Output (B, H, 1, Dv).
    """
    (B, H), G = query.shape[:2], key.shape[1]
    if sink_logits is not None:
        sinks = sink_logits.to(bias.dtype).view(1, G, H // G).expand(B, -1, -1).reshape(B * G, 1, H // G, 1)
        bias = torch.cat([bias[..., :-1], sinks], 3)
    query = query.reshape(B * G, 1, H // G, -1)
    key, value = (x.flatten(0, 1).unsqueeze(1) for x in (key, value))
    return attend_with_bias(query, key, value, bias, scale).view(B, H, 1, -1)


def spread(classes: Sequence[Tensor], key_positions: Sequence[Tensor], past: int, queries: int) -> Tensor:
    """Put kept keys (or values) back where their positions say; what was dropped stays unwritten.

    Args:
        classes: (B, G, M, D) of classes of heads side by side; the last ``queries`` slots are new.
        key_positions: (B or 1, G, M) for each of them, the position of the key in each slot, -1 for none.
        past: Tokens before the new ones, at most over the rows.
        queries: N.

    Returns:
        (B, G of all classes, past + N, D).
    """
    heads, (B, _, _, D) = [x.shape[1] for x in classes], classes[0].shape
    shape = B, sum(heads), past + queries, D
    result = buffers.empty(BufferType.TEMP, shape, classes[0].dtype, classes[0].device)
    for own, x, positions in zip(result.split(heads, 1), classes, key_positions, strict=True):
        G, old = x.shape[1], x.shape[2] - queries
        slot = positions[..., :old]
        slot = torch.where(slot >= 0, slot, past)  # nothing: where a new one will be written
        own.scatter_(2, slot[..., None].expand(B, G, old, D), x[:, :, :old])
        own[:, :, past:] = x[:, :, old:]
    return result
