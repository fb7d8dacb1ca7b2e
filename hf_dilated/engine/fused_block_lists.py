"""Triton kernels that list which blocks see each other: a launch for all heads, and nothing that asks the host.

A program goes over the candidates of one block and writes those that the parts show, in order. What is random is drawn
first, in a launch of its own, as :mod:`hf_dilated.patterns.blocks` draws it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.config import BlockParts
from hf_dilated.engine.flash_block_sparse import Lists
from hf_dilated.patterns.block_sparse import Group
from hf_dilated.patterns.blocks import random_number, turn_of
from hf_dilated.patterns.documents import Integers

FIELDS = 8
CANDIDATES = 256  # that a program looks at in one step
LARGEST_POWER = 30  # of a distance in blocks
ALIGNED = 4  # 32-bit integers: Triton compiles one program for all tables that begin there
LENGTHS = ["rows", "count", "widest"]  # arguments that change with the length: one program serves all


class Shown(NamedTuple):
    """What groups of heads see, on the device.

    Attributes:
        groups: The groups.
        rows: For how many rows blocks are drawn, 0 if none are: a row draws the same in documents of any length.
        is_causal: Whether rows see only earlier blocks.
        parts: (h, FIELDS) int32: local, global, strided and dilated blocks, rows of the mask and where they begin,
            random blocks, and those that a token chooses.
        masks: int32, the bits of all masks row by row.
        drawn: (h, rows, most) int32 random blocks before each row, -1 for none.
    """

    groups: tuple[Group, ...]
    rows: int
    is_causal: bool
    parts: Tensor
    masks: Tensor
    drawn: Tensor

    @property
    def has_mask(self) -> bool:
        """Whether a group has a mask of its own."""
        return any(group.parts.block_mask is not None for group in self.groups)


@triton.jit
def _shows(i, j, is_inside, own, masks, HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Whether rows i see blocks j by a part that is not random."""
    distance = tl.abs(i - j)
    first = tl.load(own + 1)
    stride = tl.load(own + 2)
    shown = (distance < tl.load(own)) | (j < first)
    if not IS_CAUSAL:
        shown = shown | (i < first)
    shown = shown | (j % tl.maximum(stride, 1) == stride - 1)
    is_power = (distance > 0) & ((distance & (distance - 1)) == 0)
    shown = shown | (is_power & (distance < (1 << tl.load(own + 3))))
    if HAS_MASK:
        rows = tl.load(own + 4)
        place = tl.load(own + 5) + i * ((rows + 31) // 32) + j // 32
        word = tl.load(masks + place, mask=is_inside & (i < rows) & (j < rows), other=0)
        shown = shown | (((word >> (j % 32)) & 1) == 1)
    return shown & is_inside


@triton.jit(do_not_specialize=LENGTHS)
def _draw_kernel(
    DRAWN, parts, masks, numbers, rows,
    MOST: tl.constexpr, TURNS: tl.constexpr, FIELDS: tl.constexpr, CANDIDATES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Draw blocks before a row's own one that no part shows: Floyd's ranks among them, then the blocks of the ranks."""
    i = tl.program_id(0) % rows
    own = parts + (tl.program_id(0) // rows) * FIELDS
    place = tl.program_id(0).to(tl.int64) * MOST
    count = tl.load(own + 6)
    unseen = i * 0
    for begin in range(0, i, CANDIDATES):
        j = begin + tl.arange(0, CANDIDATES)
        unseen += tl.sum(((j < i) & ~_shows(i + j * 0, j, j < i, own, masks, HAS_MASK, True)).to(tl.int32), 0)
    turn = tl.arange(0, TURNS)
    ranks = tl.full((TURNS,), -1, tl.int32)
    for t in range(0, MOST):
        last = tl.maximum(unseen - count, 0) + t
        rank = ((tl.load(numbers + place + t).to(tl.int64) * (last + 1)) >> 31).to(tl.int32)
        rank = tl.where(tl.sum((ranks == rank).to(tl.int32), 0) > 0, last, rank)
        ranks = tl.where((turn == t) & (t < count) & (t < unseen), rank, ranks)
    drawn = tl.full((TURNS,), -1, tl.int32)
    before = i * 0
    for begin in range(0, i, CANDIDATES):
        j = begin + tl.arange(0, CANDIDATES)
        is_unseen = (j < i) & ~_shows(i + j * 0, j, j < i, own, masks, HAS_MASK, True)
        rank_of = before + tl.cumsum(is_unseen.to(tl.int32), 0) - 1
        is_drawn = is_unseen[:, None] & (rank_of[:, None] == ranks[None, :])
        drawn = tl.maximum(drawn, tl.max(tl.where(is_drawn, j[:, None], -1), 0))
        before += tl.sum(is_unseen.to(tl.int32), 0)
    tl.store(DRAWN + place + turn, drawn, mask=turn < MOST)


@triton.jit
def _seen(
    c, block, is_inside, own, masks, drawn,
    MOST: tl.constexpr, HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Whether a block of queries sees the candidates c among the keys; by key, whether these rows see a block."""
    if BY_KEY:
        seen = _shows(c, block + c * 0, is_inside, own, masks, HAS_MASK, IS_CAUSAL)
    else:
        seen = _shows(block + c * 0, c, is_inside, own, masks, HAS_MASK, IS_CAUSAL)
    for t in range(0, MOST):
        if not BY_KEY or not IS_CAUSAL:
            seen = seen | (c == tl.load(drawn + block * MOST + t))
        if BY_KEY or not IS_CAUSAL:
            seen = seen | (tl.load(drawn + c * MOST + t, mask=is_inside, other=-1) == block)
    return seen & is_inside


@triton.jit(do_not_specialize=LENGTHS)
def _list_kernel(
    WHOLE, COUNT, EDGE, EDGE_COUNT, requests, parts, masks, drawn, rows, count, widest,
    MOST: tl.constexpr, FIELDS: tl.constexpr, CANDIDATES: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """List what one block sees, or what sees it; requests: block, first and last + 1 candidate, its edge."""
    head = tl.program_id(0) // count
    own = parts + head * FIELDS
    request = requests + (tl.program_id(0) % count) * 4
    block = tl.load(request)
    low = tl.load(request + 1)
    high = tl.load(request + 2)
    edge = tl.load(request + 3)
    place = tl.program_id(0).to(tl.int64)
    written = block * 0
    has_edge = block * 0
    for begin in range(low, high, CANDIDATES):
        c = begin + tl.arange(0, CANDIDATES)
        seen = _seen(
            c, block, c < high, own, masks, drawn + head.to(tl.int64) * rows * MOST, MOST, HAS_MASK, IS_CAUSAL, BY_KEY
        )
        whole = (seen & (c != edge)).to(tl.int32)
        at = written + tl.cumsum(whole, 0) - 1
        tl.store(WHOLE + place * widest + at, c, mask=whole == 1)
        written += tl.sum(whole, 0)
        has_edge += tl.sum((seen & (c == edge)).to(tl.int32), 0)
    for begin in range(written, widest, CANDIDATES):
        at = begin + tl.arange(0, CANDIDATES)
        tl.store(WHOLE + place * widest + at, at * 0, mask=at < widest)
    tl.store(COUNT + place, written)
    tl.store(EDGE + place, tl.maximum(edge, 0))
    tl.store(EDGE_COUNT + place, has_edge)


def show(groups: Sequence[Group], rows: int, is_causal: bool, device: torch.device) -> Shown:
    """Bring what groups of heads see to the device, and draw what is random for so many rows."""
    most = max(group.parts.random_blocks for group in groups)
    masks = [_words(group.parts) for group in groups]
    offsets = np.cumsum([0, *(len(mask) for mask in masks)])
    fields = [_fields(group.parts, offset) for group, offset in zip(groups, offsets, strict=False)]
    turns = np.array([[[turn_of(t, group.stream) for t in range(most)]] for group in groups], dtype=np.int64)
    row = torch.from_numpy(np.arange(rows))[:, None]
    numbers = random_number(row, torch.from_numpy(turns)).numpy()  # (h, rows, most)
    parts, words, random = to_device(device, np.array(fields), np.concatenate(masks), numbers)
    drawn = torch.empty(len(groups), rows, most, dtype=torch.int32, device=device)
    shown = Shown(tuple(groups), rows, is_causal, parts, words, drawn)
    if numbers.size:
        _draw_kernel[(len(groups) * rows,)](
            drawn, parts, words, random, rows,
            most, triton.next_power_of_2(most), FIELDS, CANDIDATES, shown.has_mask,
        )  # fmt: skip
    return shown


def list_blocks(
    shown: Shown, requests: Integers, lengths: Integers, *tables: Integers, by_key: bool
) -> tuple[Lists, list[Tensor]]:
    """List for all groups of heads what blocks see, or by key what sees them.

    Args:
        shown: What the groups see.
        requests: (L, 4) block; first and last + 1 of its candidates; its edge: the one seen through a mask, or -1.
        lengths: What :func:`list_lengths` says of them.
        tables: What else goes to the device, in the same transfer.
        by_key: Whether the blocks are of keys, and the candidates of queries.
    """
    device, shape = shown.parts.device, (1, len(shown.groups), len(requests))
    on_device, *others = to_device(device, requests, *tables)
    widest = _widest(shown, requests, lengths, by_key)
    edge_count, whole_count = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    edge, whole = (torch.empty(*shape, width, dtype=torch.int32, device=device) for width in (1, widest))
    _list_kernel[(shape[1] * shape[2],)](
        whole, whole_count, edge, edge_count, on_device, shown.parts, shown.masks, shown.drawn, shown.rows, shape[2],
        widest, shown.drawn.shape[2], FIELDS, CANDIDATES, shown.has_mask, shown.is_causal, by_key,
    )  # fmt: skip
    return Lists(edge_count, edge, whole_count, whole), others


def to_device(device: torch.device, *tables: Integers) -> list[Tensor]:
    """Bring tables to a device as 32-bit integers, in one transfer, for which nobody waits."""
    starts = [0, *accumulate(-(-table.size // ALIGNED) * ALIGNED for table in tables)]
    host = torch.empty(starts[-1], dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    for start, table in zip(starts, tables, strict=False):
        host.numpy()[start : start + table.size] = table.ravel()
    joined = host.to(device, non_blocking=True)
    return [joined[a : a + x.size].view(x.shape) for a, x in zip(starts, tables, strict=False)]


def _fields(parts: BlockParts, offset: int) -> list[int]:
    dilated = min(parts.dilated_blocks, LARGEST_POWER)
    rows = len(parts.block_mask or ())
    near = [parts.local_blocks, parts.global_blocks, parts.stride_blocks, dilated]
    return [*near, rows, offset, parts.random_blocks, parts.topk_blocks]


def _words(parts: BlockParts) -> Integers:
    """The mask's bits, a row in whole 32-bit integers."""
    if parts.block_mask is None:
        return np.zeros(0, dtype=np.int64)
    bits = np.stack(parts.mask_bits())
    padded = np.pad(bits, ((0, 0), (0, -len(bits) % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4").ravel().astype(np.int64)


def _widest(shown: Shown, requests: Integers, lengths: Integers, by_key: bool) -> int:
    """Upper bound of the lengths of lists; nobody here knows how many rows draw the same block."""
    is_drawn = shown.drawn.shape[2] > 0 and (by_key or not shown.is_causal)
    return max(1, int((requests[:, 2] - requests[:, 1] if is_drawn else lengths).max()))


def list_lengths(shown: Shown, requests: Integers, *, by_key: bool) -> Integers:
    """Upper bounds of the lengths of lists, over the groups; of rows that draw a block, as many as it draws itself.

    Args:
        shown: What the groups see.
        requests: What is listed, as :func:`list_blocks` takes it.
        by_key: Whether the blocks are of keys, and the candidates of queries.
    """
    block, low, high, _ = requests.T
    both_ways = 1 if shown.is_causal else 2
    lengths = np.zeros_like(block)
    for parts in {group.parts for group in shown.groups}:
        near = both_ways * (parts.local_blocks + parts.dilated_blocks + parts.random_blocks)
        length = near + parts.global_blocks + _marked(parts, requests, by_key)
        is_popular = (block < parts.global_blocks) & (by_key or not shown.is_causal)
        if k := parts.stride_blocks:
            is_popular |= (block % k == k - 1) & by_key
            length += 0 if by_key else -(-(high - low) // k)
        lengths = np.maximum(lengths, np.where(is_popular, high - low, np.minimum(high - low, length)))
    return lengths


def _marked(parts: BlockParts, requests: Integers, by_key: bool) -> Integers:
    """How many of their candidates the mask marks for blocks."""
    if parts.block_mask is None:
        return np.zeros(len(requests), dtype=np.int64)
    bits = np.stack(parts.mask_bits())
    places = np.flatnonzero(bits.T if by_key else bits)
    begin = requests[:, 0] * len(bits)
    below, all_of = (np.searchsorted(places, begin + limit) for limit in requests[:, 1:3].T)
    counts: Integers = all_of - below
    return counts
