"""Triton kernels that gather rows for a call and merge the parts of many calls in one pass.

A part is what one call returned. Tables tell for every token in which row of a part it stands, and for
every head at which place; -1 where it takes no part. A merge reads every part once, adds up in float32 and
rounds once. Where the first part already has the layout of the whole result, the others merge into it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.plan import Selection

TILE = 64
PARTS_AT_ONCE = 12


@triton.jit
def _locate(
    token, in_range, head, row_of, class_of, place_of, count, HEADS, REPEATS: tl.constexpr, j: tl.constexpr
):  # fmt: skip
    """Sequence, place in it, place of the head, and whether token and head take part."""
    row = tl.load(row_of + token, mask=in_range, other=-1)
    head_class = tl.load(class_of + token, mask=row >= 0, other=0)
    place = tl.load(place_of + (head_class * HEADS + head) * REPEATS + j, mask=row >= 0, other=-1)
    hit = place >= 0
    row = tl.where(hit, row, 0)
    return (row // count).to(tl.int64), (row % count).to(tl.int64), tl.where(hit, place, 0), hit


@triton.jit
def _merge_kernel(
    OUT, LSE, parts, lses, rows, classes, places, counts, strides, lse_strides,
    T, N, HEADS, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, IN_PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_range = token < T
    d = tl.arange(0, BLOCK)
    lse_address = LSE + (token // N * HEADS + head).to(tl.int64) * N + token % N
    if IN_PLACE:
        old_lse = tl.load(lse_address, mask=in_range, other=float("-inf"))
        touched = token < 0
    else:
        old_lse = tl.full((TILE,), float("-inf"), tl.float32)
        touched = in_range
    largest = old_lse
    total = tl.where(old_lse == float("-inf"), 0.0, 1.0)
    for b in tl.static_range(PARTS):
        n, i, place, hit = _locate(token, in_range, head, rows[b], classes[b], places[b], counts[b], HEADS, 1, 0)
        x = tl.load(lses[b] + n * lse_strides[b][0] + place * lse_strides[b][1] + i * lse_strides[b][2], mask=hit,
                    other=float("-inf"))  # fmt: skip
        larger = tl.maximum(largest, x)
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = larger
        if IN_PLACE:
            touched = touched | hit
    lse = tl.where(total > 0, largest + tl.log(total), float("-inf"))
    tl.store(lse_address, lse, mask=touched)
    safe = tl.where(total > 0, lse, 0.0)
    out = OUT + (token.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    written = touched[:, None] & (d < D)[None, :]
    accumulator = tl.zeros((TILE, BLOCK), tl.float32)
    if IN_PLACE:
        accumulator += tl.exp(old_lse - safe)[:, None] * tl.load(out, mask=written, other=0.0).to(tl.float32)
    for b in tl.static_range(PARTS):
        n, i, place, hit = _locate(token, in_range, head, rows[b], classes[b], places[b], counts[b], HEADS, 1, 0)
        x = tl.load(lses[b] + n * lse_strides[b][0] + place * lse_strides[b][1] + i * lse_strides[b][2], mask=hit,
                    other=float("-inf"))  # fmt: skip
        row = parts[b] + n * strides[b][0] + place * strides[b][1] + i * strides[b][2]
        part = tl.load(row[:, None] + d[None, :], mask=hit[:, None] & (d < D)[None, :], other=0.0)
        accumulator += tl.exp(x - safe)[:, None] * part.to(tl.float32)
    tl.store(out, accumulator.to(OUT.dtype.element_ty), mask=written)


@triton.jit
def _sum_kernel(
    OUT, parts, rows, classes, places, counts, strides, repeats,
    T, HEADS, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, IN_PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_range = token < T
    d = tl.arange(0, BLOCK)
    if IN_PLACE:
        touched = token < 0
    else:
        touched = in_range
    accumulator = tl.zeros((TILE, BLOCK), tl.float32)
    for b in tl.static_range(PARTS):
        for j in tl.static_range(repeats[b]):
            n, i, place, hit = _locate(
                token, in_range, head, rows[b], classes[b], places[b], counts[b], HEADS, repeats[b], j
            )  # fmt: skip
            row = parts[b] + n * strides[b][0] + place * strides[b][1] + i * strides[b][2]
            part = tl.load(row[:, None] + d[None, :], mask=hit[:, None] & (d < D)[None, :], other=0.0)
            accumulator += part.to(tl.float32)
            if IN_PLACE:
                touched = touched | hit
    out = OUT + (token.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    written = touched[:, None] & (d < D)[None, :]
    if IN_PLACE:
        accumulator += tl.load(out, mask=written, other=0.0).to(tl.float32)
    tl.store(out, accumulator.to(OUT.dtype.element_ty), mask=written)


@triton.jit
def _gather_kernel(
    OUT, X, tokens, classes, heads, stride_row, stride_head, stride_token,
    T, N, HEADS, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    t = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_range = t < T
    d = tl.arange(0, BLOCK)
    token = tl.load(tokens + t, mask=in_range, other=0)
    head_class = tl.load(classes + token, mask=in_range, other=0)
    head = tl.load(heads + head_class * HEADS + place, mask=in_range, other=0)
    row = X + (token // N).to(tl.int64) * stride_row + (token % N).to(tl.int64) * stride_token + head * stride_head
    mask = in_range[:, None] & (d < D)[None, :]
    x = tl.load(row[:, None] + d[None, :], mask=mask)
    tl.store(OUT + (t.to(tl.int64) * HEADS + place)[:, None] * D + d[None, :], x, mask=mask)


def gather(selection: Selection, x: Tensor) -> Tensor:
    """Return the selected rows (T, h, D) of x (B, H, N, D)."""
    table = selection.tables(x)
    T, h, D = len(selection.tokens), selection.heads.shape[1], x.shape[3]
    out = x.new_empty(T, h, D)
    _gather_kernel[h, triton.cdiv(T, TILE)](
        out, x, table.tokens, table.classes, table.heads, x.stride(0), x.stride(1), x.stride(2),
        T, x.shape[2], h, D, triton.next_power_of_2(D), TILE,
    )  # fmt: skip
    return out


class FusedOutput:
    """Collects parts and merges them into the output (B, H, N, D) and LSE (B, H, N)."""

    def __init__(self, query: Tensor, value_size: int) -> None:
        B, H, N, _ = query.shape
        self.shape = (B, N, H, value_size)
        self.query = query
        self.lse = query.new_empty((B, H, N), dtype=torch.float32)
        self.output: Tensor | None = None
        self.parts: list[tuple[Selection, Tensor, Tensor]] = []

    def add(self, selection: Selection, part: Tensor, part_lse: Tensor, is_first: bool) -> None:
        """Take a part (n, h, L, D) with LSE (n, h, L), or (T, h, D) with (T, h)."""
        if self.output is None and not self.parts and _covers(selection, part, self.shape):
            self.output = part.transpose(1, 2).view(self.shape)
            view = selection.view.of(self.lse)
            view.copy_(selection.packed(part_lse).reshape(view.shape))
        else:
            self.parts.append((selection, part, part_lse))

    def result(self) -> tuple[Tensor, Tensor]:
        """Merge what was added."""
        B, N, H, D = self.shape
        in_place = self.output is not None
        output = self.query.new_empty(self.shape) if self.output is None else self.output
        for some in _at_most(self.parts, PARTS_AT_ONCE, at_least_once=not in_place):
            tables = [selection.tables(self.query) for selection, *_ in some]
            _merge_kernel[H, triton.cdiv(B * N, TILE)](
                output, self.lse, tuple(p for _, p, _ in some), tuple(x for *_, x in some),
                tuple(t.rows for t in tables), tuple(t.classes for t in tables), tuple(t.places for t in tables),
                tuple(_count(p) for _, p, _ in some), tuple(_strides(p) for _, p, _ in some),
                tuple(_strides(x.unsqueeze(-1)) for *_, x in some),
                B * N, N, H, D, triton.next_power_of_2(D), len(some), in_place, TILE,
            )  # fmt: skip
            in_place = True
        return output.transpose(1, 2), self.lse


class FusedGradient:
    """Collects parts and adds them up to a gradient like x (B, H, N, D)."""

    def __init__(self, like: Tensor) -> None:
        B, H, N, D = like.shape
        self.shape = (B, N, H, D)
        self.like = like
        self.total: Tensor | None = None
        self.parts: list[tuple[Selection, Tensor]] = []

    def add(self, selection: Selection, part: Tensor) -> None:
        """Take a part (n, h, L, D) or (T, h, D)."""
        if self.total is None and not self.parts and _covers(selection, part, self.shape):
            self.total = part.transpose(1, 2).view(self.shape)
        else:
            self.parts.append((selection, part))

    def result(self) -> Tensor:
        """Add up what was added."""
        B, N, H, D = self.shape
        in_place = self.total is not None
        total = self.like.new_empty(self.shape) if self.total is None else self.total
        for some in _at_most(self.parts, PARTS_AT_ONCE, at_least_once=not in_place):
            tables = [selection.tables(self.like) for selection, _ in some]
            _sum_kernel[H, triton.cdiv(B * N, TILE)](
                total, tuple(p for _, p in some),
                tuple(t.rows for t in tables), tuple(t.classes for t in tables), tuple(t.places for t in tables),
                tuple(_count(p) for _, p in some), tuple(_strides(p) for _, p in some),
                tuple(tl.constexpr(t.places.shape[2]) for t in tables),
                B * N, H, D, triton.next_power_of_2(D), len(some), in_place, TILE,
            )  # fmt: skip
            in_place = True
        return total.transpose(1, 2)


def _covers(selection: Selection, part: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a part is the whole result, token by token."""
    return (
        selection.view is not None
        and selection.view.step == 1
        and part.numel() == torch.Size(shape).numel()
        and part.transpose(1, 2).is_contiguous()
    )


def _count(part: Tensor) -> int:
    return part.shape[2] if part.ndim == 4 else part.shape[0]


def _strides(part: Tensor) -> tuple[int, int, int]:
    """Strides of sequence, head and token of a part (n, h, L, D) or (T, h, D)."""
    return part.stride()[:3] if part.ndim == 4 else (0, part.stride(1), part.stride(0))


def _at_most(parts: list, size: int, at_least_once: bool) -> list[list]:
    chunks = [parts[i : i + size] for i in range(0, len(parts), size)]
    return chunks or ([[]] if at_least_once else [])
