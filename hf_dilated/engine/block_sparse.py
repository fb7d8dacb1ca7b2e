"""Block-sparse attention on a GPU: lists of blocks, made on the device when they are first needed and kept for the
layers that follow."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_dilated.engine import flash_block_sparse
from hf_dilated.engine.execute import HAS_TRITON, runs_fused
from hf_dilated.engine.flash_block_sparse import Lists
from hf_dilated.memory.bounded import bounded_cache
from hf_dilated.patterns import BlockSparsePattern, Pattern
from hf_dilated.patterns.block_sparse import check_mask
from hf_dilated.patterns.documents import Documents, Integers
from hf_dilated.patterns.partials import Spans

if HAS_TRITON:
    from hf_dilated.engine import fused_block_lists, fused_choice, fused_chosen, fused_chosen_backward
    from hf_dilated.engine import fused_block_sparse as fused
    from hf_dilated.engine import fused_block_sparse_backward as fused_backward
    from hf_dilated.engine.fused_block_lists import Shown, to_device
    from hf_dilated.engine.fused_block_sparse import Split, Walk
    from hf_dilated.engine.fused_choice import Places

KEPT = 16
LONGEST_LIST = 32  # query blocks that one program adds up for a key block, while there are slots
SLOTS = 1  # for each block of keys: the parts of long lists take no more than keys and values in float32
TABLE_BYTES = 1 << 30


class BlockSparse(NamedTuple):
    """A call of block-sparse attention on a GPU."""

    pattern: BlockSparsePattern
    documents: Documents
    is_causal: bool

    @classmethod
    def of(cls, pattern: Pattern, documents: Documents, is_causal: bool, query: Tensor) -> "BlockSparse | None":
        """Describe a call; None if it does not run on these kernels."""
        pattern.check(query.shape[1], is_causal)
        if isinstance(pattern, BlockSparsePattern) and runs_fused(query) and documents.length:
            return cls(pattern, documents, is_causal)
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend; arguments and results as in :func:`hf_dilated.engine.execute.forward`."""
        output, lse = self._forward(q, k, v, scale)
        if turns := self.pattern.chosen_blocks:
            size = self.pattern.config.block_size
            places = _places(self.pattern, self.documents, q.shape[1], q.device)
            choice = fused_choice.choose(places, turns, size, q, k)
            fused_chosen.add_forward(choice, places, size, q, k, v, output, lse, scale)
        return output, lse

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if flash_block_sparse.refuses(*self, q, v) is None:
            lists = flash_lists(*self, q.shape[1], q.device, by_key=False)
            return flash_block_sparse.forward(lists, self.is_causal, q, k, v, scale)
        walk = query_walk(*self, q.shape[1], q.device)
        return fused.forward(walk, self.pattern.config.block_size, self.is_causal, q, k, v, scale)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients; ``output`` and ``lse`` may be those of more than this call."""
        tensors = grad, q, k, v, output, lse, scale
        grads = self._backward(*tensors)
        if not (turns := self.pattern.chosen_blocks):
            return grads
        size = self.pattern.config.block_size
        places = _places(self.pattern, self.documents, q.shape[1], q.device)
        choice = fused_choice.choose(places, turns, size, q, k)
        fused_chosen_backward.add_backward(choice, places, size, *tensors, grads)
        return grads

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = grad, q, k, v, output, lse, scale
        if flash_block_sparse.refuses(*self, q, v) is None:
            lists = flash_lists(*self, q.shape[1], q.device, by_key=True)
            return flash_block_sparse.backward(lists, self.is_causal, *tensors)
        queries = query_walk(*self, q.shape[1], q.device)
        keys, split = key_walk(*self, q.shape[1], q.device)
        return fused_backward.backward(queries, keys, split, self.pattern.config.block_size, self.is_causal, *tensors)


@bounded_cache(TABLE_BYTES, KEPT, grows=False)
def flash_lists(
    pattern: BlockSparsePattern,
    documents: Documents,
    is_causal: bool,
    heads: int,
    device: torch.device,
    *,
    by_key: bool,
) -> Lists:
    """Lists for FlashAttention 4, of a row of the batch: for all heads, or for each if they differ."""
    requests, _ = _requests(np.array([[0, documents.keys]]), pattern.config.block_size, is_causal, by_key)
    groups = len(pattern.config.parts(pattern.layer))
    shown = _shown_to(pattern, documents, is_causal, heads, 1 if groups == 1 else heads // groups, device)
    lengths = fused_block_lists.list_lengths(shown, requests, by_key=by_key)
    return fused_block_lists.list_blocks(shown, requests, lengths, by_key=by_key)[0]


@bounded_cache(TABLE_BYTES, KEPT, grows=False)
def query_walk(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, heads: int, device: torch.device
) -> "Walk":
    """What the blocks of queries see."""
    size = pattern.config.block_size
    spans = _spans(documents)
    kinds, kind = _kinds(spans)
    requests, first = _requests(kinds, size, is_causal, by_key=False)
    own, block = _blocks(spans[:, 0] // size, -(-spans[:, 1] // size))
    sees_all = max(parts.global_blocks for parts in pattern.config.parts(pattern.layer)) if not is_causal else 0
    order = np.argsort(np.where(block < sees_all, np.iinfo(np.int64).min, -block), kind="stable")
    own, block = own[order], block[order]
    zero = np.zeros_like(block)
    entries = _entries(documents, own, block, block + first[kind][own], zero, zero + 1, zero - 1)
    shown = _shown_to(pattern, documents, is_causal, heads, 1, device)
    lengths = fused_block_lists.list_lengths(shown, requests, by_key=False)
    lists, (entries_there,) = fused_block_lists.list_blocks(shown, requests, lengths, entries, by_key=False)
    is_full = int((spans[:, 1] - spans[:, 0]).sum()) == documents.rows * documents.queries
    return Walk(entries_there, lists, is_full)


@bounded_cache(TABLE_BYTES, KEPT, grows=False)
def key_walk(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, heads: int, device: torch.device
) -> tuple["Walk", "Split"]:
    """What sees the blocks of keys; long lists are cut, and their parts get slots."""
    size, spans = pattern.config.block_size, _spans(documents)
    shown = _shown_to(pattern, documents, is_causal, heads, 1, device)
    kinds, kind = _kinds(spans)
    requests, first = _requests(kinds, size, is_causal, by_key=True)
    own, block = _blocks(np.zeros_like(spans[:, 0]), -(-spans[:, 1] // size))
    number = block + first[kind][own]
    lengths = fused_block_lists.list_lengths(shown, requests, by_key=True)
    length = lengths[number]
    parts = _parts(length, SLOTS * documents.rows * documents.keys // size)
    used = np.where(parts > 1, parts, 0)
    slot = np.cumsum(used) - used
    cut = np.flatnonzero(used)
    split = np.stack([np.array(documents.key_base)[own], spans[own, 1], block, slot, slot + used], 1)[cut]
    which = np.repeat(np.arange(len(block)), parts)
    turn = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    each = -(-length // parts)
    order = np.argsort(turn * each[which] - length[which], kind="stable")
    which, turn = which[order], turn[order]
    slots = np.where(used[which] > 0, slot[which] + turn, -1)
    entries = _entries(documents, own[which], block[which], number[which], turn, parts[which], slots)
    lists, (entries_there, split_there) = fused_block_lists.list_blocks(
        shown, requests, lengths, entries, split, by_key=True
    )
    is_full = int(spans[:, 1].sum()) == documents.rows * documents.keys
    return Walk(entries_there, lists, is_full), Split(split_there, int(used.sum()))


@bounded_cache(TABLE_BYTES, KEPT, grows=False)
def _places(pattern: BlockSparsePattern, documents: Documents, heads: int, device: torch.device) -> "Places":
    """Where the blocks lie among which tokens choose."""
    size, spans = pattern.config.block_size, _spans(documents)
    blocks = -(-spans[:, 1] // size)
    own, block = _blocks(np.zeros_like(blocks), blocks)
    first = (np.cumsum(blocks) - blocks)[own]
    fields = documents.key_base, documents.query_base, documents.first_query, documents.length
    entries = np.stack([*(np.array(field)[own] for field in fields), block, first], 1)
    rows = np.flatnonzero(block >= spans[own, 0] // size)[::-1]  # those with most to choose from first
    shown = _shown_to(pattern, documents, True, heads, 1, device)
    entries_there, rows_there = to_device(device, entries, rows)
    return Places(entries_there, rows_there, shown)


def _shown_to(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, heads: int, each: int, device: torch.device
) -> "Shown":
    """What the groups of heads see; every group ``each`` times. It serves all lengths, or where blocks are random those
    up to the next power of two."""
    blocks = -(-max(documents.length) // pattern.config.block_size)
    parts = pattern.config.parts(pattern.layer)
    for own in parts:
        check_mask(own, blocks)
    rows = 1 << (blocks - 1).bit_length() if any(own.random_blocks for own in parts) else 0
    return _shown(pattern, rows, is_causal, heads, each, device)


@bounded_cache(TABLE_BYTES, KEPT, grows=False)
def _shown(
    pattern: BlockSparsePattern, rows: int, is_causal: bool, heads: int, each: int, device: torch.device
) -> "Shown":
    groups = pattern.groups(heads)
    return fused_block_lists.show([group for group in groups for _ in range(each)], rows, is_causal, device)


def _spans(documents: Documents) -> Integers:
    """(documents, 2) first query and length."""
    return np.array([documents.first_query, documents.length], dtype=np.int64).T


def _blocks(first: Integers, stop: Integers) -> tuple[Integers, Integers]:
    """The blocks of all documents, one after the other: which document, and which of its blocks."""
    return np.repeat(np.arange(len(first)), stop - first), Spans(first, stop - first, 1).tokens()


def _kinds(spans: Integers) -> tuple[Integers, list[int]]:
    """Documents of one kind share their lists: the spans that differ, and which of them is that of each document."""
    number: dict[tuple[int, ...], int] = {}
    kind = [number.setdefault(tuple(span), len(number)) for span in spans.tolist()]
    return np.array(list(number)), kind


def _requests(kinds: Integers, size: int, is_causal: bool, by_key: bool) -> tuple[Integers, Integers]:
    """What to list.

    Returns:
        Requests as :func:`hf_dilated.engine.fused_block_lists.list_blocks` takes them, and what to add to a block of
        each kind of document to get the number of its request.
    """
    low, total = kinds[:, 0] // size, -(-kinds[:, 1] // size)
    begin = np.zeros_like(low) if by_key else low
    own, block = _blocks(begin, total)
    low, total_of = low[own], total[own]
    if is_causal:
        low, high = (np.maximum(block, low), total_of) if by_key else (np.zeros_like(block), block + 1)
        edge = np.where((block >= low) | (not by_key), block, -1)
    else:  # keys beyond the end have no gradient, so by key their block needs no mask
        low, high = low if by_key else np.zeros_like(block), total_of
        edge = np.where((kinds[own, 1] % size > 0) & (not by_key), total_of - 1, -1)
    return np.stack([block, low, high, edge], 1), np.cumsum(total - begin) - total


def _entries(documents: Documents, own: Integers, block: Integers, *fields: Integers) -> Integers:
    places = documents.key_base, documents.query_base, documents.first_query, documents.length
    entries = np.stack([*(np.array(place, dtype=np.int64)[own] for place in places), block, *fields], 1)
    assert entries.shape[1] == fused.FIELDS
    return entries


def _parts(length: Integers, slots: int) -> Integers:
    """Into how many parts to cut lists, so that all parts of those that are cut have a slot."""
    longest = LONGEST_LIST
    while True:
        parts = np.maximum(-(-length // longest), 1)
        if int(parts[parts > 1].sum()) <= slots:
            return parts
        longest *= 2
