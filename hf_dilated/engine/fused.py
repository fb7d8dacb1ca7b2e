"""Triton kernels that gather the rows of a call, and merge what it returned into the whole result.

A merge reads a part once and touches only the rows that take part. The first part becomes the result itself
where it has the same layout.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dilated.engine.plan import Selection, View
from hf_dilated.engine.streamed import packed
from hf_dilated.memory import BufferType, buffers

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
def _add_rows(OUT, row, PART, part_n, part_h, part_l, n, place, i, d, mask):
    part = tl.load(PART + (n * part_n + place * part_h + i * part_l)[:, None] + d[None, :], mask=mask, other=0.0)
    old = tl.load(OUT + row, mask=mask, other=0.0)
    tl.store(OUT + row, (old.to(tl.float32) + part.to(tl.float32)).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _add_kernel(
    OUT, PART, OUT_2, PART_2, tokens, classes, heads, T, h, H, L,
    part_n, part_h, part_l, part_2_n, part_2_h, part_2_l,
    D: tl.constexpr, BLOCK: tl.constexpr, PAIR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place, t, in_range, token, head = _locate(tokens, classes, heads, T, h, TILE)
    n, i = (t // L).to(tl.int64), (t % L).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = in_range[:, None] & (d < D)[None, :]
    row = (token.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    _add_rows(OUT, row, PART, part_n, part_h, part_l, n, place, i, d, mask)
    if PAIR:
        _add_rows(OUT_2, row, PART_2, part_2_n, part_2_h, part_2_l, n, place, i, d, mask)


@triton.jit
def _copy_rows(OUT, to, X, slot, row, head, stride_row, stride_head, stride_token, d, mask):
    start = row * stride_row + slot * stride_token + head * stride_head
    x = tl.load(X + start[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(OUT + to, x, mask=mask)


@triton.jit
def _gather_kernel(
    OUT, OUT_2, OUT_3, X, X_2, X_3, tokens, classes, heads, T, h, N,
    row_stride, head_stride, token_stride, row_stride_2, head_stride_2, token_stride_2,
    row_stride_3, head_stride_3, token_stride_3,
    D: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place, t, in_range, token, head = _locate(tokens, classes, heads, T, h, TILE)
    d = tl.arange(0, BLOCK)
    mask = in_range[:, None] & (d < D)[None, :]
    row, slot, head = (token // N).to(tl.int64), (token % N).to(tl.int64), head.to(tl.int64)
    to = (t.to(tl.int64) * h + place)[:, None] * D + d[None, :]
    _copy_rows(OUT, to, X, slot, row, head, row_stride, head_stride, token_stride, d, mask)
    if COUNT > 1:
        _copy_rows(OUT_2, to, X_2, slot, row, head, row_stride_2, head_stride_2, token_stride_2, d, mask)
    if COUNT > 2:
        _copy_rows(OUT_3, to, X_3, slot, row, head, row_stride_3, head_stride_3, token_stride_3, d, mask)


def gather(selection: Selection, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the selected rows (T, h, D) of up to three tensors (B, H, N, D) of one shape."""
    T, h, D = len(selection.tokens), selection.heads.shape[1], tensors[0].shape[3]
    first, second, third = (tensors * 3)[:3]
    gathered = buffers.empty(BufferType.TEMP, (len(tensors), T, h, D), first.dtype, first.device).unbind()
    _gather_kernel[(triton.cdiv(T, TILE) * h,)](
        *(gathered * 3)[:3], first, second, third, *selection.tables(first.device), T, h, first.shape[2],
        *first.stride()[:3], *second.stride()[:3], *third.stride()[:3],
        D, triton.next_power_of_2(D), len(tensors), TILE,
    )  # fmt: skip
    return gathered


class FusedOutput:
    """Merges parts into the output (B, H, N, D) and LSE (B, H, N)."""

    def __init__(self, query: Tensor, value_size: int, dtype: torch.dtype | None = None) -> None:
        B, H, N, _ = query.shape
        self.dtype = dtype or query.dtype
        self.shape = (B, N, H, value_size)
        self.query = query
        self.lse = buffers.empty(BufferType.OUTPUT, (B, H, N), torch.float32, query.device)
        self.output: Tensor | None = None

    def add(self, selection: Selection, part: Tensor, part_lse: Tensor, is_first: bool) -> None:
        """Take a part (n, h, L, D) with LSE (n, h, L), or (T, h, D) with (T, h)."""
        _, N, H, D = self.shape
        if self.output is None and selection.view is not None and _covers(selection.view, part, self.shape):
            self.output = _whole(part, self.shape, self.dtype)
            view = selection.view.of(self.lse)
            view.copy_(part_lse.transpose(1, 2).reshape(view.shape))
            return
        if self.output is None:
            self._start_empty()
        T, h = len(selection.tokens), selection.heads.shape[1]
        _merge_kernel[(triton.cdiv(T, TILE) * h,)](
            self.output, self.lse, part, part_lse, *selection.tables(part.device), T, h, N, H, _count(part),
            *_strides(part), *_strides(part_lse.unsqueeze(-1)), D, triton.next_power_of_2(D), is_first, TILE,
        )  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor]:
        """Return what was merged."""
        if self.output is None:
            self._start_empty()
        assert self.output is not None
        return buffers.converted(BufferType.OUTPUT, self.output.transpose(1, 2), self.query.dtype), self.lse

    def _start_empty(self) -> None:
        self.output = buffers.full(BufferType.OUTPUT, self.shape, 0.0, self.dtype, self.query.device)
        self.lse.fill_(-math.inf)


class FusedGradient:
    """Adds parts up to a gradient like x (B, H, N, D)."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        B, H, N, D = like.shape
        self.dtype = dtype or like.dtype
        self.shape = (B, N, H, D)
        self.like = like
        self.total: Tensor | None = None

    @staticmethod
    def add(selection: Selection, totals: Sequence["FusedGradient"], parts: Sequence[Tensor]) -> None:
        """Add parts (n, h, L, D) or (T, h, D) of the same rows to one or two gradients."""
        if selection.repeats:
            for gradient, part in zip(totals, parts, strict=True):
                gradient._accumulate(selection, part)
            return
        pairs = [(total, part) for total, part in zip(totals, parts, strict=True) if not total._takes(selection, part)]
        if len(pairs) == 2 and pairs[0][1].shape != pairs[1][1].shape:  # values of another size
            for pair in pairs:
                _add(selection, pair)
        elif pairs:
            _add(selection, *pairs)

    def _takes(self, selection: Selection, part: Tensor) -> bool:
        """Take the first part (n, h, L, D) or (T, h, D) as it is, if it has every row; else it is to be added."""
        if self.total is not None:
            return False
        if selection.view is not None and _covers(selection.view, part, self.shape):
            self.total = _whole(part, self.shape, self.dtype)
            return True
        self.total = buffers.full(BufferType.OUTPUT, self.shape, 0.0, self.dtype, self.like.device)
        return False

    def _accumulate(self, selection: Selection, part: Tensor) -> None:
        """Add a part whose rows may repeat, which the kernel would add at the same time."""
        if self.total is None:
            self.total = buffers.full(BufferType.OUTPUT, self.shape, 0.0, self.dtype, self.like.device)
        row, head, slot = selection.index(part.device)
        self.total.index_put_((row, slot, head), packed(part, 4).to(self.total.dtype), accumulate=True)

    def result(self) -> Tensor:
        """Return the sum."""
        if self.total is None:
            self.total = buffers.full(BufferType.OUTPUT, self.shape, 0.0, self.dtype, self.like.device)
        return buffers.converted(BufferType.OUTPUT, self.total.transpose(1, 2), self.like.dtype)


def _add(selection: Selection, *pairs: tuple[FusedGradient, Tensor]) -> None:
    T, h = len(selection.tokens), selection.heads.shape[1]
    (total, part), (total_2, part_2) = pairs[0], pairs[-1]
    D = total.shape[3]
    _add_kernel[(triton.cdiv(T, TILE) * h,)](
        total.total, part, total_2.total, part_2, *selection.tables(part.device), T, h, total.shape[2], _count(part),
        *_strides(part), *_strides(part_2), D, triton.next_power_of_2(D), len(pairs) == 2, TILE,
    )  # fmt: skip


def _covers(view: View, part: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a part is the whole result, token by token."""
    return view.step == 1 and part.numel() == math.prod(shape) and part.transpose(1, 2).is_contiguous()


def _whole(part: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return such a part (n, h, L, D) as the result (B, N, H, D) in a dtype."""
    whole = part.transpose(1, 2).view(shape)
    return buffers.converted(BufferType.OUTPUT, whole.transpose(1, 2), dtype).transpose(1, 2)


def _count(part: Tensor) -> int:
    return part.shape[2] if part.ndim == 4 else part.shape[0]


def _strides(part: Tensor) -> tuple[int, int, int]:
    """Strides of sequence, head and token of a part (n, h, L, D) or (T, h, D)."""
    if part.ndim == 3:
        return 0, part.stride(1), part.stride(0)
    return part.stride(0), part.stride(1), part.stride(2)
