"""Merge parts one after the other with plain tensor operations, in float32 (float64 for float64)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_dilated.engine.plan import Selection
from hf_dilated.memory import BufferType, buffers


class StreamedOutput:
    """Merges parts into the output (B, H, N, D) and LSE (B, H, N)."""

    def __init__(self, query: Tensor, value_size: int, dtype: torch.dtype | None = None) -> None:
        B, H, N, _ = query.shape
        self.dtype = query.dtype
        dtype, device = dtype or wide(query.dtype), query.device
        self.output = buffers.full(BufferType.OUTPUT, (B, N, H, value_size), 0.0, dtype, device).transpose(1, 2)
        self.lse = buffers.full(BufferType.OUTPUT, (B, H, N), -math.inf, wide(query.dtype), device)

    def add(self, selection: Selection, part: Tensor, part_lse: Tensor, is_first: bool) -> None:
        """Take a part (n, h, L, D) with LSE (n, h, L), or (T, h, D) with (T, h)."""
        part, part_lse = packed(part, 4), packed(part_lse, 3)
        if is_first:
            _write(selection, self.output, part)
            _write(selection, self.lse, part_lse)
            return
        old, old_lse = _read(selection, self.output), _read(selection, self.lse)
        part, part_lse = part.reshape(old.shape).to(old.dtype), part_lse.reshape(old_lse.shape).to(old_lse.dtype)
        lse = torch.logaddexp(old_lse, part_lse)
        old.mul_((old_lse - lse).exp_().unsqueeze(-1)).addcmul_(part, (part_lse - lse).exp_().unsqueeze(-1))
        if selection.view is None:
            _write(selection, self.output, old)
        _write(selection, self.lse, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return what was merged."""
        return buffers.converted(BufferType.OUTPUT, self.output, self.dtype), self.lse


class StreamedGradient:
    """Adds parts up to a gradient like x (B, H, N, D)."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        self.dtype = like.dtype
        B, H, N, D = like.shape
        dtype = dtype or wide(like.dtype)
        self.total = buffers.full(BufferType.OUTPUT, (B, N, H, D), 0.0, dtype, like.device).transpose(1, 2)

    @staticmethod
    def add(selection: Selection, totals: Sequence["StreamedGradient"], parts: Sequence[Tensor]) -> None:
        """Add parts (n, h, L, D) or (T, h, D) of the same rows to gradients."""
        for gradient, part in zip(totals, parts, strict=True):
            gradient._add(selection, part)

    def _add(self, selection: Selection, part: Tensor) -> None:
        part = packed(part, 4).to(self.total.dtype)
        if selection.view is None:
            self.total.index_put_(selection.index(part.device), part, accumulate=True)
        else:
            view = selection.view.of(self.total)
            view.add_(part.reshape(view.shape))

    def result(self) -> Tensor:
        """Return the sum."""
        return buffers.converted(BufferType.OUTPUT, self.total, self.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which results of a dtype are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def packed(part: Tensor, batched_ndim: int) -> Tensor:
    """Turn (n, h, L, …) into (T, h, …); what is packed already stays."""
    return part.transpose(1, 2).flatten(0, 1) if part.ndim == batched_ndim else part


def _read(selection: Selection, total: Tensor) -> Tensor:
    if selection.view is not None:
        return selection.view.of(total)
    return buffers.gathered(total, selection.index(total.device))


def _write(selection: Selection, total: Tensor, part: Tensor) -> None:
    if selection.view is None:
        total[selection.index(total.device)] = part.to(total.dtype)
    else:
        view = selection.view.of(total)
        view.copy_(part.reshape(view.shape))
