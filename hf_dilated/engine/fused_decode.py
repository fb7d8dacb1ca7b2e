"""Triton kernels for one query: every program reads a block of the keys that one head sees in one branch."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.patterns import DilatedPattern

BLOCK = 128
VALUES = 32
FIELDS = 7  # of a program: segment length, dilation rate, inner segment length, first candidate, branch, turn, block


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
def _query_position(POSITIONS, row, M, HAS_POSITIONS: tl.constexpr):
    """The last written slot, and the position of its token."""
    if HAS_POSITIONS:
        positions = POSITIONS + row * M
        last = _last_written(positions, M)
        p = tl.load(positions + last).to(tl.int32)
    else:
        last = M - 1
        p = M - 1
    return last, p


@triton.jit
def _residue(g, segment, rate):
    """Residue on which a query at grid position g stands; 0 for sinks, which have no segment."""
    return tl.where((segment > 0) & (g >= 0), g % tl.maximum(segment, 1) % rate, 0)


@triton.jit
def _distance(positions, slot, seen, visible):
    """How far left of a slot the wanted position is at least; 0 if the slot holds it."""
    found = tl.load(positions + slot, mask=visible, other=0).to(tl.int32)
    return tl.where(visible, tl.where(found >= 0, found - seen, 1), 0)


@triton.jit
def _block_kernel(
    Q, K, V, POSITIONS, programs, members, OUT, LSE, scale, M, H, SINKS, PHASE, COUNT,
    q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot,
    REPEATS, LARGEST_RATE, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One block of candidates, for the head whose turn it is among those on the query's residue."""
    program = programs + tl.program_id(0) * FIELDS
    row = tl.program_id(1).to(tl.int64)
    segment = tl.load(program)
    rate = tl.load(program + 1)
    inner = tl.load(program + 2)
    candidate = tl.load(program + 3) + tl.arange(0, BLOCK)
    branch = tl.load(program + 4)
    turn = tl.load(program + 5)
    block = tl.load(program + 6)
    last, p = _query_position(POSITIONS, row, M, HAS_POSITIONS)
    g = p - SINKS + PHASE
    residue = _residue(g, segment, rate)
    head = tl.load(members + (branch * LARGEST_RATE + residue) * H + turn)
    last_seen = tl.where(head >= 0, p, -1)
    if segment == 0:  # sinks
        seen = candidate
        visible = (seen < SINKS) & (seen <= last_seen)
    else:
        offset = residue + rate * candidate
        other = g // segment * segment + offset
        seen = other - PHASE + SINKS
        last_seen = tl.where(p >= SINKS, last_seen, -1)
        within = tl.maximum(inner, 1)
        excluded = tl.where(inner > 0, g // within, -1)  # an inner branch sees the query's inner segment
        visible = (offset < segment) & (seen >= SINKS) & (seen <= last_seen) & (other // within != excluded)
    index = (row * H + tl.maximum(head, 0)) * COUNT + block
    if tl.max(visible.to(tl.int32), 0) == 0:
        tl.store(LSE + index, float("-inf"), mask=head >= 0)
    else:
        slot = tl.where(visible, last - (p - seen), 0)
        if HAS_POSITIONS:  # padding inside the document: step left until the slot holds the position
            positions = POSITIONS + row * M
            step = _distance(positions, slot, seen, visible)
            while tl.max(step, 0) > 0:
                slot -= step
                step = _distance(positions, slot, seen, visible)
        slot = slot.to(tl.int64)
        d = tl.arange(0, WIDTH)
        e = tl.arange(0, VALUE_WIDTH)
        q = tl.load(Q + row * q_row + head.to(tl.int64) * q_head + d, mask=d < D, other=0.0).to(tl.float32)
        kv_head = (head // REPEATS).to(tl.int64)
        k_base = K + row * k_row + kv_head * k_head
        v_base = V + row * v_row + kv_head * v_head
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
def _combine_kernel(
    PARTS, PART_LSE, POSITIONS, blocks, residues, OUT, LSE, M, H, SINKS, PHASE, COUNT,
    DV: tl.constexpr, COUNT_WIDTH: tl.constexpr, HAS_POSITIONS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Merge the blocks of one head; those of branches that do not hold the query were never written."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    index = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, COUNT_WIDTH)
    e = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    _, p = _query_position(POSITIONS, row, M, HAS_POSITIONS)
    segment = tl.load(blocks + n * 3, mask=n < COUNT, other=0)
    rate = tl.load(blocks + n * 3 + 1, mask=n < COUNT, other=1)
    branch = tl.load(blocks + n * 3 + 2, mask=n < COUNT, other=0)
    own = tl.load(residues + branch * H + head, mask=n < COUNT, other=-1)
    meets = own == _residue(p - SINKS + PHASE, segment, rate)
    x = tl.load(PART_LSE + index * COUNT + n, mask=meets, other=float("-inf"))
    largest = tl.max(x, 0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(x - safe), 0)
    weight = tl.exp(x - safe) / tl.where(total > 0, total, 1.0)
    hit = (weight > 0)[:, None] & (e < DV)[None, :]
    parts = tl.load(PARTS + (index * COUNT + n)[:, None] * DV + e[None, :], mask=hit, other=0.0)
    tl.store(OUT + index * DV + e, tl.sum(parts * weight[:, None], 0).to(OUT.dtype.element_ty), mask=e < DV)
    tl.store(LSE + index, tl.where(total > 0, safe + tl.log(total), float("-inf")))


def fused_decode(
    query: Tensor, key: Tensor, value: Tensor, key_positions: Tensor | None, pattern: DilatedPattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from the last written token; see :func:`hf_dilated.engine.decode.decode`."""
    B, H, _, D = query.shape
    G, M, DV = value.shape[1:]
    longest = max(pattern.config.segment_lengths)
    tables = _tables(pattern, min(M + pattern.phase, longest), H, G, query.device)
    count = len(tables.blocks)
    parts = query.new_empty((B, H, count, DV), dtype=torch.float32)
    part_lse = query.new_empty((B, H, count), dtype=torch.float32)
    output, lse = query.new_empty((B, H, 1, DV)), query.new_empty((B, H, 1), dtype=torch.float32)
    has_positions = key_positions is not None
    positions = query if key_positions is None else key_positions.to(query.device).contiguous()
    sizes = M, H, pattern.config.sink_tokens, pattern.phase, count
    _block_kernel[len(tables.programs), B](
        query, key, value, positions, tables.programs, tables.members, parts, part_lse, scale, *sizes,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], H // G, tables.members.shape[1],
        D, DV, triton.next_power_of_2(D), triton.next_power_of_2(DV), has_positions, BLOCK, FIELDS,
    )  # fmt: skip
    _combine_kernel[B * H, triton.cdiv(DV, VALUES)](
        parts, part_lse, positions, tables.blocks, tables.residues, output, lse, *sizes,
        DV, triton.next_power_of_2(count), has_positions, VALUES,
    )  # fmt: skip
    return output, lse


class Tables(NamedTuple):
    """What the kernels look up, as 32-bit integers on the device; sinks stand behind the branches.

    Attributes:
        programs: (P, FIELDS) every block, once for each head that may take its turn.
        blocks: (count, 3) segment length, dilation rate and branch of every block of candidates.
        members: (branches + 1, largest rate, H) heads on a residue, then -1.
        residues: (branches + 1, H) residue of every head.
    """

    programs: Tensor
    blocks: Tensor
    members: Tensor
    residues: Tensor


def _tables(pattern: DilatedPattern, span: int, heads: int, kv_heads: int, device: torch.device) -> Tables:
    """Tables for segments of up to ``span`` tokens."""
    in_segment = tuple(-(-min(w, span) // r) for w, r in pattern.branches)
    return _tables_of(pattern, tuple(-(-count // BLOCK) for count in in_segment), heads, kv_heads, device)


@cache  # never dropped: a captured graph keeps their addresses
def _tables_of(
    pattern: DilatedPattern, counts: tuple[int, ...], heads: int, kv_heads: int, device: torch.device
) -> Tables:
    classes = [dict(pattern.head_classes(r, heads, kv_heads)) for _, r in pattern.branches] + [{0: tuple(range(heads))}]
    largest_rate = max(pattern.config.dilation_rates)
    members = [[[*c.get(s, ()), *[-1] * (heads - len(c.get(s, ())))] for s in range(largest_rate)] for c in classes]
    residues = [[next(s for s, found in c.items() if head in found) for head in range(heads)] for c in classes]
    blocks: list[tuple[int, ...]] = []
    programs: list[tuple[int, ...]] = []
    inner = 0
    sinks = -(-pattern.config.sink_tokens // BLOCK)
    for branch, ((w, r), count) in enumerate(zip([*pattern.branches, (0, 1)], [*counts, sinks], strict=True)):
        turns = max(map(len, classes[branch].values()))
        for i in range(count):
            programs += [(w, r, inner, i * BLOCK, branch, turn, len(blocks)) for turn in range(turns)]
            blocks.append((w, r, branch))
        inner = w if pattern.config.overlap == "once" else 0
    host = (programs, blocks, members, residues)
    return Tables(*(torch.tensor(table, dtype=torch.int32, device=device) for table in host))
