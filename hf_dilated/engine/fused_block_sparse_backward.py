"""Gradients of block-sparse attention in Triton, with the output and LSE of everything that a query saw.

One kernel goes over the lists of queries, the other over those of keys, so that nothing is added up in random order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.fused_block_sparse import (
    FIELDS,
    LENGTHS,
    LOG2E,
    Sizes,
    Split,
    Walk,
    _counts,
    _entry,
    _list,
    _load,
    _precision,
    _sizes,
    _strides,
    _walked,
    _widths,
    result_like,
)
from hf_dilated.memory import BufferType, buffers

# Measured as those of the forward pass.
QUERY = Sizes(128, 32, 4, 3), Sizes(32, 32, 4, 1)
KEY = Sizes(64, 128, 8, 1), Sizes(32, 32, 4, 1)


@triton.jit(do_not_specialize=LENGTHS)
def _delta_kernel(
    GRAD, OUT, DELTA, count, N, H, g_row, g_head, g_token, o_row, o_head, o_token,
    DV: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Row sums of gradient times output, (B, H, N)."""
    head = (tl.program_id(0) % H).to(tl.int64)
    t = (tl.program_id(0) // H) * ROWS + tl.arange(0, ROWS)
    row, n = (t // N).to(tl.int64), (t % N).to(tl.int64)
    e = tl.arange(0, WIDTH)
    mask = (t < count)[:, None] & (e < DV)[None, :]
    g = tl.load(GRAD + (row * g_row + head * g_head + n * g_token)[:, None] + e[None, :], mask=mask, other=0.0)
    o = tl.load(OUT + (row * o_row + head * o_head + n * o_token)[:, None] + e[None, :], mask=mask, other=0.0)
    tl.store(DELTA + (row * H + head) * N + n, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=t < count)


@triton.jit
def _query_step(
    q, grad, lse, delta, K, V, k_base, v_base, first, stop, key_slot, p_q, k_token, v_token, scale, total,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_EDGE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = _load(K + k_base, key_slot, first, 0, stop, k_token, COLUMNS, D, WIDTH, not IS_EDGE)
    v = _load(V + v_base, key_slot, first, 0, stop, v_token, COLUMNS, DV, VALUE_WIDTH, not IS_EDGE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weight = tl.exp2(s - lse[:, None])
    if IS_EDGE:
        p_k = first + tl.arange(0, COLUMNS)
        seen = (p_k < stop)[None, :]
        if IS_CAUSAL:
            seen = seen & (p_k[None, :] <= p_q[:, None])
        weight = tl.where(seen, weight, 0.0)
    grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_s = weight * (grad_weight - delta[:, None])
    return tl.dot(grad_s.to(k.dtype), k, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=LENGTHS)
def _query_kernel(
    Q, K, V, GRAD, LSE, DELTA, OUT, table, EDGE_COUNT, EDGE, COUNT, WHOLE, lists, widest, scale, factor,
    N, M, H, GROUP, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Gradient by the queries of a block."""
    PARTS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    STEPS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    head = tl.program_id(0) % H
    place = tl.program_id(0) // H
    key_base, query_base, first_query, length, block, number, part, parts, _ = _entry(table, place // PARTS, FIELDS)
    number += (head // GROUP) * lists
    start, stop, edge = _list(COUNT, EDGE, EDGE_COUNT, number, part, parts)
    items = WHOLE + number.to(tl.int64) * widest
    first = block * SIZE + (place % PARTS) * ROWS
    row = (key_base // M).to(tl.int64)
    key_slot = key_base % M
    query_slot = query_base - row.to(tl.int32) * N
    last = tl.minimum(length, block * SIZE + SIZE)
    own = head.to(tl.int64)
    q = _load(Q + row * q_row + own * q_head, query_slot, first, first_query, last, q_token, ROWS, D, WIDTH, False)
    grad = _load(
        GRAD + row * g_row + own * g_head, query_slot, first, first_query, last, g_token, ROWS, DV, VALUE_WIDTH, False
    )
    kv_head = (head // REPEATS).to(tl.int64)
    k_base = row * k_row + kv_head * k_head
    v_base = row * v_row + kv_head * v_head
    p_q = first + tl.arange(0, ROWS)
    is_query = (p_q >= first_query) & (p_q < last)
    index_of = (row * H + own) * N + (query_slot + p_q)
    lse = tl.load(LSE + index_of, mask=is_query, other=float("inf")) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(DELTA + index_of, mask=is_query, other=0.0)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    seen = tl.load(items + start, mask=start < stop, other=0)
    for index in range(start * STEPS, stop * STEPS):
        first_key = seen * SIZE + (index % STEPS) * COLUMNS
        stop_key = seen * SIZE + SIZE
        following = (index + 1) // STEPS
        seen = tl.load(items + following, mask=following < stop, other=0)
        total = _query_step(
            q, grad, lse, delta, K, V, k_base, v_base, first_key, stop_key, key_slot, p_q, k_token, v_token, scale,
            total,
            COLUMNS, D, DV, WIDTH, VALUE_WIDTH, SIZE < COLUMNS, False, PRECISION,
        )  # fmt: skip
    if edge >= 0:
        for step in range(0, STEPS):
            total = _query_step(
                q, grad, lse, delta, K, V, k_base, v_base, edge * SIZE + step * COLUMNS,
                tl.minimum(length, edge * SIZE + SIZE), key_slot, p_q, k_token, v_token, scale, total,
                COLUMNS, D, DV, WIDTH, VALUE_WIDTH, True, IS_CAUSAL, PRECISION,
            )  # fmt: skip
    d = tl.arange(0, WIDTH)
    out = OUT + ((query_base + p_q).to(tl.int64) * H + head)[:, None] * D + d[None, :]
    tl.store(out, (total * factor).to(OUT.dtype.element_ty), mask=is_query[:, None] & (d < D)[None, :])


@triton.jit
def _key_step(
    k, v, Q, GRAD, LSE, DELTA, query_slot, first, low, high, p_k, q_token, g_token, scale, grad_k, grad_v,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q = _load(Q, query_slot, first, low, high, q_token, ROWS, D, WIDTH, False)
    grad = _load(GRAD, query_slot, first, low, high, g_token, ROWS, DV, VALUE_WIDTH, False)
    p_q = first + tl.arange(0, ROWS)
    is_query = (p_q >= low) & (p_q < high)
    lse = tl.load(LSE + query_slot + p_q, mask=is_query, other=float("inf")) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(DELTA + query_slot + p_q, mask=is_query, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # (keys, queries)
    weight = tl.exp2(s - lse[None, :])
    if IS_CAUSAL:
        weight = tl.where(p_k[:, None] <= p_q[None, :], weight, 0.0)
    grad_v = tl.dot(weight.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_weight = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_s = weight * (grad_weight - delta[None, :])
    grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=LENGTHS)
def _key_kernel(
    Q, K, V, GRAD, LSE, DELTA, GRAD_K, GRAD_V, PART_K, PART_V, table, EDGE_COUNT, EDGE, COUNT, WHOLE, lists, widest,
    scale, factor, N, M, H, GROUP, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Gradient by the keys and values of a block, of the heads that share a key-value head."""
    PARTS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    STEPS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    G = H // REPEATS
    kv_head = tl.program_id(0) % G
    place = tl.program_id(0) // G
    key_base, query_base, first_query, length, block, number, part, parts, slot = _entry(table, place // PARTS, FIELDS)
    first = block * SIZE + (place % PARTS) * COLUMNS
    row = (key_base // M).to(tl.int64)
    key_slot = key_base % M
    query_slot = query_base - row.to(tl.int32) * N
    last = tl.minimum(length, block * SIZE + SIZE)
    shared = kv_head.to(tl.int64)
    k = _load(K + row * k_row + shared * k_head, key_slot, first, 0, last, k_token, COLUMNS, D, WIDTH, False)
    v = _load(V + row * v_row + shared * v_head, key_slot, first, 0, last, v_token, COLUMNS, DV, VALUE_WIDTH, False)
    p_k = first + tl.arange(0, COLUMNS)
    grad_k = tl.zeros((COLUMNS, WIDTH), tl.float32)
    grad_v = tl.zeros((COLUMNS, VALUE_WIDTH), tl.float32)
    for repeat in range(0, REPEATS):
        own = shared * REPEATS + repeat
        list_of = number + (own // GROUP) * lists
        start, stop, edge = _list(COUNT, EDGE, EDGE_COUNT, list_of, part, parts)
        items = WHOLE + list_of * widest
        Q_own = Q + row * q_row + own * q_head
        GRAD_own = GRAD + row * g_row + own * g_head
        LSE_own = LSE + (row * H + own) * N
        DELTA_own = DELTA + (row * H + own) * N
        seen = tl.load(items + start, mask=start < stop, other=0)
        for index in range(start * STEPS, stop * STEPS):
            first_of = seen * SIZE + (index % STEPS) * ROWS
            high = tl.minimum(length, seen * SIZE + SIZE)
            following = (index + 1) // STEPS
            seen = tl.load(items + following, mask=following < stop, other=0)
            grad_k, grad_v = _key_step(
                k, v, Q_own, GRAD_own, LSE_own, DELTA_own, query_slot, first_of, first_query, high, p_k,
                q_token, g_token, scale, grad_k, grad_v,
                ROWS, D, DV, WIDTH, VALUE_WIDTH, False, PRECISION,
            )  # fmt: skip
        if edge >= 0:
            for step in range(0, STEPS):
                grad_k, grad_v = _key_step(
                    k, v, Q_own, GRAD_own, LSE_own, DELTA_own, query_slot, edge * SIZE + step * ROWS, first_query,
                    tl.minimum(length, edge * SIZE + SIZE), p_k, q_token, g_token, scale, grad_k, grad_v,
                    ROWS, D, DV, WIDTH, VALUE_WIDTH, IS_CAUSAL, PRECISION,
                )  # fmt: skip
    grad_k = grad_k * factor
    d, e = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_key = (p_k < last)[:, None]
    if slot >= 0:  # a part: (slot, G, SIZE, D) in float32
        within = ((slot * G + kv_head).to(tl.int64) * SIZE + (p_k - block * SIZE))[:, None]
        inside = (p_k < block * SIZE + SIZE)[:, None]
        tl.store(PART_K + within * D + d[None, :], grad_k, mask=inside & (d < D)[None, :])
        tl.store(PART_V + within * DV + e[None, :], grad_v, mask=inside & (e < DV)[None, :])
    else:
        token = ((key_base + p_k).to(tl.int64) * G + kv_head)[:, None]
        tl.store(GRAD_K + token * D + d[None, :], grad_k.to(GRAD_K.dtype.element_ty), mask=is_key & (d < D)[None, :])
        tl.store(GRAD_V + token * DV + e[None, :], grad_v.to(GRAD_V.dtype.element_ty), mask=is_key & (e < DV)[None, :])


@triton.jit
def _sum_kernel(PART, OUT, split, G, SIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Add up the parts of key blocks whose lists were cut; split: key base, length, block, first slot, stop slot."""
    PARTS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) % G
    place = tl.program_id(0) // G
    entry = split + (place // PARTS) * 5
    key_base = tl.load(entry)
    length = tl.load(entry + 1)
    block = tl.load(entry + 2)
    begin = tl.load(entry + 3)
    end = tl.load(entry + 4)
    t = (place % PARTS) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (t < SIZE)[:, None] & (d < D)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for slot in range(begin, end):
        within = ((slot * G + kv_head).to(tl.int64) * SIZE + t)[:, None] * D + d[None, :]
        total += tl.load(PART + within, mask=mask, other=0.0)
    p = block * SIZE + t
    token = ((key_base + p).to(tl.int64) * G + kv_head)[:, None]
    tl.store(OUT + token * D + d[None, :], total.to(OUT.dtype.element_ty), mask=mask & (p < length)[:, None])


def backward(
    queries: Walk, keys: Walk, split: Split, size: int, is_causal: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor,
    output: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`forward` by query, key and value; ``output`` and ``lse`` are what it returned."""
    B, H, N, D = q.shape
    G, M, DV = v.shape[1:]
    delta, lse = row_sums(grad, output, lse), buffers.contiguous(BufferType.TEMP, lse)
    grad_q = result_like(q, (B, N, H, D), is_written=queries.is_full)
    grad_k, grad_v = (result_like(x, (B, M, G, x.shape[3]), is_written=keys.is_full) for x in (k, v))
    strides = _strides(q, k, v, grad)
    scales = scale * LOG2E, scale
    sizes = _sizes(QUERY, q, v, size)
    entries = len(queries.entries) * triton.cdiv(size, sizes.rows)
    _query_kernel[(entries * H,)](
        q, k, v, grad, lse, delta, grad_q, *_walked(queries), *scales, *_counts(queries, q, k),
        *strides, size, sizes.rows, sizes.columns, *_widths(q, v), is_causal,
        _precision(q), FIELDS, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    sizes = _sizes(KEY, q, v, size)
    shapes = [(split.slots, G, size, d) for d in (D, DV)]
    parts = [buffers.empty(BufferType.TEMP, shape, torch.float32, q.device) for shape in shapes]
    entries = len(keys.entries) * triton.cdiv(size, sizes.columns)
    _key_kernel[(entries * G,)](
        q, k, v, grad, lse, delta, grad_k, grad_v, *parts, *_walked(keys), *scales,
        *_counts(keys, q, k), *strides, size, sizes.rows, sizes.columns, *_widths(q, v), is_causal,
        _precision(q), FIELDS, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    if split.slots:
        for part, out in zip(parts, (grad_k, grad_v), strict=True):
            d = out.shape[3]
            _sum_kernel[(len(split.blocks) * triton.cdiv(size, 32) * G,)](
                part, out, split.blocks, G, size, d, triton.next_power_of_2(d), 32
            )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def row_sums(grad: Tensor, output: Tensor, lse: Tensor) -> Tensor:
    """Sums of gradient times output (B, H, N), like the LSE."""
    B, H, N, DV = output.shape
    delta = buffers.empty(BufferType.TEMP, lse.shape, lse.dtype, lse.device)
    _delta_kernel[(triton.cdiv(B * N, 32) * H,)](
        grad, output, delta, B * N, N, H, *_strides(grad, output), DV, triton.next_power_of_2(DV), 32
    )
    return delta
