"""Triton kernels by which tokens choose blocks by their content; the choice stays on the device.

Every token of every head makes K choices, its items. Items are sorted by the block that they chose and cut into tiles
of items of one block, so that a program reads a block of keys once for many of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.fused_block_lists import FIELDS as PART_FIELDS
from hf_dilated.engine.fused_block_lists import Shown, _seen
from hf_dilated.engine.fused_block_sparse import _load, _precision, _strides, _widths
from hf_dilated.memory import BufferType, buffers

FIELDS = 6
LENGTHS = ["U", "N", "M", "count", "drawn_rows", "pitch"]  # these change: one program serves all
FEWEST_SLOTS = 4
COLUMNS = 64  # mean keys that a program looks at in one step; half as many in float32


class Places(NamedTuple):
    """Where blocks lie.

    Attributes:
        entries: (U, FIELDS) int32 key base, query base, first query and length of the document; block; number of the
            document's first block. Blocks of one document lie side by side.
        rows: (T,) int32 those of them that have queries.
        shown: What tokens see anyway.
    """

    entries: Tensor
    rows: Tensor
    shown: Shown


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        blocks: (H, B * N, K) int32 ``g * U + u``, block u of key-value head g; ``G * U`` for none.
        order: (H * B * N * K,) int64 places in ``blocks``, the items, sorted by what they chose.
        starts: (G * U + 1,) int32 where the items of a block start; those that chose nothing come after all.
    """

    blocks: Tensor
    order: Tensor
    starts: Tensor


class Tiles(NamedTuple):
    """Items of a block, cut into tiles.

    Attributes:
        rows: Items of a tile.
        most: Tiles of a key-value head, at most.
        starts: (G * U + 1,) int32 first tile of a block.
        blocks: (G * most,) int32 the block of a tile; those beyond the last tile have G * U.
    """

    rows: int
    most: int
    starts: Tensor
    blocks: Tensor


@triton.jit(do_not_specialize=LENGTHS)
def _mean_kernel(
    K, MEAN, places, U, M, G, k_row, k_head, k_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Mean keys of whole blocks (those of others mean nothing) as terms (TERMS, G, U, D): each holds what the one
    before left over, 2048 times."""
    head = tl.program_id(0) % G
    u = tl.program_id(0) // G
    key_base = tl.load(places + u * FIELDS)
    length = tl.load(places + u * FIELDS + 3)
    first = tl.load(places + u * FIELDS + 4) * SIZE
    k_base = (key_base // M).to(tl.int64) * k_row + head.to(tl.int64) * k_head
    total = tl.zeros((WIDTH,), tl.float32)
    for step in range(0, SIZE, ROWS):
        k = _load(K + k_base, key_base % M, first + step, 0, length, k_token, ROWS, D, WIDTH, False).to(tl.float32)
        total += tl.sum(tl.where((step + tl.arange(0, ROWS) < SIZE)[:, None], k, 0.0), 0)
    d = tl.arange(0, WIDTH)
    rest = total / SIZE
    for term in tl.static_range(TERMS):
        part = rest.to(MEAN.dtype.element_ty)
        tl.store(MEAN + ((term * G + head).to(tl.int64) * U + u) * D + d, part, mask=d < D)
        rest = (rest - part.to(tl.float32)) * 2048.0


@triton.jit(do_not_specialize=LENGTHS)
def _choose_kernel(
    Q, MEAN, CHOSEN, places, rows, parts, masks, drawn, U, count, N, M, drawn_rows, H, GROUP, REPEATS,
    pitch, q_row, q_head, q_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, MOST: tl.constexpr, HAS_MASK: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, FIELDS: tl.constexpr, PART_FIELDS: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries choose: the best of what it has seen is kept; of equals, the earlier block."""
    TILES: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    NEVER: tl.constexpr = 0x7FFFFFFF
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    entry = places + tl.load(rows + tile // TILES) * FIELDS
    key_base = tl.load(entry)
    query_base = tl.load(entry + 1)
    first_query = tl.load(entry + 2)
    block = tl.load(entry + 4)
    first_block = tl.load(entry + 5)
    first = block * SIZE + (tile % TILES) * ROWS
    last = tl.minimum(tl.load(entry + 3), block * SIZE + SIZE)
    row = (key_base // M).to(tl.int64)
    query_slot = query_base - row.to(tl.int32) * N
    q_base = Q + row * q_row + head.to(tl.int64) * q_head
    q = _load(q_base, query_slot, first, first_query, last, q_token, ROWS, D, WIDTH, False)
    group = head // GROUP
    own = parts + group * PART_FIELDS
    turns = tl.load(own + 7)
    slot = tl.arange(0, SLOTS)
    d = tl.arange(0, WIDTH)
    best = tl.where(slot < turns, float("-inf"), float("inf"))[None, :] + tl.zeros((ROWS, SLOTS), tl.float32)
    taken = (-1 - slot)[None, :] + tl.zeros((ROWS, SLOTS), tl.int32)
    kv_head = head // REPEATS
    plane = U.to(tl.int64) * (H // REPEATS) * D
    means = MEAN + (kv_head.to(tl.int64) * U + first_block) * D
    for begin in range(0, block, COLUMNS):
        j = begin + tl.arange(0, COLUMNS)
        score = tl.zeros((ROWS, COLUMNS), tl.float32)
        for term in tl.static_range(TERMS):  # the least first
            mean = tl.load(
                means + (TERMS - 1 - term) * plane + j[:, None] * D + d[None, :],
                mask=(j < block)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            score = tl.dot(q, tl.trans(mean), score * 0.00048828125, input_precision=PRECISION)
        seen = _seen(
            j, block, j < block, own, masks, drawn + group.to(tl.int64) * drawn_rows * MOST, MOST, HAS_MASK, True, False
        )
        score = tl.where(((j < block) & ~seen)[None, :], score, float("-inf"))
        for _ in range(0, turns):
            largest = tl.max(score, 1)
            column = tl.min(tl.where(score == largest[:, None], j[None, :], NEVER), 1)
            score = tl.where(j[None, :] == column[:, None], float("-inf"), score)
            least = tl.min(best, 1)
            dropped = tl.max(tl.where(best == least[:, None], taken, -NEVER), 1)
            is_better = (taken == dropped[:, None]) & (largest > least)[:, None]
            best = tl.where(is_better, largest[:, None], best)
            taken = tl.where(is_better, column[:, None], taken)
    none = (H // REPEATS) * U
    chosen = tl.where(taken >= 0, kv_head * U + first_block + taken, none)
    p = first + tl.arange(0, ROWS)
    place = CHOSEN + (head.to(tl.int64) * count + query_base + p)[:, None] * pitch + slot[None, :]
    is_query = (p >= first_query) & (p < last)
    tl.store(place, chosen, mask=is_query[:, None] & (slot < pitch)[None, :])


def choose(places: Places, turns: int, size: int, q: Tensor, k: Tensor) -> Choice:
    """Let every token choose up to ``turns`` blocks of ``size`` tokens."""
    (B, H, N, D), (G, M), U = q.shape, k.shape[1:3], len(places.entries)
    if B * H * N * turns >= 1 << 31:
        raise ValueError(
            f"topk_blocks: {turns} blocks for each of {B * N:,} tokens of {H} heads are more than 2**31 choices; "
            "choose fewer blocks, or give fewer tokens at a time"
        )
    shown, width = places.shown, _widths(q, k)[2]
    terms = 1 if q.dtype == torch.float32 else 3  # as exact as float32
    mean = buffers.empty(BufferType.TEMP, (terms, G, U, D), q.dtype, q.device)
    _mean_kernel[(U * G,)](k, mean, places.entries, U, M, G, *_strides(k), size, min(32, size), D, width, terms, FIELDS)
    chosen = torch.full((H, B * N, turns), G * U, dtype=torch.int32, device=q.device)
    columns = COLUMNS if terms > 1 else COLUMNS // 2
    tile = max(16, min(size, 64 if terms == 1 or D > 128 else 128))
    _choose_kernel[(len(places.rows) * triton.cdiv(size, tile) * H,)](
        q, mean, chosen, places.entries, places.rows, shown.parts, shown.masks, shown.drawn, U, B * N, N, M,
        shown.rows, H, H // len(shown.groups), H // G, turns, *_strides(q), size, tile, columns, D, width,
        slots_of(turns), shown.drawn.shape[2], shown.has_mask, terms, _precision(q),
        FIELDS, PART_FIELDS, num_warps=8 if tile > 64 else 4, num_stages=2,
    )  # fmt: skip
    blocks, order = chosen.flatten().sort(stable=True)
    limits = torch.arange(G * U + 1, dtype=torch.int32, device=q.device)
    return Choice(chosen, order, torch.searchsorted(blocks, limits, out_int32=True))


def slots_of(turns: int) -> int:
    """For how many choices a program is made: it serves all who make fewer, down to half as many, or to one."""
    return max(FEWEST_SLOTS, triton.next_power_of_2(turns))


def cut(choice: Choice, kv_heads: int, rows: int) -> Tiles:
    """Cut what chose a block into tiles of ``rows`` items."""
    counts = choice.starts.diff()
    most = len(choice.order) // kv_heads // rows + len(counts) // kv_heads
    stops = (-(-counts // rows)).cumsum(0, dtype=torch.int32)
    numbers = torch.arange(kv_heads * most, dtype=torch.int32, device=counts.device)
    blocks = torch.searchsorted(stops, numbers, right=True, out_int32=True)
    return Tiles(rows, most, torch.nn.functional.pad(stops, (1, 0)), blocks)


def heads_at_once(kv_heads: int, results: int) -> int:
    """How many key-value heads share a launch: the results of their items take no more than the queries, or than those
    of one head."""
    return max(1, kv_heads // results)
