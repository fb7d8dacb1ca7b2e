"""The positions that all layers of a forward share, and packed documents that only the position ids tell of.

Transformers tells the mask function of packed documents when there is neither padding nor a cache, and for some models
(gpt-oss, Gemma 3) never. The position ids that reach the attention function say it in every case.
"""

import threading
import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

KINDS_OF_LAYERS = 4  # of one forward: each has its own mask


class _Answer(NamedTuple):
    asked: list[tuple[weakref.ref[Tensor], int | None]]
    shape: tuple[int, int]
    positions: Tensor | None


class _Answers(threading.local):
    def __init__(self) -> None:
        self.recent: deque[_Answer] = deque(maxlen=KINDS_OF_LAYERS)


_answers = _Answers()


def shared_positions(
    mask: Tensor | None, position_ids: Tensor | None, batch: int, queries: int, keys: int
) -> Tensor | None:
    """Return the positions of the key slots: the same tensor for all layers of a forward that share a mask.

    A document starts at a real query whose position id is not its predecessor's plus one.

    Args:
        mask: (B or 1, 1, 1, M) positions, as the mask function made them, or None.
        position_ids: (B or 1, N), or None. The slots of the queries are the last N written ones.
        batch: B.
        queries: N.
        keys: M.

    Returns:
        (B, M) int64, on the CPU where there are several documents; None for one whole document a row.

    Example:
        >>> shared_positions(None, torch.tensor([[0, 1, 2, 0, 1]]), batch=1, queries=5, keys=5)
        tensor([[0, 1, 2, 0, 1]])
    """
    if queries == 1:
        position_ids = None  # one token starts no document
    tensors = [tensor for tensor in (mask, position_ids) if tensor is not None]
    if not tensors:
        return None
    if torch.compiler.is_compiling():
        return _positions(mask, position_ids, batch, keys)
    for answer in _answers.recent:
        if answer.shape == (batch, keys) and _unchanged(answer.asked, tensors):
            return answer.positions
    positions = _positions(mask, position_ids, batch, keys)
    asked = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]
    _answers.recent.append(_Answer(asked, (batch, keys), positions))
    return positions


def _version(tensor: Tensor) -> int | None:
    """Changes of inference tensors leave no trace."""
    return None if tensor.is_inference() else tensor._version


def _unchanged(asked: list[tuple[weakref.ref[Tensor], int | None]], tensors: list[Tensor]) -> bool:
    return len(asked) == len(tensors) and all(
        ref() is tensor and version is not None and version == _version(tensor)
        for (ref, version), tensor in zip(asked, tensors, strict=True)
    )


def _positions(mask: Tensor | None, position_ids: Tensor | None, batch: int, keys: int) -> Tensor | None:
    positions = None if mask is None else mask[:, 0, 0].long().expand(batch, keys)
    if position_ids is None:
        return positions
    whole = torch.arange(keys, device="cpu").expand(batch, keys) if positions is None else positions.cpu()
    starts = _document_starts(whole, position_ids.cpu().expand(batch, -1))
    if not torch.compiler.is_compiling() and not starts.any():
        return positions
    count = (whole >= 0).long().cumsum(1) - 1
    start = torch.where(starts | (whole == 0), count, 0).cummax(1).values
    return torch.where(whole >= 0, count - start, whole)


def _document_starts(positions: Tensor, ids: Tensor) -> Tensor:
    """Slots (B, M) of real queries whose id follows neither the real query before nor the slot before.

    With padding inside a document, some count it (the default of a model) and some do not (``generate``).
    """
    queries = ids.shape[1]
    slot = torch.arange(positions.shape[1], device=positions.device)
    first_query = (positions != -2).sum(1, keepdim=True) - queries
    is_query = (slot >= first_query) & (positions >= 0)
    id_of = ids.gather(1, (slot - first_query).clamp(0, queries - 1))
    before = pad(torch.where(is_query, slot, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    follows_token = id_of == id_of.gather(1, before.clamp(min=0)) + 1
    follows_slot = id_of == id_of.roll(1, 1) + 1
    return is_query & (before >= 0) & ~follows_token & ~follows_slot
