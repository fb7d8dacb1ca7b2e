"""Triton kernels for block-sparse attention: a program per block of queries (or keys) walks the list of its blocks.

Tables say where the tokens of a block lie, so documents may start anywhere and queries may be the last of the keys.
FIELDS of an entry: key base, query base, first query, length of its document; block; start and stop of its list; edge;
slot. The edge is the block that is seen through a mask; a slot, if there is one, takes the gradient of a part of a long
list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = 9
LOG2E = 1.4426950408889634
LENGTHS = ["T", "U", "N", "M", "count"]  # arguments that change with the length: one program serves all


class Tables(NamedTuple):
    """What the kernels walk, as 32-bit integers on the device.

    Attributes:
        queries: (groups of heads, T, FIELDS) blocks of queries, those with long lists first.
        query_lists: Key blocks.
        keys: (groups of heads, U, FIELDS) blocks of keys; long lists are cut into several entries.
        key_lists: Query blocks.
        split: (S, 5) key base, length, block, first and last slot + 1 of every key block with slots.
        slots: How many slots there are.
        is_even: Whether every block is whole.
        covers: Whether every query of the batch belongs to a document.
    """

    queries: Tensor
    query_lists: Tensor
    keys: Tensor
    key_lists: Tensor
    split: Tensor
    slots: int
    is_even: bool
    covers: bool


class Sizes(NamedTuple):
    """How a kernel cuts blocks: rows and columns of a tile, warps, stages."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def _entry(table, number, FIELDS: tl.constexpr):
    entry = table + number * FIELDS
    key_base = tl.load(entry)
    query_base = tl.load(entry + 1)
    first_query = tl.load(entry + 2)
    length = tl.load(entry + 3)
    block = tl.load(entry + 4)
    start = tl.load(entry + 5)
    stop = tl.load(entry + 6)
    edge = tl.load(entry + 7)
    slot = tl.load(entry + 8)
    return key_base, query_base, first_query, length, block, start, stop, edge, slot


@triton.jit
def _load(
    X, base, first, low, high, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr
):
    """Rows ``first … first + ROWS`` of a document as (ROWS, WIDTH); those outside low … high are 0."""
    p = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    pointers = X + (base + p).to(tl.int64)[:, None] * stride + d[None, :]
    if EVEN and D == WIDTH:
        x = tl.load(pointers)
    elif EVEN:
        x = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers, mask=((p >= low) & (p < high))[:, None] & (d < D)[None, :], other=0.0)
    return x


@triton.jit
def _attend(
    q, K, V, k_base, v_base, first, stop, key_slot, p_q, k_token, v_token, scale, acc, largest, total,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_EDGE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Let queries see the keys ``first … first + COLUMNS``; at an edge only those before ``stop``, and the past."""
    k = _load(K + k_base, key_slot, first, 0, stop, k_token, COLUMNS, D, WIDTH, not IS_EDGE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if IS_EDGE:
        p_k = first + tl.arange(0, COLUMNS)
        seen = (p_k < stop)[None, :]
        if IS_CAUSAL:
            seen = seen & (p_k[None, :] <= p_q[:, None])
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(largest, tl.max(s, 1))
    safe = new
    if IS_EDGE:
        safe = tl.where(new == float("-inf"), 0.0, new)
    weight = tl.exp2(s - safe[:, None])
    decay = tl.exp2(largest - safe)
    total = total * decay + tl.sum(weight, 1)
    v = _load(V + v_base, key_slot, first, 0, stop, v_token, COLUMNS, DV, VALUE_WIDTH, not IS_EDGE)
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    Q, K, V, OUT, LSE, table, lists, scale, T, N, M, H, GROUP, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    STEPS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    head = tl.program_id(0) % H
    place = tl.program_id(0) // H
    number = (head // GROUP) * T + place // PARTS
    key_base, query_base, first_query, length, block, start, stop, edge, _ = _entry(table, number, FIELDS)
    first = block * SIZE + (place % PARTS) * ROWS
    row = (key_base // M).to(tl.int64)
    key_slot = key_base % M
    query_slot = query_base - row.to(tl.int32) * N
    last = tl.minimum(length, block * SIZE + SIZE)
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
        EVEN,
    )
    kv_head = (head // REPEATS).to(tl.int64)
    k_base = row * k_row + kv_head * k_head
    v_base = row * v_row + kv_head * v_head
    p_q = first + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.load(lists + start, mask=start < stop, other=0)
    for index in range(start * STEPS, stop * STEPS):
        first_key = seen * SIZE + (index % STEPS) * COLUMNS
        stop_key = seen * SIZE + SIZE
        following = (index + 1) // STEPS
        seen = tl.load(lists + following, mask=following < stop, other=0)
        acc, largest, total = _attend(
            q, K, V, k_base, v_base, first_key, stop_key, key_slot, p_q, k_token, v_token, scale, acc, largest, total,
            COLUMNS, D, DV, WIDTH, VALUE_WIDTH, SIZE < COLUMNS, False, PRECISION,
        )  # fmt: skip
    if edge >= 0:
        for step in range(0, STEPS):
            acc, largest, total = _attend(
                q, K, V, k_base, v_base, edge * SIZE + step * COLUMNS, tl.minimum(length, edge * SIZE + SIZE), key_slot,
                p_q, k_token, v_token, scale, acc, largest, total,
                COLUMNS, D, DV, WIDTH, VALUE_WIDTH, True, IS_CAUSAL, PRECISION,
            )  # fmt: skip
    is_query = (p_q >= first_query) & (p_q < last)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    token = (query_base + p_q).to(tl.int64)
    e = tl.arange(0, VALUE_WIDTH)
    out = OUT + (token * H + head)[:, None] * DV + e[None, :]
    lse = LSE + (row * H + head) * N + (query_slot + p_q)
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=is_query[:, None] & (e < DV)[None, :])
    tl.store(lse, tl.where(total > 0, (largest + tl.log2(total)) / 1.4426950408889634, float("-inf")), mask=is_query)


def forward(
    tables: Tables, size: int, is_causal: bool, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend: output (B, H, N, Dv), stored token by token, and LSE (B, H, N) in float32."""
    B, H, N, _ = q.shape
    fresh = q.new_empty if tables.covers else q.new_zeros
    output = fresh((B, N, H, v.shape[3]))
    lse = q.new_full((B, H, N), -torch.inf, dtype=torch.float32)
    sizes = _sizes(FORWARD, q, v, size)
    entries = tables.queries.shape[1] * triton.cdiv(size, sizes.rows)
    _forward_kernel[(entries * H,)](
        q, k, v, output, lse, tables.queries, tables.query_lists, scale * LOG2E, *_counts(tables.queries, q, k),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        size, sizes.rows, sizes.columns, *_widths(q, v), is_causal, _is_even(tables, size, sizes), _precision(q),
        FIELDS, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return output.transpose(1, 2), lse


# Measured on an H200 (32 / 8 heads of 128, bfloat16); larger heads and float32 have less room.
FORWARD = Sizes(128, 64, 8, 3), Sizes(64, 32, 4, 2)


def _sizes(choice: tuple[Sizes, Sizes], q: Tensor, v: Tensor, size: int) -> Sizes:
    """How a kernel cuts blocks of ``size`` tokens."""
    is_small = q.element_size() == 2 and max(q.shape[3], v.shape[3]) <= 128
    rows, columns, warps, stages = choice[0 if is_small else 1]
    least = max(size, 16)  # of a product of matrices
    is_whole = least >= max(rows, columns)
    return Sizes(min(rows, least), min(columns, least), warps if is_whole else 4, stages)


def _counts(table: Tensor, q: Tensor, k: Tensor) -> tuple[int, ...]:
    groups, entries, _ = table.shape
    H = q.shape[1]
    return entries, q.shape[2], k.shape[2], H, H // groups, H // k.shape[1]


def _widths(q: Tensor, v: Tensor) -> tuple[int, ...]:
    D, DV = q.shape[3], v.shape[3]
    return D, DV, max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(DV))


def _is_even(tables: Tables, size: int, sizes: Sizes) -> bool:
    return tables.is_even and size >= max(sizes.rows, sizes.columns)


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"
