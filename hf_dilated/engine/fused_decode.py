"""Triton kernels for one query: every program reads a block of the keys that one branch sees."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.patterns import DilatedPattern

BLOCK = 128
VALUES = 32
FIELDS = 5  # of a block: segment length, dilation rate, inner segment length, first candidate, branch


@triton.jit
def _last_written(positions, M):
    """The last slot that is written: those that are not (-2) follow it."""
    high = M
    low = tl.where(tl.load(positions + M - 1) == -2, 0, M - 1)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(positions + middle) == -2:
            high = middle
        else:
            low = middle
    return low


@triton.jit
def _distance(positions, slot, seen, visible):
    """How far left of a slot the wanted position is at least; 0 if the slot holds it."""
    found = tl.load(positions + slot, mask=visible, other=0).to(tl.int32)
    return tl.where(visible, tl.where(found >= 0, found - seen, 1), 0)


@triton.jit
def _block_kernel(
    Q, K, V, POSITIONS, blocks, residues, OUT, LSE, scale, M, H, SINKS, PHASE,
    q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot,
    REPEATS, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    row = tl.program_id(1) // H
    head = tl.program_id(1) % H
    segment = tl.load(blocks + number * FIELDS)
    rate = tl.load(blocks + number * FIELDS + 1)
    inner = tl.load(blocks + number * FIELDS + 2)
    candidate = tl.load(blocks + number * FIELDS + 3) + tl.arange(0, BLOCK)
    residue = tl.load(residues + tl.load(blocks + number * FIELDS + 4) * H + head)
    if HAS_POSITIONS:
        positions = POSITIONS + row.to(tl.int64) * M
        last = _last_written(positions, M)
        p = tl.load(positions + last).to(tl.int32)
    else:
        last = M - 1
        p = M - 1
    g = p - SINKS + PHASE
    if segment == 0:  # sinks
        seen = candidate
        visible = (seen < SINKS) & (seen <= p)
    else:
        offset = residue + rate * candidate
        other = g // segment * segment + offset
        seen = other - PHASE + SINKS
        last_seen = tl.where((g % segment % rate == residue) & (p >= SINKS), p, -1)
        excluded = tl.where(inner > 0, g // tl.maximum(inner, 1), -1)  # an inner branch sees its own segment
        visible = (
            (offset < segment) & (seen >= SINKS) & (seen <= last_seen) & (other // tl.maximum(inner, 1) != excluded)
        )
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + number
    if tl.max(visible.to(tl.int32), 0) == 0:
        tl.store(LSE + index, float("-inf"))
    else:
        slot = tl.where(visible, last - (p - seen), 0)
        if HAS_POSITIONS:  # padding inside the document: step left until the slot holds the position
            step = _distance(positions, slot, seen, visible)
            while tl.max(step, 0) > 0:
                slot -= step
                step = _distance(positions, slot, seen, visible)
        slot = slot.to(tl.int64)
        d = tl.arange(0, WIDTH)
        e = tl.arange(0, VALUE_WIDTH)
        q = tl.load(Q + row * q_row + head * q_head + d, mask=d < D, other=0.0).to(tl.float32)
        k_base = K + row.to(tl.int64) * k_row + (head // REPEATS) * k_head
        v_base = V + row.to(tl.int64) * v_row + (head // REPEATS) * v_head
        k_mask = visible[:, None] & (d < D)[None, :]
        v_mask = visible[:, None] & (e < DV)[None, :]
        k = tl.load(k_base + (slot * k_slot)[:, None] + d[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_base + (slot * v_slot)[:, None] + e[None, :], mask=v_mask, other=0.0)
        score = tl.where(visible, tl.sum(k.to(tl.float32) * q[None, :], 1) * scale, float("-inf"))
        largest = tl.max(score, 0)
        weight = tl.exp(score - largest)
        total = tl.sum(weight, 0)
        out = tl.sum(v.to(tl.float32) * weight[:, None], 0) / total
        tl.store(OUT + index * DV + e, out, mask=e < DV)
        tl.store(LSE + index, largest + tl.log(total))


@triton.jit
def _combine_kernel(PARTS, PART_LSE, OUT, LSE, COUNT, DV: tl.constexpr, COUNT_WIDTH: tl.constexpr, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, COUNT_WIDTH)
    e = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(PART_LSE + index * COUNT + n, mask=n < COUNT, other=float("-inf"))
    largest = tl.max(x, 0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(x - safe), 0)
    lse = tl.where(total > 0, safe + tl.log(total), float("-inf"))
    weight = tl.where(total > 0, tl.exp(x - tl.where(total > 0, lse, 0.0)), 0.0)
    hit = (weight > 0)[:, None] & (e < DV)[None, :]
    parts = tl.load(PARTS + (index * COUNT + n)[:, None] * DV + e[None, :], mask=hit, other=0.0)
    tl.store(OUT + index * DV + e, tl.sum(parts * weight[:, None], 0).to(OUT.dtype.element_ty), mask=e < DV)
    tl.store(LSE + index, lse)


def fused_decode(
    query: Tensor, key: Tensor, value: Tensor, key_positions: Tensor | None, pattern: DilatedPattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from the last written token; see :func:`hf_dilated.engine.decode.decode`."""
    B, H, _, D = query.shape
    G, M, DV = value.shape[1:]
    longest = max(pattern.config.segment_lengths)
    blocks, residues = _tables(pattern, min(M + pattern.phase, longest), H, G, query.device)
    count = blocks.shape[0]
    parts = query.new_empty((B, H, count, DV), dtype=torch.float32)
    part_lse = query.new_empty((B, H, count), dtype=torch.float32)
    output, lse = query.new_empty((B, H, 1, DV)), query.new_empty((B, H, 1), dtype=torch.float32)
    positions = query if key_positions is None else key_positions.to(query.device).contiguous()
    widths = triton.next_power_of_2(D), triton.next_power_of_2(DV)
    _block_kernel[count, B * H](
        query, key, value, positions, blocks, residues, parts, part_lse,
        scale, M, H, pattern.config.sink_tokens, pattern.phase,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        H // G, D, DV, *widths, key_positions is not None, BLOCK, FIELDS,
    )  # fmt: skip
    _combine_kernel[B * H, triton.cdiv(DV, VALUES)](
        parts, part_lse, output, lse, count, DV, triton.next_power_of_2(count), VALUES
    )  # fmt: skip
    return output, lse


def _tables(
    pattern: DilatedPattern, span: int, heads: int, kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Blocks of candidates (count, FIELDS) and residues (branches, H) for segments of up to ``span`` tokens."""
    in_segment = tuple(-(-min(w, span) // r) for w, r in pattern.branches)
    return _tables_of(pattern, tuple(-(-count // BLOCK) for count in in_segment), heads, kv_heads, device)


@lru_cache(maxsize=64)
def _tables_of(
    pattern: DilatedPattern, counts: tuple[int, ...], heads: int, kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    blocks = [(0, 1, 0, first, 0) for first in range(0, pattern.config.sink_tokens, BLOCK)]
    inner = 0
    for branch, ((w, r), count) in enumerate(zip(pattern.branches, counts, strict=True)):
        blocks += [(w, r, inner, i * BLOCK, branch) for i in range(count)]
        inner = w if pattern.config.overlap == "once" else 0
    residues = [[pattern.residue(h, r, heads, kv_heads) for h in range(heads)] for _, r in pattern.branches]
    return (
        torch.tensor(blocks, dtype=torch.int32, device=device),
        torch.tensor(residues, dtype=torch.int32, device=device),
    )
