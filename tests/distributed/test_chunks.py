"""One process, chunk by chunk: the oracle's results, and scratch for a few chunks."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dilated import BlockSparseConfig, DilatedConfig, RingConfig, SequenceLayout, ring_attention
from hf_dilated.distributed import shares
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern
from tests.distributed.test_ring import Case, differences, shards_of


@given(seed=st.integers(0, 10**6), chunks=st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_equals_the_oracle(seed: int, chunks: int) -> None:
    case = Case(seed)
    chunk = -(-case.rows * case.length // chunks)
    layout = SequenceLayout.of((case.rows, case.length), 1, kind=case.kind, **case.options)
    *inputs, grad = shards_of(case, layout, 0)
    inputs = [x.requires_grad_() for x in inputs]
    output, lse = ring_attention(
        *inputs, layout, pattern=case.pattern, is_causal=case.is_causal, config=RingConfig(chunk_tokens=chunk),
        return_lse=True,
    )  # fmt: skip
    found = [output.detach(), lse, *torch.autograd.grad(output, inputs, grad)]
    assert differences(case, layout, 0, found, case.expected()) == []


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time, beyond those given."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.users: Counter[int] = Counter(x.untyped_storage()._cdata for x in given)
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x)
        return result

    def _count(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.live += size * (self.users[key] == 0)
        self.users[key] += 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(x, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.live -= size * (self.users[key] == 0)


PATTERNS: dict[str, Any] = {
    "dense": DensePattern(),
    "window": DensePattern(window=100),
    "dilated": DilatedPattern(config=DilatedConfig(segment_lengths=(32, 128, 1024), dilation_rates=(1, 2, 4)), layer=0),
    "blocks": BlockSparsePattern(config=BlockSparseConfig(block_size=16, local_blocks=4, stride_blocks=16), layer=0),
}


def scratch(pattern: Any, length: int, chunk: int) -> int:
    """Bytes that a forward and a backward pass need beyond inputs, what they return, and what is saved."""
    torch.manual_seed(0)
    layout, config = SequenceLayout.of((1, length), 1), RingConfig(chunk_tokens=chunk)
    inputs = [torch.randn(1, length, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, length, 4, 16).transpose(1, 2)
    with Allocated(*inputs, grad) as allocated:
        output, lse = ring_attention(*inputs, layout, pattern=pattern, config=config, return_lse=True)
        forward = allocated.peak - output.nbytes - lse.nbytes
        allocated.peak = allocated.live
        grads = torch.autograd.grad(output, inputs, grad)
    backward = allocated.peak - output.nbytes - lse.nbytes - sum(x.nbytes for x in grads)
    return max(forward, backward)


@pytest.mark.parametrize("name", PATTERNS)
def test_scratch_is_that_of_chunks(name: str) -> None:
    short, long = (scratch(PATTERNS[name], length, chunk=128) for length in (512, 1024))
    whole = scratch(PATTERNS[name], 1024, chunk=0)
    of_a_chunk = 128 * 4 * 16 * 4  # bytes of its queries
    assert long < 1.3 * short, "it does not grow with the length"
    assert long < 24 * of_a_chunk
    assert long < whole / 2, "and is less than at once"


def test_a_second_pass_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    plan_levels = shares.plan_levels

    def counted(*arguments: Any, **options: Any) -> Any:
        planned.append(1)
        return plan_levels(*arguments, **options)

    monkeypatch.setattr(shares, "plan_levels", counted)
    shares.chunk_plan.cache_clear()
    layout = SequenceLayout.of((1, 96), 1)
    inputs: Any = [torch.randn(1, 2, 96, 8) for _ in range(3)]
    for _ in range(2):
        ring_attention(*inputs, layout, config=RingConfig(chunk_tokens=8))
        assert len(planned) == 12 * 13 // 2
