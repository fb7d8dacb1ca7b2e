"""Dense attention within a document, optionally within a window."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_dilated.patterns.documents import Documents
from hf_dilated.patterns.partials import Level, Spans, rectangle, staircase


@dataclass(frozen=True, kw_only=True)
class DensePattern:
    """Every token of a document sees every other (causal: every earlier one).

    Args:
        window: A query at position i sees keys at j with ``|i - j| < window``; None sees all.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1, got {self.window}")

    @property
    def spec(self) -> str:
        """The pattern as text, the inverse of :func:`hf_dilated.patterns.parse`."""
        return f"dense {self.window}"

    def is_dense(self, length: int) -> bool:
        """Whether a document of a length sees all of itself."""
        return self.window is None or self.window >= length

    def check(self, heads: int, is_causal: bool) -> None:
        """Refuse nothing (:class:`hf_dilated.patterns.partials.Pattern`)."""

    def visible(self, position: Tensor, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """List the positions that one causal query sees (:class:`hf_dilated.patterns.partials.Pattern`)."""
        count = keys if self.window is None else min(self.window, keys)
        first = (position - count + 1)[:, None, None]
        seen = first + torch.arange(count, device=position.device)
        return seen, seen >= 0

    def levels(self, documents: Documents, heads: int, kv_heads: int, is_causal: bool) -> list[Level]:
        """List the partial attentions (:class:`hf_dilated.patterns.partials.Pattern`)."""
        every_head = range(heads)
        if self.window is None or self.is_dense(max(documents.length, default=0)):
            return whole_documents(every_head, documents, is_causal)
        blocks = _Blocks(documents, self.window)
        earlier = blocks.triangle(every_head, -1, reverse=True)
        if is_causal:
            return staircase(every_head, blocks.query, blocks.key, blocks.skipped) + earlier
        own = rectangle(every_head, blocks.query, blocks.key)
        return own + earlier + blocks.triangle(every_head, 1, reverse=False)


def whole_documents(heads: range, documents: Documents, is_causal: bool) -> list[Level]:
    """List the partial attentions of heads that see everything in their document."""
    length, first = np.array(documents.length), np.array(documents.first_query)
    query = Spans(np.array(documents.query_base) + first, length - first, 1)
    key = Spans(np.array(documents.key_base), length, 1)
    return staircase(heads, query, key, first) if is_causal else rectangle(heads, query, key)


class _Blocks:
    """Documents cut into blocks as long as the window.

    A query sees the later part of the block before its own and (not causal) the earlier part of the block
    after it. Both are strict triangles: causal squares, the first one with both orders reversed.
    """

    def __init__(self, documents: Documents, window: int) -> None:
        length = np.array(documents.length)
        blocks = -(-length // window)
        self.window = window
        self.document = np.repeat(np.arange(len(length)), blocks)
        self.begin = (np.arange(len(self.document)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * window
        self.length = length[self.document]
        self.end = np.minimum(self.begin + window, self.length)
        self.first_query = np.clip(np.array(documents.first_query)[self.document], self.begin, self.end)
        self.key_base = np.array(documents.key_base)[self.document]
        self.query_base = np.array(documents.query_base)[self.document]
        self.skipped = self.first_query - self.begin
        self.query = Spans(self.query_base + self.first_query, self.end - self.first_query, 1)
        self.key = Spans(self.key_base + self.begin, self.end - self.begin, 1)

    def triangle(self, heads: range, direction: int, reverse: bool) -> list[Level]:
        begin = self.begin + direction * self.window
        count = np.where(begin < 0, 0, np.clip(self.length - begin, 0, self.window))
        key = Spans(self.key_base + begin, count, 1)
        if not reverse:  # local query i sees the keys j < i
            return staircase(heads, self.query, key, self.skipped - 1)
        # local query i sees the keys j > i; counted from the end, i' sees j' < i' + window - (queries' end)
        query = Spans(self.query.start + self.query.count - 1, self.query.count, -1)
        key = Spans(key.start + key.count - 1, key.count, -1)
        return staircase(heads, query, key, self.window - 1 - (self.end - self.begin))
