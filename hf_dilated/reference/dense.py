"""What all definitions share: who belongs to which document, and a softmax over what is seen."""

import math

import torch
from torch import Tensor


def softmax_over(
    m: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense softmax with the bias ``log m``, in float64.

    Args:
        m: (B, H, N, M) how often each key counts.
        query: (B, H, N, D).
        key: (B, G, M, D).
        value: (B, G, M, Dv).
        scale: Factor of the scores; ``1 / sqrt(D)`` if None.
        return_lse: Also return the log-sum-exp (B, H, N).
    """
    query, key, value = query.double(), key.double(), value.double()
    H, D = query.shape[1], query.shape[3]
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    value = torch.where(m.any(2).unsqueeze(-1), value, 0)  # whatever lies in slots that nobody sees
    scores = query @ torch.where(m.any(2).unsqueeze(-1), key, 0).transpose(2, 3)
    scores = scores * (1 / math.sqrt(D) if scale is None else scale) + m.double().log()
    sees = m.any(-1, keepdim=True)  # a row that sees no key has output 0 and LSE -inf
    weights = torch.where(sees, torch.where(sees, scores, 0).softmax(-1), 0)
    output = weights @ value
    if not return_lse:
        return output
    return output, torch.where(sees[..., 0], torch.where(sees, scores, 0).logsumexp(-1), -math.inf)


def positions(
    batch: int, queries: int, keys: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Number the real tokens of every document from 0; padding is -1. Returns (B, M) integers.

    A document starts at a real token whose ``position_ids`` entry is not its predecessor's plus one.
    ``position_ids`` of shape (B, N) belong to the last N slots; nothing starts before them.
    """
    result = torch.full((batch, keys), -1)
    for b in range(batch):
        count = 0
        for slot in range(keys):
            if attention_mask is not None and not attention_mask[b, slot]:
                continue
            if position_ids is not None:
                t = slot - (keys - position_ids.shape[1])
                if t >= 1 and position_ids[b, t] != position_ids[b, t - 1] + 1:
                    count = 0
            result[b, slot] = count
            count += 1
    return result
