"""Triton kernels for block-sparse attention: a program per block of queries (or keys) walks the list of its blocks.

Entries say where the tokens of a block lie, so documents may start anywhere and queries may be the last of the keys.
FIELDS of an entry: key base, query base, first query, length of its document; block; number of its list, which part of
the list is meant and of how many; slot. A slot, if there is one, takes the gradient of a part of a long list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.flash_block_sparse import Lists
from hf_dilated.memory import BufferType, buffers

FIELDS = 9
LOG2E = 1.4426950408889634
LENGTHS = ["N", "M", "count", "lists", "widest"]  # change with the length: one program serves all


class Walk(NamedTuple):
    """What the kernels walk; integers on the device have 32 bits.

    Attributes:
        entries: (T, FIELDS) blocks of queries (or parts of blocks of keys), those with long lists first.
        lists: Blocks of keys (of queries) for the groups of heads.
        is_full: Whether every query (every key) of the batch belongs to a document.
    """

    entries: Tensor
    lists: Lists
    is_full: bool


class Split(NamedTuple):
    """Blocks of keys whose gradient is added up from parts.

    Attributes:
        blocks: (S, 5) key base, length, block, first and last slot + 1.
        slots: How many slots there are.
    """

    blocks: Tensor
    slots: int


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
    number = tl.load(entry + 5)
    part = tl.load(entry + 6)
    parts = tl.load(entry + 7)
    slot = tl.load(entry + 8)
    return key_base, query_base, first_query, length, block, number, part, parts, slot


@triton.jit
def _list(COUNT, EDGE, EDGE_COUNT, number, part, parts):
    """Where the part of a list starts and stops, and its edge; -1 if it has none."""
    count = tl.load(COUNT + number)
    start = part * count // parts
    stop = (part + 1) * count // parts
    has_edge = (part == 0) & (tl.load(EDGE_COUNT + number) > 0)
    return start, stop, tl.where(has_edge, tl.load(EDGE + number), -1)


@triton.jit
def _load(
    X, base, first, low, high, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, INSIDE: tl.constexpr
):
    """Rows ``first … first + ROWS`` of a document as (ROWS, WIDTH); those outside low … high are the nearest."""
    p = first + tl.arange(0, ROWS)
    if not INSIDE:
        p = tl.maximum(tl.minimum(p, high - 1), low)
    d = tl.arange(0, WIDTH)
    pointers = X + (base + p).to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointers) if D == WIDTH else tl.load(pointers, mask=(d < D)[None, :], other=0.0)


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
    Q, K, V, OUT, LSE, table, EDGE_COUNT, EDGE, COUNT, WHOLE, lists, widest, scale, N, M, H, GROUP, REPEATS,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
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
    )
    kv_head = (head // REPEATS).to(tl.int64)
    k_base = row * k_row + kv_head * k_head
    v_base = row * v_row + kv_head * v_head
    p_q = first + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.load(items + start, mask=start < stop, other=0)
    for index in range(start * STEPS, stop * STEPS):
        first_key = seen * SIZE + (index % STEPS) * COLUMNS
        stop_key = seen * SIZE + SIZE
        following = (index + 1) // STEPS
        seen = tl.load(items + following, mask=following < stop, other=0)
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
    walk: Walk, size: int, is_causal: bool, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend: output (B, H, N, Dv), stored token by token, and LSE (B, H, N) in float32."""
    B, H, N, _ = q.shape
    output = result_like(q, (B, N, H, v.shape[3]), is_written=walk.is_full)
    lse = buffers.full(BufferType.OUTPUT, (B, H, N), -torch.inf, torch.float32, q.device)
    sizes = _sizes(FORWARD, q, v, size)
    entries = len(walk.entries) * triton.cdiv(size, sizes.rows)
    _forward_kernel[(entries * H,)](
        q, k, v, output, lse, *_walked(walk), scale * LOG2E, *_counts(walk, q, k), *_strides(q, k, v),
        size, sizes.rows, sizes.columns, *_widths(q, v), is_causal, _precision(q),
        FIELDS, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return output.transpose(1, 2), lse


def result_like(x: Tensor, shape: tuple[int, ...], *, is_written: bool) -> Tensor:
    """Return a tensor for what a kernel writes: all of it, or the rest is 0."""
    if is_written:
        return buffers.empty(BufferType.OUTPUT, shape, x.dtype, x.device)
    return buffers.full(BufferType.OUTPUT, shape, 0.0, x.dtype, x.device)


# Measured on an H200 (32 / 8 heads of 128, bfloat16); larger heads and float32 have less room.
FORWARD = Sizes(128, 64, 8, 3), Sizes(64, 32, 4, 2)


def _sizes(choice: tuple[Sizes, Sizes], q: Tensor, v: Tensor, size: int) -> Sizes:
    """How a kernel cuts blocks of ``size`` tokens."""
    is_small = q.element_size() == 2 and max(q.shape[3], v.shape[3]) <= 128
    rows, columns, warps, stages = choice[0 if is_small else 1]
    least = max(size, 16)  # of a product of matrices
    is_whole = least >= max(rows, columns)
    return Sizes(min(rows, least), min(columns, least), warps if is_whole else 4, stages)


def _walked(walk: Walk) -> tuple[Tensor | int, ...]:
    return walk.entries, *walk.lists, *walk.lists.whole.shape[2:]


def _counts(walk: Walk, q: Tensor, k: Tensor) -> tuple[int, ...]:
    H, groups = q.shape[1], walk.lists.whole.shape[1]
    return q.shape[2], k.shape[2], H, H // groups, H // k.shape[1]


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows, heads and tokens; that of a single row may not fit into 32 bits, for which another program would do."""
    return [stride for x in tensors for stride in (x.stride(0) if len(x) > 1 else 0, *x.stride()[1:3])]


def _widths(q: Tensor, v: Tensor) -> tuple[int, ...]:
    D, DV = q.shape[3], v.shape[3]
    return D, DV, max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(DV))


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"
