"""Decoding with a cache that is spread over ranks: what one process computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dilated import DilatedConfig, dilated_attention
from hf_dilated.distributed.cached import CachedSequence
from hf_dilated.distributed.communication import Arrival, Wire
from hf_dilated.patterns import DilatedPattern
from tests.distributed.test_chunks import Allocated

CONFIG = DilatedConfig(segment_lengths=(8,), dilation_rates=(4,), overlap="count")  # three heads of four see nothing


class Recorded:
    """A wire that has the parts of all ranks, or notes the part of one."""

    def __init__(self, rank: int, parts: list[Tensor]) -> None:
        self.rank, self.parts = rank, parts

    def gather(self, x: Tensor) -> Arrival:
        self.parts[self.rank] = x
        return Arrival(torch.stack(self.parts), [], x, Wire(None, 0, 1))  # type: ignore[arg-type]


def decoded(length: int, sink_logits: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
    """Attend from the last token with the prompt on two ranks, one after the other; the second knows both parts."""
    query, key, value = tensors
    half, parts, output = length // 2, [torch.tensor(0.0)] * 2, torch.tensor(0.0)
    for turn in (0, 1, 0):
        slots = slice(0, half) if turn == 0 else slice(half, length)
        wire: Any = Recorded(turn, parts)
        prompt = torch.arange(length)[None, slots]
        cached = CachedSequence(wire, prompt, torch.tensor([length]))
        parts[:] = [part if part.ndim else _empty(query, value) for part in parts]
        output = cached.attend(
            query, key[:, :, slots], value[:, :, slots], DilatedPattern(config=CONFIG, layer=0), 0.5, sink_logits
        )
    return output


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """What a rank without a key that is seen sends."""
    part = torch.zeros(*query.shape[:3], value.shape[3] + 1, dtype=query.dtype)
    part[..., -1] = -torch.inf
    return part


@pytest.mark.parametrize("length", [7, 8, 9, 16])
@pytest.mark.parametrize("has_sink", [False, True])
def test_a_query_that_sees_nothing_gets_zero(length: int, has_sink: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, n, 8, dtype=torch.float64) for n in (1, length, length))
    found = decoded(length, torch.zeros(4, dtype=torch.float64) if has_sink else None, (query, key, value))
    expected, lse = dilated_attention(query, key, value, CONFIG, scale=0.5, return_lse=True)
    assert lse.isinf().sum() == 3
    if has_sink:
        expected = expected * lse.sigmoid()[..., None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_only_keys_that_the_pattern_sees_are_read() -> None:
    torch.manual_seed(0)
    length = 2048
    query, key, value = (torch.randn(1, 4, n, 8, dtype=torch.float64) for n in (1, length, length))
    pattern = DilatedPattern(config=DilatedConfig(segment_lengths=(8, 32), dilation_rates=(1, 4)), layer=0)
    seen, is_seen = pattern.visible(torch.tensor([length - 1]), length, 4, 4)
    counts = torch.zeros(1, 4, length, dtype=torch.long).scatter_add_(2, seen.clamp(min=0), is_seen.long())
    for x in (key, value):
        x.masked_fill_(counts[..., None] == 0, torch.nan)
    expected = dilated_attention(query, key.nan_to_num(), value.nan_to_num(), pattern.config, scale=0.5)
    cached = CachedSequence(Wire.alone(), torch.arange(length)[None], torch.tensor([length]))
    cached.slots()
    with Allocated(query, key, value) as allocated:
        found = cached.attend(query, key, value, pattern, 0.5, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert allocated.peak < key.nbytes / 2, "no key was read beside those"
