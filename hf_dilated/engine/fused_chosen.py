"""Triton kernels for blocks that tokens chose by their content: attention, merged into what tokens see anyway.

A program lets a tile of items see the block that they chose. What it returns is put at the items' places, in scratch
that a few key-value heads share, and merged token by token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.fused_block_sparse import LOG2E, Sizes, _load, _precision, _strides, _widths
from hf_dilated.engine.fused_choice import FIELDS, Choice, Places, cut, heads_at_once, slots_of
from hf_dilated.engine.fused_items import _limits, _load_rows, _rows_of, reciprocal
from hf_dilated.memory import BufferType, buffers

# These change with the length, or with how many blocks are chosen: one program serves all.
LENGTHS = ["U", "N", "M", "items", "count", "first", "heads", "none", "turns", "by_turns", "by_count", "by_N"]
LONGEST_TILE = 512  # items that one program serves
FORWARD = Sizes(64, 128, 4, 3), Sizes(64, 128, 8, 2), Sizes(16, 64, 8, 1)  # larger heads and float32 have less room


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    Q, K, V, PART, PART_LSE, places, order, starts, tile_starts, blocks_of, scale, first, heads, items, longest,
    by_turns, count, by_count, N, by_N, U, M, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Let a tile of items of one of the key-value heads ``first … first + heads`` see the block that they chose."""
    tile = tl.load(tile_starts + first * U) + tl.program_id(0)
    block = tl.load(blocks_of + tile)
    if block >= (first + heads) * U:
        return
    start, stop = _limits(tile, block, starts, tile_starts, longest)
    g = block // U
    u = block % U
    key_base = tl.load(places + u * FIELDS)
    slot = key_base % M
    first_key = tl.load(places + u * FIELDS + 4) * SIZE
    stop_key = first_key + SIZE
    key_row = (key_base // M).to(tl.int64)
    k_base = K + key_row * k_row + g.to(tl.int64) * k_head
    v_base = V + key_row * v_row + g.to(tl.int64) * v_head
    IS_WHOLE: tl.constexpr = COLUMNS <= SIZE
    whole_k = _load(k_base, slot, first_key, 0, stop_key, k_token, COLUMNS, D, WIDTH, IS_WHOLE)
    whole_v = _load(v_base, slot, first_key, 0, stop_key, v_token, COLUMNS, DV, VALUE_WIDTH, IS_WHOLE)
    e = tl.arange(0, VALUE_WIDTH)
    q_base = Q + (g * REPEATS).to(tl.int64) * q_head
    PART -= first.to(tl.int64) * items * DV
    PART_LSE -= first.to(tl.int64) * items
    for begin in range(start, stop, ROWS):
        i = begin + tl.arange(0, ROWS)
        is_item = i < stop  # in place of others stands the last one
        item = tl.load(order + tl.minimum(i, stop - 1)).to(tl.int32)
        of_head = item - g * items
        q_rows = q_base + _rows_of(of_head, by_turns, count, by_count, N, by_N, q_row, q_head, q_token)
        q = _load_rows(q_rows, D, WIDTH)
        acc = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for step in range(0, SIZE, COLUMNS):
            k, v = whole_k, whole_v
            if COLUMNS < SIZE:
                k = _load(k_base, slot, first_key + step, 0, stop_key, k_token, COLUMNS, D, WIDTH, True)
                v = _load(v_base, slot, first_key + step, 0, stop_key, v_token, COLUMNS, DV, VALUE_WIDTH, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if COLUMNS > SIZE:
                s = tl.where((tl.arange(0, COLUMNS) < SIZE)[None, :], s, float("-inf"))
            new = tl.maximum(largest, tl.max(s, 1))
            weight = tl.exp2(s - new[:, None])
            decay = tl.exp2(largest - new)
            total = total * decay + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
            largest = new
        tl.store(PART_LSE + item, (largest + tl.log2(total)) / 1.4426950408889634, mask=is_item)
        out = PART + item[:, None].to(tl.int64) * DV + e[None, :]
        acc = acc * (1.0 / total)[:, None]
        tl.store(out, acc.to(PART.dtype.element_ty), mask=is_item[:, None] & (e < DV)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    OUT, LSE, PART, PART_LSE, first, turns, count, N, H, heads, o_row, o_head, o_token,
    ROWS: tl.constexpr, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Merge what the heads ``first … first + heads`` have chosen into what they see anyway, in place."""
    own_head = tl.program_id(0) % heads
    head = first.to(tl.int64) + own_head
    t = (tl.program_id(0) // heads) * ROWS + tl.arange(0, ROWS)
    is_token = t < count
    row, n = (t // N).to(tl.int64), (t % N).to(tl.int64)
    e = tl.arange(0, VALUE_WIDTH)
    place = (own_head.to(tl.int64) * count + t) * turns
    lse_at = LSE + (row * H + head) * N + n
    own = tl.load(lse_at, mask=is_token, other=float("-inf"))
    largest = own
    for turn in range(0, SLOTS):
        is_there = t < tl.where(turn < turns, count, 0)
        lse = tl.load(PART_LSE + place + turn, mask=is_there, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    out = OUT + (row * o_row + head * o_head + n * o_token)[:, None] + e[None, :]
    mask = is_token[:, None] & (e < DV)[None, :]
    total = tl.exp(own - safe)
    acc = tl.load(out, mask=mask, other=0.0).to(tl.float32) * total[:, None]
    for turn in range(0, SLOTS):
        is_there = t < tl.where(turn < turns, count, 0)
        lse = tl.load(PART_LSE + place + turn, mask=is_there, other=float("-inf"))
        weight = tl.exp(lse - safe)
        part = tl.load(PART + (place + turn)[:, None] * DV + e[None, :], mask=mask & (weight > 0)[:, None], other=0.0)
        acc += part.to(tl.float32) * weight[:, None]
        total += weight
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=mask)
    tl.store(lse_at, tl.where(total > 0, safe + tl.log(total), float("-inf")), mask=is_token)


def add_forward(
    choice: Choice,
    places: Places,
    size: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Merge what tokens have chosen into their output (B, H, N, Dv) and LSE (B, H, N), contiguous."""
    (B, H, N, _), (G, M, DV), turns = q.shape, v.shape[1:], choice.blocks.shape[2]
    repeats, sizes = H // G, sizes_of(FORWARD, q, v, size)
    items, tiles = repeats * B * N * turns, cut(choice, G, LONGEST_TILE)
    at_once, divisors = heads_at_once(G, turns), (reciprocal(turns), B * N, reciprocal(B * N), N, reciprocal(N))
    part = buffers.empty(BufferType.TEMP, (at_once * items, DV), q.dtype, q.device)
    part_lse = buffers.empty(BufferType.TEMP, (at_once * items,), lse.dtype, lse.device)
    for first in range(0, G, at_once):  # one after the other, in the same scratch
        heads = min(at_once, G - first)
        part_lse.fill_(-torch.inf)
        _forward_kernel[(heads * tiles.most,)](
            q, k, v, part, part_lse, places.entries, choice.order, choice.starts, tiles.starts, tiles.blocks,
            scale * LOG2E, first, heads, items, tiles.rows, *divisors, len(places.entries), M, repeats,
            *_strides(q, k, v), size, sizes.rows, sizes.columns, *_widths(q, v), _precision(q), FIELDS,
            num_warps=sizes.warps, num_stages=sizes.stages,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(B * N, 16) * heads * repeats,)](
            output, lse, part, part_lse, first * repeats, turns, B * N, N, H, heads * repeats, *_strides(output),
            16, DV, triton.next_power_of_2(DV), slots_of(turns),
        )  # fmt: skip


def sizes_of(choice: tuple[Sizes, Sizes, Sizes], q: Tensor, v: Tensor, size: int) -> Sizes:
    """How a kernel cuts items and blocks of ``size`` tokens: for heads up to 128, larger ones, and float32."""
    sizes = choice[2 if q.element_size() > 2 else int(max(q.shape[3], v.shape[3]) > 128)]
    return sizes._replace(columns=max(16, min(size, sizes.columns)))
