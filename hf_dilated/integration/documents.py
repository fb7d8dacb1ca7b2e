"""The positions that all layers of a forward share, and packed documents that only the position ids tell of.

Transformers tells the mask function of packed documents when there is neither padding nor a cache, and for some models
(gpt-oss, Gemma 3) never. The position ids that reach the attention function say it in every case.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_dilated.integration.remembered import Remembered
from hf_dilated.integration.support import UnsupportedError

_positions_of: Remembered[Tensor | None] = Remembered()
_gapless: Remembered[bool] = Remembered()


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
        (B, M) int64, on the CPU for several queries (one synchronisation for all layers); None for one whole
        document a row.

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
        return _positions_while_tracing(mask, position_ids, batch, keys)
    if queries == 1:
        return _positions_of.get(tensors, (batch, keys), lambda: _stated(mask, batch, keys))
    return _positions_of.get(tensors, (batch, keys), lambda: _positions_on_host(mask, position_ids, batch, keys))


def check_gaps(positions: Tensor) -> None:
    """Refuse padding between real tokens of (B, M) positions: a window of a dense mask counts it, positions do not.

    Raises:
        UnsupportedError: If a row has some.
    """
    if torch.compiler.is_compiling():
        return
    if not _gapless.get([positions], None, lambda: _has_no_gaps(positions)):
        raise UnsupportedError(
            "attention_mask has padding between real tokens, and layers with a sliding window would count it; pad on "
            'the left or right only (prompt and prefix tuning: on the right), or use attn_implementation="sdpa"'
        )


def _has_no_gaps(positions: Tensor) -> bool:
    real = positions >= 0
    slot = torch.arange(positions.shape[1], device=positions.device)
    last, first = torch.where(real, slot, -1).amax(1), torch.where(real, slot, slot[-1] + 1).amin(1)
    return not bool((real.any(1) & (last - first + 1 != real.sum(1))).any())


def _stated(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    return None if mask is None else mask[:, 0, 0].long().expand(batch, keys)


def _positions_while_tracing(mask: Tensor | None, position_ids: Tensor | None, batch: int, keys: int) -> Tensor | None:
    stated = _stated(mask, batch, keys)
    if position_ids is None:
        return stated
    positions = torch.arange(keys, device="cpu").expand(batch, keys) if stated is None else stated.cpu()
    starts = _document_starts(positions, position_ids.cpu().expand(batch, -1))
    return _renumbered(positions, starts)


def _positions_on_host(mask: Tensor | None, position_ids: Tensor | None, batch: int, keys: int) -> Tensor | None:
    mask, position_ids = _fetch(mask, position_ids)
    whole = torch.arange(keys, device="cpu").expand(batch, keys)
    stated = _stated(mask, batch, keys)
    positions = whole if stated is None else stated
    if position_ids is not None:
        starts = _document_starts(positions, position_ids.expand(batch, -1))
        positions = _renumbered(positions, starts) if starts.any() else positions
    return None if torch.equal(positions, whole) else positions


def _fetch(*tensors: Tensor | None) -> list[Tensor | None]:
    """Bring integers to the host in one transfer: a device is asked to finish its work at most once."""
    away = [x for x in tensors if x is not None and x.device.type != "cpu"]
    if len({x.device for x in away}) != 1:
        return [None if x is None else x.cpu() for x in tensors]
    parts = iter(torch.cat([x.flatten().long() for x in away]).cpu().split([x.numel() for x in away]))
    return [x if x is None or x.device.type == "cpu" else next(parts).view(x.shape) for x in tensors]


def _renumbered(positions: Tensor, starts: Tensor) -> Tensor:
    count = (positions >= 0).long().cumsum(1) - 1
    start = torch.where(starts | (positions == 0), count, 0).cummax(1).values
    return torch.where(positions >= 0, count - start, positions)


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
