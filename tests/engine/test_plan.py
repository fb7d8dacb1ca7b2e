"""What a plan promises about memory: calls gather little, and what they have gathered is gone before the next one."""

import weakref

import pytest
import torch

from hf_dilated import DilatedConfig
from hf_dilated.engine import execute
from hf_dilated.engine.plan import GATHERED_PART, LEAST_GATHERED, make_plan
from hf_dilated.patterns import DilatedPattern
from hf_dilated.patterns.documents import Documents

HEADS = 32
DOUBLING = {"segment_lengths": (2048, 4096, 8192, 16384), "dilation_rates": (1, 2, 4, 8)}


@pytest.mark.parametrize("overlap", ["once", "count"])
@pytest.mark.parametrize("kv_heads", [32, 8])
@pytest.mark.parametrize("length", [8192, 16384 + 77])
def test_a_call_gathers_a_quarter_of_the_rows_at_most(length: int, kv_heads: int, overlap: str) -> None:
    pattern = DilatedPattern(config=DilatedConfig(**DOUBLING, overlap=overlap))
    calls = make_plan(pattern, Documents.whole_rows(1, length, length), HEADS, kv_heads, True, True).calls
    most = max(LEAST_GATHERED, length * HEADS // GATHERED_PART)
    gathered = [side for call in calls for side in (call.query, call.key) if side.view is None]
    assert gathered
    assert all(len(side.tokens) * side.heads.shape[1] <= most for side in gathered)


def test_short_inputs_share_one_call() -> None:
    """Splitting costs launches: what is small anyway stays together, one call a branch."""
    config = DilatedConfig(segment_lengths=(16, 64, 256), dilation_rates=(1, 2, 4), overlap="count")
    calls = make_plan(DilatedPattern(config=config), Documents.whole_rows(1, 512, 512), 8, 8, True, True).calls
    assert len(calls) == 3


def test_nothing_that_a_call_has_gathered_is_alive_when_the_next_one_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DilatedConfig(segment_lengths=(8, 64, 512), dilation_rates=(1, 8, 64), overlap="count")
    plan = make_plan(DilatedPattern(config=config), Documents.whole_rows(1, 500, 500), 64, 64, True, False)
    taken: list[tuple[int, weakref.ref]] = []
    take, number = execute._take, 0

    def watched(call, selection, *tensors):
        nonlocal number
        assert not [1 for of_call, x in taken if of_call != id(call) and x() is not None]
        found = take(call, selection, *tensors)
        if selection.view is None:
            taken.extend((id(call), weakref.ref(x.untyped_storage())) for x in found)
            number += 1
        return found

    monkeypatch.setattr(execute, "_take", watched)
    tensors = [torch.randn(1, 64, 500, 4) for _ in range(3)]
    output, lse = execute.forward(plan, *tensors, 0.5)
    execute.backward(plan, torch.ones_like(output), *tensors, output, lse, 0.5)
    assert number > 8
