"""Triton kernels that gather the rows of a call, and merge what it returned into the whole result.

A merge reads a part once and touches only the rows that take part. The first part becomes the result itself
where it has the same layout.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.plan import Selection, View

TILE = 32


@triton.jit
def _locate(tokens, classes, heads, T, h, TILE: tl.constexpr):
    """Rows of a call that a program works on: their number, token and head."""
    place = (tl.program_id(0) % h).to(tl.int64)  # neighbouring programs work on neighbouring heads
    t = (tl.program_id(0) // h) * TILE + tl.arange(0, TILE)
    in_range = t < T
    token = tl.load(tokens + t, mask=in_range, other=0)
    head_class = tl.load(classes + t, mask=in_range, other=0)
    head = tl.load(heads + head_class * h + place, mask=in_range, other=0)
    return place, t, in_range, token, head


@triton.jit
def _merge_kernel(
    OUT, LSE, PART, PART_LSE, tokens, classes, heads, T, h, N, H, L,
    part_n, part_h, part_l, lse_n, lse_h, lse_l,
    D: tl.constexpr, BLOCK: tl.constexpr, IS_FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place, t, in_range, token, head = _locate(tokens, classes, heads, T, h, TILE)
    n, i = (t // L).to(tl.int64), (t % L).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = in_range[:, None] & (d < D)[None, :]
    row = OUT + (token.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    lse_row = LSE + ((token // N) * H + head).to(tl.int64) * N + token % N
    part_lse = tl.load(PART_LSE + n * lse_n + place * lse_h + i * lse_l, mask=in_range, other=0.0)
    part = tl.load(PART + (n * part_n + place * part_h + i * part_l)[:, None] + d[None, :], mask=mask, other=0.0)
    if IS_FIRST:
        tl.store(lse_row, part_lse, mask=in_range)
        tl.store(row, part, mask=mask)
    else:
        old_lse = tl.load(lse_row, mask=in_range, other=0.0)
        old = tl.load(row, mask=mask, other=0.0).to(tl.float32)
        larger = tl.maximum(old_lse, part_lse)
        lse = larger + tl.log(tl.exp(old_lse - larger) + tl.exp(part_lse - larger))
        merged = tl.exp(old_lse - lse)[:, None] * old + tl.exp(part_lse - lse)[:, None] * part.to(tl.float32)
        tl.store(lse_row, lse, mask=in_range)
        tl.store(row, merged.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _add_kernel(
    OUT, PART, tokens, classes, heads, T, h, H, L, part_n, part_h, part_l,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place, t, in_range, token, head = _locate(tokens, classes, heads, T, h, TILE)
    n, i = (t // L).to(tl.int64), (t % L).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = in_range[:, None] & (d < D)[None, :]
    row = OUT + (token.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    part = tl.load(PART + (n * part_n + place * part_h + i * part_l)[:, None] + d[None, :], mask=mask, other=0.0)
    old = tl.load(row, mask=mask, other=0.0)
    tl.store(row, (old.to(tl.float32) + part.to(tl.float32)).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _gather_kernel(
    OUT, X, tokens, classes, heads, T, h, N, stride_row, stride_head, stride_token,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place, t, in_range, token, head = _locate(tokens, classes, heads, T, h, TILE)
    d = tl.arange(0, BLOCK)
    mask = in_range[:, None] & (d < D)[None, :]
    row = (token // N).to(tl.int64) * stride_row + (token % N).to(tl.int64) * stride_token
    x = tl.load(X + (row + head.to(tl.int64) * stride_head)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(OUT + (t.to(tl.int64) * h + place)[:, None] * D + d[None, :], x, mask=mask)


def gather(selection: Selection, x: Tensor) -> Tensor:
    """Return the selected rows (T, h, D) of x (B, H, N, D)."""
    T, h, D = len(selection.tokens), selection.heads.shape[1], x.shape[3]
    out = x.new_empty(T, h, D)
    _gather_kernel[(triton.cdiv(T, TILE) * h,)](
        out, x, *selection.tables(x.device), T, h, x.shape[2], x.stride(0), x.stride(1), x.stride(2),
        D, triton.next_power_of_2(D), TILE,
    )  # fmt: skip
    return out


class FusedOutput:
    """Merges parts into the output (B, H, N, D) and LSE (B, H, N)."""

    def __init__(self, query: Tensor, value_size: int) -> None:
        B, H, N, _ = query.shape
        self.shape = (B, N, H, value_size)
        self.query = query
        self.lse = query.new_full((B, H, N), -math.inf, dtype=torch.float32)
        self.output: Tensor | None = None

    def add(self, selection: Selection, part: Tensor, part_lse: Tensor, is_first: bool) -> None:
        """Take a part (n, h, L, D) with LSE (n, h, L), or (T, h, D) with (T, h)."""
        _, N, H, D = self.shape
        if self.output is None and selection.view is not None and _covers(selection.view, part, self.shape):
            self.output = part.transpose(1, 2).view(self.shape)
            view = selection.view.of(self.lse)
            view.copy_(part_lse.transpose(1, 2).reshape(view.shape))
            return
        if self.output is None:
            self.output = self.query.new_zeros(self.shape)
        T, h = len(selection.tokens), selection.heads.shape[1]
        _merge_kernel[(triton.cdiv(T, TILE) * h,)](
            self.output, self.lse, part, part_lse, *selection.tables(part.device), T, h, N, H, _count(part),
            *_strides(part), *_strides(part_lse.unsqueeze(-1)), D, triton.next_power_of_2(D), is_first, TILE,
        )  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor]:
        """Return what was merged."""
        output = self.query.new_zeros(self.shape) if self.output is None else self.output
        return output.transpose(1, 2), self.lse


class FusedGradient:
    """Adds parts up to a gradient like x (B, H, N, D)."""

    def __init__(self, like: Tensor) -> None:
        B, H, N, D = like.shape
        self.shape = (B, N, H, D)
        self.like = like
        self.total: Tensor | None = None

    def add(self, selection: Selection, part: Tensor) -> None:
        """Take a part (n, h, L, D) or (T, h, D)."""
        if self.total is None and selection.view is not None and _covers(selection.view, part, self.shape):
            self.total = part.transpose(1, 2).view(self.shape)
            return
        if self.total is None:
            self.total = self.like.new_zeros(self.shape)
        T, h, D = len(selection.tokens), selection.heads.shape[1], self.shape[3]
        _add_kernel[(triton.cdiv(T, TILE) * h,)](
            self.total, part, *selection.tables(part.device), T, h, self.shape[2], _count(part), *_strides(part),
            D, triton.next_power_of_2(D), TILE,
        )  # fmt: skip

    def result(self) -> Tensor:
        """Return the sum."""
        total = self.like.new_zeros(self.shape) if self.total is None else self.total
        return total.transpose(1, 2)


def _covers(view: View, part: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a part is the whole result, token by token."""
    return view.step == 1 and part.numel() == math.prod(shape) and part.transpose(1, 2).is_contiguous()


def _count(part: Tensor) -> int:
    return part.shape[2] if part.ndim == 4 else part.shape[0]


def _strides(part: Tensor) -> tuple[int, int, int]:
    """Strides of sequence, head and token of a part (n, h, L, D) or (T, h, D)."""
    if part.ndim == 3:
        return 0, part.stride(1), part.stride(0)
    return part.stride(0), part.stride(1), part.stride(2)
