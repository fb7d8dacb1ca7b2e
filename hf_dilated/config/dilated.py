"""Dilated attention as data."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_dilated.config.checks import (
    ConfigError,
    at_least,
    integer,
    integers,
    known_fields,
    longest_input,
    one_of,
    position_limit,
)
from hf_dilated.config.presets import DILATED

Overlap = Literal["once", "count"]
Offset = Literal["head", "kv_head", "grouped"]
Phase = Literal["none", "alternate"]

SHORTEST_SEGMENT = 2048


@dataclass(frozen=True, kw_only=True)
class DilatedConfig:
    """Dilated attention (LongNet, arXiv:2307.02486, section 2.2) over several branches.

    Branch ``b`` cuts a document into segments of ``segment_lengths[b]`` tokens and keeps every
    ``dilation_rates[b]``-th token of a segment; each head keeps another residue.

    Args:
        segment_lengths: Tokens in a segment, one entry a branch.
        dilation_rates: Distance between kept tokens, one entry a branch.
        overlap: ``"count"`` counts a key once for every branch that reaches it (the paper).
            ``"once"`` counts it a single time, so that a sequence which fits into the first segment
            is exactly dense attention; the branches must be nested.
        offset: Which residue a head keeps: ``"head"`` (``h % r``, the paper), ``"kv_head"`` (the same
            with the key-value head) or ``"grouped"`` (``h // ceil(H / r)``, as torchscale does).
        sink_tokens: First tokens of a document that every later token sees.
        phase: ``"alternate"`` shifts the segment boundaries of every second layer by half a segment.
        rotate: Shift the residues by one from layer to layer.
        dense_layers: ``layer_idx`` of the model layers that keep dense attention.

    Raises:
        ConfigError: If a field is malformed or the branches do not allow the chosen ``overlap``.

    Example:
        >>> config = DilatedConfig(segment_lengths=(2048, 4096, 8192), dilation_rates=(1, 2, 4))
        >>> config.overlap
        'once'
        >>> DilatedConfig(segment_lengths=(2048, 3000), dilation_rates=(1, 2))
        Traceback (most recent call last):
        ...
        hf_dilated.config.checks.ConfigError: segment_lengths: overlap="once" needs nested branches, but 3000 is not ...
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    overlap: Overlap = "once"
    offset: Offset = "head"
    sink_tokens: int = 0
    phase: Phase = "none"
    rotate: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates", "dense_layers"):
            object.__setattr__(self, name, integers(name, getattr(self, name)))
        object.__setattr__(self, "sink_tokens", integer("sink_tokens", self.sink_tokens))
        for name, options in (("overlap", Overlap), ("offset", Offset), ("phase", Phase)):
            one_of(name, getattr(self, name), get_args(options))
        if not isinstance(self.rotate, bool):
            raise ConfigError(f"rotate: expected True or False, got {self.rotate!r}")
        at_least("sink_tokens", (self.sink_tokens,), 0)
        at_least("dense_layers", self.dense_layers, 0)
        at_least("segment_lengths", self.segment_lengths, 1)
        at_least("dilation_rates", self.dilation_rates, 1)
        if not self.segment_lengths:
            raise ConfigError("segment_lengths: at least one branch is needed, for example (2048, 4096)")
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ConfigError(
                f"dilation_rates: {len(self.dilation_rates)} rates for {len(self.segment_lengths)} "
                "segment_lengths; give one rate for each segment length"
            )
        if self.overlap == "once":
            self._check_nested()

    def _check_nested(self) -> None:
        way_out = 'choose nested branches or overlap="count"'
        if self.offset == "grouped":
            raise ConfigError(f'offset: overlap="once" needs offset "head" or "kv_head", not "grouped"; {way_out}')
        if self.dilation_rates[0] != 1:
            raise ConfigError(
                f'dilation_rates: overlap="once" needs a first rate of 1, got {self.dilation_rates[0]}; {way_out}'
            )
        for name in ("segment_lengths", "dilation_rates"):
            values = getattr(self, name)
            for smaller, larger in zip(values, values[1:], strict=False):
                if larger % smaller:
                    raise ConfigError(
                        f'{name}: overlap="once" needs nested branches, but {larger} is not a multiple of '
                        f"{smaller}; {way_out}"
                    )
        for segment, rate in zip(self.segment_lengths, self.dilation_rates, strict=True):
            if segment % rate:
                raise ConfigError(
                    f'dilation_rates: overlap="once" needs rates that divide their segment, but {rate} does not '
                    f"divide {segment}; {way_out}"
                )

    @property
    def depends_on_layer(self) -> bool:
        """Whether two layers may run different patterns."""
        return self.rotate or self.phase != "none" or bool(self.dense_layers)

    def phase_of(self, layer: int) -> int:
        """Tokens by which the grid of ``layer`` (counting only layers that run the pattern) is shifted."""
        return self.segment_lengths[0] // 2 * (layer % 2) if self.phase == "alternate" else 0

    def dense_length(self, layer: int = 0) -> int:
        """Longest document, in tokens, that ``layer`` attends to exactly as dense attention does."""
        if self.overlap == "count" and self.dilation_rates != (1,):
            return self.sink_tokens
        return self.sink_tokens + self.segment_lengths[0] - self.phase_of(layer)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of :meth:`from_dict`."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DilatedConfig":
        """Build a pattern from the values of :meth:`to_dict`.

        Raises:
            ConfigError: If a key is missing or unknown, or a value is malformed.
        """
        return cls(**known_fields(cls, values))

    @classmethod
    def longnet(cls, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> "DilatedConfig":
        """Return the paper's own pattern: keys count once for every branch, no sinks, no phase."""
        return cls(segment_lengths=tuple(segment_lengths), dilation_rates=tuple(dilation_rates), overlap="count")

    @classmethod
    def from_model_config(cls, config: Any, max_length: int | None = None) -> "DilatedConfig":
        """Choose branches for a Transformers configuration.

        Segments double from ``min(2048, max_position_embeddings)`` until they reach
        ``max(max_position_embeddings, max_length)``; rates double from 1, up to the number of heads. All else is
        the preset (:data:`hf_dilated.config.presets.DILATED`).

        Args:
            config: A ``PreTrainedConfig``; of a multimodal model the text part is read.
            max_length: Longest sequence, in tokens, if it is longer than the model was made for.

        Raises:
            ConfigError: If neither the configuration nor ``max_length`` gives a length.

        Example:
            >>> from transformers import LlamaConfig
            >>> DilatedConfig.from_model_config(LlamaConfig(max_position_embeddings=8192)).dilation_rates
            (1, 2, 4)
        """
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        longest = longest_input(config, max_length)
        segments = [min(SHORTEST_SEGMENT, position_limit(config) or longest)]
        while segments[-1] < longest:
            segments.append(2 * segments[-1])
        heads = getattr(text_config, "num_attention_heads", None) or 1
        largest_rate = 1 << (heads.bit_length() - 1)
        rates = [min(1 << branch, largest_rate) for branch in range(len(segments))]
        if 1 << (len(segments) - 1) > largest_rate:
            warnings.warn(
                f"{heads} attention heads allow dilation rates up to {largest_rate}: the longest segments stay "
                "denser than they could be, so the gain over dense attention is small",
                stacklevel=2,
            )
        options = DILATED.for_layers(getattr(text_config, "num_hidden_layers", None) or 0)
        return cls(segment_lengths=tuple(segments), dilation_rates=tuple(rates), **options)
