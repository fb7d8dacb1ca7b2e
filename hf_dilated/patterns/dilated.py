"""Dilated attention: segments, dilation rates and sinks."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dilated.config import DilatedConfig
from hf_dilated.patterns.documents import Documents, Integers
from hf_dilated.patterns.partials import Level, Spans, merge_levels, rectangle, staircase


@dataclass(frozen=True, kw_only=True)
class DilatedPattern:
    """The pattern of one layer.

    Args:
        config: Branches, overlap, offset and sinks.
        layer: Ordinal of the layer among those that run the pattern; phase and rotation depend on it.
    """

    config: DilatedConfig
    layer: int = 0

    @property
    def spec(self) -> str:
        """The pattern as text, read by :func:`hf_dilated.patterns.parse`; layers of one pattern have one text."""
        c = self.config
        fields = (c.segment_lengths, c.dilation_rates, c.overlap, c.offset, c.sink_tokens, c.phase, c.rotate)
        return f"dilated {(*fields, self.layer % self._period)}"

    @property
    def _period(self) -> int:
        """Layers after which the pattern repeats."""
        period = 1 if self.config.phase == "none" else 2
        for rate in self.config.dilation_rates if self.config.rotate else ():
            multiple = period
            while multiple % rate:
                multiple += period
            period = multiple
        return period

    @classmethod
    def from_fields(cls, fields: tuple[Any, ...]) -> "DilatedPattern":
        """Build a pattern from the fields of its :attr:`spec`."""
        *values, layer = fields
        names = ("segment_lengths", "dilation_rates", "overlap", "offset", "sink_tokens", "phase", "rotate")
        return cls(config=DilatedConfig(**dict(zip(names, values, strict=True))), layer=layer)

    def levels(self, documents: Documents, heads: int, kv_heads: int, is_causal: bool) -> list[Level]:
        """List the partial attentions (:class:`hf_dilated.patterns.partials.Pattern`)."""
        grid = _Grid(documents, self.config.sink_tokens, self.phase)
        levels = grid.sinks(heads, is_causal) if self.config.sink_tokens else []
        inner = None
        for segment, rate in self.branches:
            classes = self.head_classes(rate, heads, kv_heads)
            if inner is None or self.config.overlap == "count":
                per_class = [grid.segments(segment, rate, s, members, is_causal) for s, members in classes]
                levels += merge_levels(per_class)
            else:
                for small, large in _nested(inner, segment):
                    per_class = [
                        grid.between(small, large, segment, rate, s, members, is_causal) for s, members in classes
                    ]
                    levels += merge_levels(per_class)
            inner = segment
        return levels

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Segment length and dilation rate of every branch."""
        return list(zip(self.config.segment_lengths, self.config.dilation_rates, strict=True))

    @property
    def phase(self) -> int:
        """Tokens by which the grid is shifted."""
        return self.config.phase_of(self.layer)

    def is_dense(self, length: int) -> bool:
        """Whether a document of a length sees all of itself."""
        return length <= self.config.dense_length(self.layer)

    def check(self, heads: int, is_causal: bool) -> None:
        """Refuse nothing (:class:`hf_dilated.patterns.partials.Pattern`)."""

    def visible(self, position: Tensor, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """List the positions that one causal query sees (:class:`hf_dilated.patterns.partials.Pattern`)."""
        S, phase = self.config.sink_tokens, self.phase
        device, rows = position.device, len(position)
        position = position[:, None, None]
        g = position - S + phase
        sinks = torch.arange(S, device=device).expand(rows, heads, S)
        seen, is_seen = [sinks], [sinks <= position]
        inner = None
        for w, r in self.branches:
            s = torch.tensor([self.residue(h, r, heads, kv_heads) for h in range(heads)], device=device)[:, None]
            offset = s + r * torch.arange(-(-min(w, keys + phase) // r), device=device)
            other = g // w * w + offset
            other_position = other - phase + S
            meets = (g % w % r == s) & (offset < w) & (other_position >= S) & (other_position <= position)
            if inner is not None and self.config.overlap == "once":
                meets &= other // inner != g // inner
            seen.append(other_position)
            is_seen.append(meets & (position >= S))
            inner = w
        return torch.cat(seen, 2), torch.cat(is_seen, 2)

    def classes(self, heads: int, kv_heads: int) -> list[tuple["DilatedPattern", int]]:
        """All heads are one: they keep equally many keys (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        return [(self, heads)]

    def kept(self, key_position: Tensor, following: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Say which keys later queries see (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        S, device = self.config.sink_tokens, key_position.device
        kept = (key_position >= 0) & (key_position < S)
        g, next_ = key_position - S + self.phase, (following.clamp(min=S) - S + self.phase)[:, None, None]
        kv_head = torch.arange(kv_heads, device=device)[:, None]
        for w, r in self.branches:
            residue = g % w % r
            last = w - 1 - (w - 1 - residue) % r  # of the segment's tokens on this residue
            is_own = _own_residues(self, r, heads, kv_heads, device)[kv_head, residue]
            kept |= (g // w == next_ // w) & (last >= next_ % w) & is_own & (key_position >= S)
        return kept

    @property
    def longest(self) -> int | None:
        """No limit (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        return None

    def marks(self, position: Tensor) -> Tensor:
        """Number the residues of all segments, branch by branch; then 0 for sinks. NaN is none, and equals nothing."""
        position = position.unsqueeze(-2)
        S = self.config.sink_tokens
        segment, rate, _ = _branch_tables(self, 1, 1, position.device)
        g = position - S + self.phase
        number = torch.where(position >= S, (g // segment * rate + g % segment % rate).double(), math.nan)
        if not S:
            return number
        return torch.cat([number, _zero_if((position >= 0) & (position < S))], -2)

    def sight(self, position: Tensor, length: int, heads: int, kv_heads: int) -> Tensor:
        """The marks that a query's heads look for, NaN in branches whose residue they do not stand on."""
        marks = self.marks(position).transpose(-1, -2)[:, :, None]  # (B, T, 1, K)
        _, rate, residue = _branch_tables(self, heads, kv_heads, position.device)
        branches = len(self.branches)
        is_on = marks[..., :branches] % rate[:, 0] == residue
        number = torch.where(is_on, marks[..., :branches], math.nan)
        if not self.config.sink_tokens:
            return number
        sinks = _zero_if(position >= 0)[..., None, None]
        return torch.cat([number, sinks.expand(*position.shape, heads, 1)], 3)

    def counts(self, sight: Tensor, marks: Tensor, heads: int) -> Tensor:
        """Count the marks that are looked for (:class:`hf_dilated.patterns.partials.ForgettingPattern`)."""
        found = sight.unflatten(1, (marks.shape[1], -1)).unsqueeze(4) == marks.unsqueeze(2)  # (B, G, H / G, K, M)
        return found.any(3) if self.config.overlap == "once" else found.sum(3)

    def residue(self, head: int, rate: int, heads: int, kv_heads: int) -> int:
        """Residue modulo ``rate`` of the tokens that a query head keeps."""
        match self.config.offset:
            case "head":
                base = head
            case "kv_head":
                base = head * kv_heads // heads
            case "grouped":
                base = head // math.ceil(heads / rate)
        return (base + self.layer * self.config.rotate) % rate

    def head_classes(self, rate: int, heads: int, kv_heads: int) -> list[tuple[int, tuple[int, ...]]]:
        """Group the query heads by the residue that they keep."""
        residues = [self.residue(head, rate, heads, kv_heads) for head in range(heads)]
        return [(s, tuple(h for h in range(heads) if residues[h] == s)) for s in sorted(set(residues))]


@functools.lru_cache(maxsize=1024)  # layers of several models, a kilobyte each
def _branch_tables(
    pattern: DilatedPattern, heads: int, kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Segment lengths (branches, 1), rates (branches, 1) and what residue heads keep (H, branches), on a device."""
    residue = [[pattern.residue(head, r, heads, kv_heads) for _, r in pattern.branches] for head in range(heads)]
    segment, rate = torch.tensor(pattern.branches, device=device).T.unsqueeze(2)
    return segment, rate, torch.tensor(residue, device=device)


@functools.lru_cache(maxsize=1024)
def _own_residues(pattern: DilatedPattern, rate: int, heads: int, kv_heads: int, device: torch.device) -> Tensor:
    """Which residues (G, rate) the query heads of key-value heads keep, on a device."""
    own = torch.zeros(kv_heads, rate, dtype=torch.bool, device="cpu")
    for head in range(heads):
        own[head * kv_heads // heads, pattern.residue(head, rate, heads, kv_heads)] = True
    return own.to(device)


def _zero_if(condition: Tensor) -> Tensor:
    return torch.where(condition, 0.0, math.nan).double()


def _nested(inner: int, outer: int) -> Iterator[tuple[int, int]]:
    """Double (or triple, …) from the inner segment length to the outer one."""
    while inner < outer:
        ratio = outer // inner
        factor = next((f for f in range(2, math.isqrt(ratio) + 1) if ratio % f == 0), ratio)
        yield inner, inner * factor
        inner *= factor


class _Grid:
    """The tokens behind the sinks of every document, at grid positions ``g = p - S + phase``."""

    def __init__(self, documents: Documents, sink_tokens: int, phase: int) -> None:
        self.length = np.array(documents.length, dtype=np.int64)
        self.first_query = np.array(documents.first_query, dtype=np.int64)
        self.key_base = np.array(documents.key_base, dtype=np.int64)
        self.query_base = np.array(documents.query_base, dtype=np.int64)
        self.sink_tokens = sink_tokens
        self.shift = sink_tokens - phase  # p = g + shift
        self.phase = phase

    def sinks(self, heads: int, is_causal: bool) -> list[Level]:
        sinks = np.minimum(self.sink_tokens, self.length)
        first_query = np.minimum(self.first_query, sinks)
        sink_query = Spans(self.query_base + first_query, sinks - first_query, 1)
        later = np.maximum(self.first_query, sinks)
        later_query = Spans(self.query_base + later, self.length - later, 1)
        sink_key = Spans(self.key_base, sinks, 1)
        levels = rectangle(range(heads), later_query, sink_key)
        if is_causal:
            return levels + staircase(range(heads), sink_query, sink_key, first_query)
        return levels + rectangle(range(heads), sink_query, Spans(self.key_base, self.length, 1))

    def segments(self, w: int, r: int, s: int, heads: Sequence[int], is_causal: bool) -> list[Level]:
        """Every segment of ``w`` tokens, seen by itself."""
        document, segment = self._cut(w)
        query, key, skipped = self._spans(document, segment * w, segment * w, (segment + 1) * w, r, s)
        return staircase(heads, query, key, skipped) if is_causal else rectangle(heads, query, key)

    def between(
        self, small: int, large: int, w: int, r: int, s: int, heads: Sequence[int], is_causal: bool
    ) -> list[Level]:
        """Inside segments of ``large`` tokens, what lies between its parts of ``small`` tokens.

        Residues count from the start of a branch's own segment of ``w`` tokens.
        """
        document, part = self._cut(small)
        begin = part * small
        query, _, _ = self._spans(document, begin // w * w, begin, begin + small, r, s)
        ratio, place = large // small, part % (large // small)
        levels: list[Level] = []
        for j in range(1, ratio):
            if is_causal:  # the j-th part sees all parts before it
                chosen = np.flatnonzero(place == j)
                from_, to = (begin - j * small)[chosen], begin[chosen]
            else:  # every part sees the one j places on
                chosen = np.arange(len(part))
                from_ = (begin // large * large) + (place + j) % ratio * small
                to = from_ + small
            frame = (begin // w * w)[chosen]
            _, key, _ = self._spans(document[chosen], frame, from_, to, r, s)
            levels += rectangle(heads, query[chosen], key)
        return levels

    def _cut(self, w: int) -> tuple[Integers, Integers]:
        """Index of the document and of the segment, for every segment of ``w`` that holds grid tokens."""
        tokens = np.maximum(self.length - self.sink_tokens, 0)
        count = np.where(tokens > 0, (tokens + self.phase - 1) // w - self.phase // w + 1, 0)
        document = np.repeat(np.arange(len(count)), count)
        segment = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count) + self.phase // w
        return document, segment

    def _spans(
        self, document: Integers, frame: Integers, begin: Integers, end: Integers, r: int, s: int
    ) -> tuple[Spans, Spans, Integers]:
        """Tokens of ``[begin, end)`` at ``frame + s + k r``: queries, keys, and the keys before the first query."""
        low = np.maximum(begin, self.phase)
        high = np.minimum(end, self.length[document] - self.shift)
        first = low + (s - (low - frame)) % r
        count = np.maximum(-((first - high) // r), 0)
        position = first + self.shift
        skipped = np.clip(-((position - self.first_query[document]) // r), 0, count)
        query = Spans(self.query_base[document] + position + skipped * r, count - skipped, r)
        return query, Spans(self.key_base[document] + position, count, r), skipped
