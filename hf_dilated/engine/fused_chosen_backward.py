"""Gradients of blocks that tokens chose by their content, in Triton, with the output and LSE of all that tokens saw.

What chose a block is cut into parts of bounded length, each a program's. Gradients by queries are put at the items'
places, those by keys and values into slots of the parts, and both are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.fused_block_sparse import LOG2E, Sizes, _load, _precision, _strides, _widths
from hf_dilated.engine.fused_block_sparse_backward import row_sums
from hf_dilated.engine.fused_choice import FIELDS, Choice, Places, cut, heads_at_once, slots_of
from hf_dilated.engine.fused_chosen import LENGTHS, sizes_of
from hf_dilated.engine.fused_items import _limits, _load_rows, _over, _rows_of, reciprocal
from hf_dilated.memory import BufferType, buffers

LONGEST_PART = 1024  # items that one program adds up for a block; slots take half of what their gradients take
BACKWARD = Sizes(64, 128, 8, 3), Sizes(64, 64, 8, 2), Sizes(32, 32, 8, 1)
SLOTS = 8  # that are read at a time
NUMBERS = 512  # of each of them


@triton.jit(do_not_specialize=[*LENGTHS, "column"])
def _backward_kernel(
    Q, K, V, GRAD, LSE, DELTA, PART, PART_K, PART_V, places, order, starts, tile_starts, blocks_of, scale, factor,
    column, first, heads, items, longest, by_turns, count, by_count, N, by_N, U, M, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Gradients by COLUMNS keys and values, those of slice ``column``, of a block of one of the key-value heads
    ``first … first + heads`` and, item by item, by the queries of a part of those that chose it."""
    slot = tl.program_id(0)
    tile = tl.load(tile_starts + first * U) + slot
    block = tl.load(blocks_of + tile)
    if block >= (first + heads) * U:
        return
    start, stop = _limits(tile, block, starts, tile_starts, longest)
    g = block // U
    u = block % U
    key_base = tl.load(places + u * FIELDS)
    first_key = tl.load(places + u * FIELDS + 4) * SIZE + column * COLUMNS
    key_row = (key_base // M).to(tl.int64)
    k_base = K + key_row * k_row + g.to(tl.int64) * k_head
    v_base = V + key_row * v_row + g.to(tl.int64) * v_head
    stop_key = first_key + SIZE  # of a block smaller than a tile
    k = _load(k_base, key_base % M, first_key, 0, stop_key, k_token, COLUMNS, D, WIDTH, COLUMNS <= SIZE)
    v = _load(v_base, key_base % M, first_key, 0, stop_key, v_token, COLUMNS, DV, VALUE_WIDTH, COLUMNS <= SIZE)
    d, e = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q_base = Q + (g * REPEATS).to(tl.int64) * q_head
    g_base = GRAD + (g * REPEATS).to(tl.int64) * g_head
    lse_base = LSE + (g * REPEATS).to(tl.int64) * count
    delta_base = DELTA + (g * REPEATS).to(tl.int64) * count
    PART -= first.to(tl.int64) * items * D
    grad_k = tl.zeros((COLUMNS, WIDTH), tl.float32)
    grad_v = tl.zeros((COLUMNS, VALUE_WIDTH), tl.float32)
    for begin in range(start, stop, ROWS):
        i = begin + tl.arange(0, ROWS)
        is_item = i < stop  # in place of others stands the last one
        item = tl.load(order + tl.minimum(i, stop - 1)).to(tl.int32)
        of_head = item - g * items
        q_rows = q_base + _rows_of(of_head, by_turns, count, by_count, N, by_N, q_row, q_head, q_token)
        q = _load_rows(q_rows, D, WIDTH)
        g_rows = g_base + _rows_of(of_head, by_turns, count, by_count, N, by_N, g_row, g_head, g_token)
        grad = _load_rows(g_rows, DV, VALUE_WIDTH)
        query = _over(of_head, by_turns)
        lse = tl.load(lse_base + query, mask=is_item, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_base + query)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # (keys, items)
        weight = tl.exp2(s - lse[None, :])
        if COLUMNS > SIZE:
            weight = tl.where((tl.arange(0, COLUMNS) < SIZE)[:, None], weight, 0.0)
        grad_v = tl.dot(weight.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_weight = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_s = (weight * (grad_weight - delta[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION)
        grad_q = tl.dot(tl.trans(grad_s), k, input_precision=PRECISION) * factor
        part = PART + item[:, None].to(tl.int64) * D + d[None, :]
        tl.store(part, grad_q.to(PART.dtype.element_ty), mask=is_item[:, None] & (d < D)[None, :])
    own = column * COLUMNS + tl.arange(0, COLUMNS)
    within = (slot.to(tl.int64) * SIZE + own)[:, None]
    is_key = (own < SIZE)[:, None]
    tl.store(PART_K + within * D + d[None, :], grad_k * factor, mask=is_key & (d < D)[None, :])
    tl.store(PART_V + within * DV + e[None, :], grad_v, mask=is_key & (e < DV)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _add_queries_kernel(
    OUT, PART, CHOSEN, first, turns, count, N, heads, none, o_row, o_head, o_token,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the gradients of what the heads ``first … first + heads`` have chosen to those by their queries."""
    own_head = (tl.program_id(0) % heads).to(tl.int64)
    head = first.to(tl.int64) + own_head
    t = (tl.program_id(0) // heads) * ROWS + tl.arange(0, ROWS)
    is_token = t < count
    d = tl.arange(0, WIDTH)
    mask = is_token[:, None] & (d < D)[None, :]
    place = (own_head * count + t) * turns
    out = OUT + ((t // N).to(tl.int64) * o_row + head * o_head + (t % N).to(tl.int64) * o_token)[:, None] + d[None, :]
    total = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    for turn in range(0, SLOTS):
        is_there = t < tl.where(turn < turns, count, 0)
        chosen = tl.load(CHOSEN + (head * count + t) * turns + turn, mask=is_there, other=none)
        part = PART + (place + turn)[:, None] * D + d[None, :]
        total += tl.load(part, mask=mask & (chosen < none)[:, None], other=0.0).to(tl.float32)
    tl.store(out, total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _add_keys_kernel(
    OUT, PART, places, tile_starts, first, U, M, o_row, o_head, o_token,
    SIZE: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, NUMBERS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Add the slots of a block's parts to the gradients by its keys (or values)."""
    STEPS: tl.constexpr = (SIZE * D + NUMBERS - 1) // NUMBERS
    block = first * U + tl.program_id(0) // STEPS
    base = tl.load(tile_starts + first * U)
    begin = tl.load(tile_starts + block) - base
    end = tl.load(tile_starts + block + 1) - base
    if begin == end:
        return
    x = (tl.program_id(0) % STEPS) * NUMBERS + tl.arange(0, NUMBERS)
    is_inside = x < SIZE * D
    total = tl.zeros((NUMBERS,), tl.float32)
    for step in range(begin, end, SLOTS):
        slot = step + tl.arange(0, SLOTS)
        part = PART + slot.to(tl.int64)[:, None] * (SIZE * D) + x[None, :]
        total += tl.sum(tl.load(part, mask=(slot < end)[:, None] & is_inside[None, :], other=0.0), 0)
    u = block % U
    key_base = tl.load(places + u * FIELDS)
    token = key_base % M + tl.load(places + u * FIELDS + 4) * SIZE + x // D
    out = OUT + (key_base // M).to(tl.int64) * o_row + (block // U).to(tl.int64) * o_head + x % D
    out += token.to(tl.int64) * o_token
    total += tl.load(out, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(OUT.dtype.element_ty), mask=is_inside)


def add_backward(
    choice: Choice, places: Places, size: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor,
    lse: Tensor, scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add to gradients those of what tokens have chosen; ``output`` and ``lse`` are of everything that they saw."""
    (B, H, N, D), (G, M, DV), turns = q.shape, v.shape[1:], choice.blocks.shape[2]
    repeats, sizes, blocks = H // G, sizes_of(BACKWARD, q, v, size), len(places.entries)
    items, parts, at_once = repeats * B * N * turns, cut(choice, G, LONGEST_PART), heads_at_once(G, turns)
    sums = (buffers.contiguous(BufferType.TEMP, x.transpose(0, 1)) for x in (lse, row_sums(grad, output, lse)))
    lse, delta = sums  # (H, B, N)
    divisors = reciprocal(turns), B * N, reciprocal(B * N), N, reciprocal(N)
    part = buffers.empty(BufferType.TEMP, (at_once * items, D), q.dtype, q.device)
    shapes = [(at_once * parts.most, size, d) for d in (D, DV)]
    slots = [buffers.empty(BufferType.TEMP, shape, torch.float32, q.device) for shape in shapes]
    for first in range(0, G, at_once):  # one after the other, in the same scratch
        heads = min(at_once, G - first)
        for column in range(triton.cdiv(size, sizes.columns)):
            _backward_kernel[(heads * parts.most,)](
                q, k, v, grad, lse, delta, part, *slots, places.entries, choice.order, choice.starts, parts.starts,
                parts.blocks, scale * LOG2E, scale, column, first, heads, items, parts.rows, *divisors, blocks, M,
                repeats, *_strides(q, k, v, grad), size, sizes.rows, sizes.columns, *_widths(q, v),
                _precision(q), FIELDS, num_warps=sizes.warps, num_stages=sizes.stages,
            )  # fmt: skip
            _add_queries_kernel[(triton.cdiv(B * N, 16) * heads * repeats,)](
                grads[0], part, choice.blocks, first * repeats, turns, B * N, N, heads * repeats, G * blocks,
                *_strides(grads[0]), 16, D, triton.next_power_of_2(D),
                slots_of(turns),
            )  # fmt: skip
        for total, slot in zip(grads[1:], slots, strict=True):
            d = slot.shape[2]
            _add_keys_kernel[(heads * blocks * triton.cdiv(size * d, NUMBERS),)](
                total, slot, places.entries, parts.starts, first, blocks, M, *_strides(total), size, d, SLOTS, NUMBERS,
                FIELDS,
            )  # fmt: skip
