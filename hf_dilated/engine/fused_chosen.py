"""Triton kernels for blocks that tokens choose by their content: choice, attention and gradients stay on the device.

Every token of every head makes K choices, its items. Items are sorted by the block that they chose, so that a program
reads a block of keys once for many of them; what it returns is put at the items' places and merged, token by token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.fused_block_lists import FIELDS as PART_FIELDS
from hf_dilated.engine.fused_block_lists import Shown, _seen
from hf_dilated.engine.fused_block_sparse import LOG2E, _load, _precision, _strides, _widths
from hf_dilated.engine.fused_block_sparse_backward import row_sums
from hf_dilated.memory import BufferType, buffers

FIELDS = 6
LENGTHS = ["T", "U", "N", "M", "items", "tiles", "blocks", "count", "g"]  # these change: one program serves all


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
    """What was chosen, for each key-value head.

    Attributes:
        order: (G, items) items, sorted by their blocks; an item is ``((row * N + n) * H / G + head) * K + turn``.
        starts: (G, U + 1) where the items of a block start; those that chose nothing come after all.
        turns: K.
    """

    order: Tensor
    starts: Tensor
    turns: int


@triton.jit(do_not_specialize=LENGTHS)
def _mean_kernel(
    K, MEAN, places, U, M, G, k_row, k_head, k_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Mean keys (G, U, D) in float32 of whole blocks; those of others mean nothing."""
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
    tl.store(MEAN + (head.to(tl.int64) * U + u) * D + d, total / SIZE, mask=d < D)


@triton.jit(do_not_specialize=LENGTHS)
def _choose_kernel(
    Q, MEAN, CHOSEN, places, rows, parts, masks, drawn, U, T, N, M, blocks, H, GROUP, REPEATS, q_row, q_head, q_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TURNS: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, HAS_MASK: tl.constexpr, FIELDS: tl.constexpr,
    PART_FIELDS: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries choose: the best of what it has seen is kept, score and block in one integer."""
    TILES: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    LEAST: tl.constexpr = -(1 << 63)
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
    q = _load(
        Q + row * q_row + head.to(tl.int64) * q_head,
        query_slot,
        first,
        first_query,
        last,
        q_token,
        ROWS,
        D,
        WIDTH,
        False,
    ).to(tl.float32)
    group = head // GROUP
    own = parts + group * PART_FIELDS
    turns = tl.load(own + 7)
    slot = tl.arange(0, SLOTS)
    d = tl.arange(0, WIDTH)
    best = tl.where(slot < turns, slot.to(tl.int64) + LEAST + 1, -LEAST - 1)[None, :] + tl.zeros(
        (ROWS, SLOTS), tl.int64
    )
    means = MEAN + ((head // REPEATS).to(tl.int64) * U + first_block) * D
    for begin in range(0, block, COLUMNS):
        j = begin + tl.arange(0, COLUMNS)
        mean = tl.load(means + j[:, None] * D + d[None, :], mask=(j < block)[:, None] & (d < D)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(mean), input_precision="ieee") + 0.0
        bits = score.to(tl.int32, bitcast=True)
        rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) * 4294967296 + (0x7FFFFFFF - j)[None, :]
        seen = _seen(
            j, block, j < block, own, masks, drawn + group.to(tl.int64) * blocks * MOST, MOST, HAS_MASK, True, False
        )
        rank = tl.where(((j < block) & ~seen)[None, :], rank, LEAST)
        for _ in range(0, turns):
            largest = tl.max(rank, 1)
            rank = tl.where(rank == largest[:, None], LEAST, rank)
            least = tl.min(best, 1)
            best = tl.where((best == least[:, None]) & (largest > least)[:, None], largest[:, None], best)
    chosen = first_block + 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)
    is_chosen = (best > LEAST + 4294967296) & (slot < turns)[None, :]
    p = first + tl.arange(0, ROWS)
    item = ((query_base + p).to(tl.int64) * REPEATS + head % REPEATS) * TURNS
    place = CHOSEN + (head // REPEATS).to(tl.int64) * T * REPEATS * TURNS + item[:, None] + slot[None, :]
    is_query = (p >= first_query) & (p < last)
    tl.store(place, tl.where(is_chosen, chosen, U), mask=is_query[:, None] & (slot < TURNS)[None, :])


@triton.jit
def _rows_of(item, N, TURNS: tl.constexpr, REPEATS, row_stride, head_stride, token_stride):
    """Where the rows of items begin, beyond their key-value head's first query head."""
    token = item // (TURNS * REPEATS)
    head = (item // TURNS) % REPEATS
    return (
        (token // N).to(tl.int64) * row_stride
        + head.to(tl.int64) * head_stride
        + (token % N).to(tl.int64) * token_stride
    )


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    Q, K, V, PART, PART_LSE, places, order, starts, tile_starts, blocks_of, scale, g, items, tiles, U, N, M, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TURNS: tl.constexpr,
    PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Let ROWS items of key-value head g see the block that they chose."""
    tile = tl.program_id(0)
    low = g * (U + 1)
    u = tl.load(blocks_of + g * tiles + tile)
    if u >= U:
        return
    begin = tl.load(starts + low + u) + (tile - tl.load(tile_starts + low + u)) * ROWS
    end = tl.load(starts + low + u + 1)
    i = begin + tl.arange(0, ROWS)
    is_item = i < end
    item = tl.load(order + g.to(tl.int64) * items + i, mask=is_item, other=0)
    key_base = tl.load(places + u * FIELDS)
    first = tl.load(places + u * FIELDS + 4) * SIZE
    key_row = (key_base // M).to(tl.int64)
    key_slot = key_base % M
    d, e = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q_base = Q + (g * REPEATS).to(tl.int64) * q_head + _rows_of(item, N, TURNS, REPEATS, q_row, q_head, q_token)
    q = tl.load(q_base[:, None] + d[None, :], mask=is_item[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    k_base = K + key_row * k_row + g.to(tl.int64) * k_head
    v_base = V + key_row * v_row + g.to(tl.int64) * v_head
    for step in range(0, SIZE, COLUMNS):
        stop = first + SIZE
        k = _load(k_base, key_slot, first + step, 0, stop, k_token, COLUMNS, D, WIDTH, False)
        v = _load(v_base, key_slot, first + step, 0, stop, v_token, COLUMNS, DV, VALUE_WIDTH, False)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where((step + tl.arange(0, COLUMNS) < SIZE)[None, :], s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        weight = tl.exp2(s - new[:, None])
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        largest = new
    tl.store(PART_LSE + item, (largest + tl.log2(total)) / 1.4426950408889634, mask=is_item)
    acc = acc / total[:, None]
    out = PART + item[:, None] * DV + e[None, :]
    tl.store(out, acc.to(PART.dtype.element_ty), mask=is_item[:, None] & (e < DV)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    OUT, LSE, PART, PART_LSE, g, count, N, H, REPEATS, o_row, o_head, o_token,
    ROWS: tl.constexpr, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Merge what the heads of key-value head g have chosen into what they see anyway, in place."""
    repeat = tl.program_id(0) % REPEATS
    head = g.to(tl.int64) * REPEATS + repeat
    t = (tl.program_id(0) // REPEATS) * ROWS + tl.arange(0, ROWS)
    is_token = t < count
    row, n = (t // N).to(tl.int64), (t % N).to(tl.int64)
    e = tl.arange(0, VALUE_WIDTH)
    place = (t.to(tl.int64) * REPEATS + repeat) * TURNS
    lse_at = LSE + (row * H + head) * N + n
    own = tl.load(lse_at, mask=is_token, other=float("-inf"))
    largest = own
    for turn in range(0, TURNS):
        largest = tl.maximum(largest, tl.load(PART_LSE + place + turn, mask=is_token, other=float("-inf")))
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    out = OUT + (row * o_row + head * o_head + n * o_token)[:, None] + e[None, :]
    mask = is_token[:, None] & (e < DV)[None, :]
    total = tl.exp(own - safe)
    acc = tl.load(out, mask=mask, other=0.0).to(tl.float32) * total[:, None]
    for turn in range(0, TURNS):
        weight = tl.exp(tl.load(PART_LSE + place + turn, mask=is_token, other=float("-inf")) - safe)
        part = tl.load(PART + (place + turn)[:, None] * DV + e[None, :], mask=mask & (weight > 0)[:, None], other=0.0)
        acc += part.to(tl.float32) * weight[:, None]
        total += weight
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=mask)
    tl.store(lse_at, tl.where(total > 0, safe + tl.log(total), float("-inf")), mask=is_token)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_kernel(
    Q, K, V, GRAD, LSE, DELTA, PART, GRAD_K, GRAD_V, places, order, starts, scale, factor, g, items, U, N, M, G,
    REPEATS, q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TURNS: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Gradients by a block of keys and values of head g and, item by item, by queries that chose it."""
    u = tl.program_id(0)
    key_base = tl.load(places + u * FIELDS)
    length = tl.load(places + u * FIELDS + 3)
    first = tl.load(places + u * FIELDS + 4) * SIZE
    key_row = (key_base // M).to(tl.int64)
    stop = tl.minimum(first + SIZE, length)
    own = g.to(tl.int64) * items
    k = _load(
        K + key_row * k_row + g.to(tl.int64) * k_head, key_base % M, first, 0, stop, k_token, COLUMNS, D, WIDTH, False
    )
    v = _load(
        V + key_row * v_row + g.to(tl.int64) * v_head, key_base % M, first, 0, stop, v_token, COLUMNS, DV, VALUE_WIDTH,
        False,
    )  # fmt: skip
    p_k = first + tl.arange(0, COLUMNS)
    is_key = p_k < stop
    d, e = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    grad_k = tl.zeros((COLUMNS, WIDTH), tl.float32)
    grad_v = tl.zeros((COLUMNS, VALUE_WIDTH), tl.float32)
    end = tl.load(starts + g * (U + 1) + u + 1)
    for begin in range(tl.load(starts + g * (U + 1) + u), end, ROWS):
        i = begin + tl.arange(0, ROWS)
        is_item = i < end
        item = tl.load(order + own + i, mask=is_item, other=0)
        q_base = Q + (g * REPEATS).to(tl.int64) * q_head + _rows_of(item, N, TURNS, REPEATS, q_row, q_head, q_token)
        q = tl.load(q_base[:, None] + d[None, :], mask=is_item[:, None] & (d < D)[None, :], other=0.0)
        g_base = GRAD + (g * REPEATS).to(tl.int64) * g_head + _rows_of(item, N, TURNS, REPEATS, g_row, g_head, g_token)
        grad = tl.load(g_base[:, None] + e[None, :], mask=is_item[:, None] & (e < DV)[None, :], other=0.0)
        at = (g * REPEATS).to(tl.int64) * N + _rows_of(item, N, TURNS, REPEATS, G * REPEATS * N, N, 1)
        lse = tl.load(LSE + at, mask=is_item, other=float("inf")) * 1.4426950408889634
        delta = tl.load(DELTA + at, mask=is_item, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        weight = tl.where(is_key[None, :], tl.exp2(s - lse[:, None]), 0.0)
        grad_v = tl.dot(tl.trans(weight.to(grad.dtype)), grad, grad_v, input_precision=PRECISION)
        grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_s = (weight * (grad_weight - delta[:, None])).to(q.dtype)
        grad_k = tl.dot(tl.trans(grad_s), q, grad_k, input_precision=PRECISION)
        grad_q = tl.dot(grad_s, k, input_precision=PRECISION) * factor
        part = PART + item[:, None] * D + d[None, :]
        tl.store(part, grad_q.to(PART.dtype.element_ty), mask=is_item[:, None] & (d < D)[None, :])
    token = ((key_base + p_k).to(tl.int64) * G + g)[:, None]
    tl.store(
        GRAD_K + token * D + d[None, :],
        (grad_k * factor).to(GRAD_K.dtype.element_ty),
        mask=is_key[:, None] & (d < D)[None, :],
    )
    tl.store(
        GRAD_V + token * DV + e[None, :], grad_v.to(GRAD_V.dtype.element_ty), mask=is_key[:, None] & (e < DV)[None, :]
    )


def choose(places: Places, turns: int, size: int, q: Tensor, k: Tensor) -> Choice:
    """Let every token choose up to ``turns`` blocks of ``size`` tokens."""
    (B, H, N, D), (G, M), U = q.shape, k.shape[1:3], len(places.entries)
    shown, width = places.shown, _widths(q, k)[2]
    mean = buffers.empty(BufferType.TEMP, (G, U, D), torch.float32, q.device)
    _mean_kernel[(U * G,)](
        k, mean, places.entries, U, M, G, *_strides(k), size, min(32, triton.next_power_of_2(size)), D, width, FIELDS
    )
    chosen = torch.full((G, B * N * (H // G) * turns), U, dtype=torch.int32, device=q.device)
    tile = max(16, min(size, 64))
    _choose_kernel[(len(places.rows) * triton.cdiv(size, tile) * H,)](
        q, mean, chosen, places.entries, places.rows, shown.parts, shown.masks, shown.drawn, U, B * N, N, M,
        shown.blocks, H, H // len(shown.groups), H // G, *_strides(q), size, tile, 32, D, width,
        turns, max(2, triton.next_power_of_2(turns)), shown.drawn.shape[2], shown.has_mask, FIELDS, PART_FIELDS,
    )  # fmt: skip
    blocks, order = chosen.sort(dim=1, stable=True)
    limits = torch.arange(U + 1, dtype=torch.int32, device=q.device).expand(G, -1).contiguous()
    return Choice(order, torch.searchsorted(blocks, limits), turns)


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
    (B, H, N, _), (G, M, DV), items = q.shape, v.shape[1:], choice.order.shape[1]
    U, rows = len(places.entries), _rows(q, v)
    tile_starts = torch.nn.functional.pad(
        (choice.starts.diff(dim=1) + rows - 1).div(rows, rounding_mode="floor"), (1, 0)
    )
    tile_starts = tile_starts.cumsum(1)
    tiles = items // rows + U  # at most
    numbers = torch.arange(tiles, device=q.device).expand(G, -1).contiguous()
    blocks_of = torch.searchsorted(tile_starts[:, 1:].contiguous(), numbers, right=True)
    part = buffers.empty(BufferType.TEMP, (items, DV), q.dtype, q.device)
    part_lse = buffers.empty(BufferType.TEMP, (items,), lse.dtype, lse.device)
    for g in range(G):  # one after the other, in the same scratch
        part_lse.fill_(-torch.inf)
        _forward_kernel[(tiles,)](
            q, k, v, part, part_lse, places.entries, choice.order, choice.starts, tile_starts, blocks_of, scale * LOG2E,
            g, items, tiles, U, N, M, H // G, *_strides(q, k, v), size, rows, max(16, min(size, 64)), *_widths(q, v),
            choice.turns, _precision(q), FIELDS, num_warps=4, num_stages=2,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(B * N, 16) * (H // G),)](
            output, lse, part, part_lse, g, B * N, N, H, H // G, *_strides(output), 16, DV, triton.next_power_of_2(DV),
            choice.turns,
        )  # fmt: skip


def add_backward(
    choice: Choice, places: Places, size: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor,
    lse: Tensor, scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add to gradients those of what tokens have chosen; ``output`` and ``lse`` are of everything that they saw."""
    (B, H, N, D), (G, M, DV), items = q.shape, v.shape[1:], choice.order.shape[1]
    delta, lse = row_sums(grad, output, lse), buffers.contiguous(BufferType.TEMP, lse)
    part = buffers.empty(BufferType.TEMP, (items, D), q.dtype, q.device)
    grad_k, grad_v = (buffers.full(BufferType.TEMP, (B, M, G, x.shape[3]), 0.0, x.dtype, x.device) for x in (k, v))
    is_large = max(D, DV) > 128 or q.element_size() > 2
    for g in range(G):  # one after the other, in the same scratch
        part.zero_()
        _backward_kernel[(len(places.entries),)](
            q, k, v, grad, lse, delta, part, grad_k, grad_v, places.entries, choice.order, choice.starts, scale * LOG2E,
            scale, g, items, len(places.entries), N, M, G, H // G, *_strides(q, k, v, grad), size,
            16 if is_large else 32, max(16, size), *_widths(q, v), choice.turns, _precision(q), FIELDS,
            num_warps=8 if size > 32 else 4, num_stages=1,
        )  # fmt: skip
        by_query = part.view(B, N, H // G, choice.turns, D).sum(3, dtype=torch.float32)
        grads[0].unflatten(1, (G, H // G))[:, g].add_(by_query.transpose(1, 2))
    for total, own in zip(grads[1:], (grad_k, grad_v), strict=True):
        total.add_(own.transpose(1, 2))


def _rows(q: Tensor, v: Tensor) -> int:
    """Items of a program."""
    return 128 if q.element_size() == 2 and max(q.shape[3], v.shape[3]) <= 128 else 32
