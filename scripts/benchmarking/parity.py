"""No speed without correctness: every variant against the oracle, on a small case of the same form."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarking.cases import Case
from benchmarking.variants import Pattern, Variant
from hf_dilated import BlockSparseConfig, DilatedConfig, reference
from hf_dilated.timing import release

LENGTH = 2048
# Of the worst row, where dense cuDNN itself is off by 5.4e-2 in bfloat16.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def small_case(case: Case) -> Case:
    """Scale a case down so that float64 dense attention is affordable and several segments still fit."""
    if case.blocks:
        blocks = tuple(text.partition(":")[0] + ":0.8" if ":" in text else text for text in case.blocks)
        return replace(case, batch=1, length=LENGTH, queries=LENGTH, blocks=tuple(dict.fromkeys(blocks)))
    first = case.branches[0][0]
    smallest = max(16, max(rate for _, rate in case.branches), LENGTH >> len(case.branches))
    branches = tuple((max(1, w * min(smallest, first) // first), r) for w, r in case.branches)
    queries = LENGTH if case.queries == case.length else case.queries
    return replace(case, batch=1, length=LENGTH, queries=queries, branches=branches)


def failures(case: Case, chosen: Iterable[Variant], *, gradients: bool = True) -> tuple[list[str], list[str]]:
    """Compare outputs and, if they are to be timed, gradients with the oracle.

    Returns:
        What differs, one line each; and which optional variants are missing here, with the reason.
    """
    wrong, missing = [], []
    expected: dict[Pattern, list[Tensor]] = {}
    for variant in (variant for variant in chosen if variant.is_checked):
        pattern = variant.claims or DilatedConfig(segment_lengths=(case.length,), dilation_rates=(1,))
        backward = gradients and case.queries == case.length
        if pattern not in expected:
            release()
            expected[pattern] = _oracle(case, pattern)
        try:
            with variant.in_time():
                actual = _run(case, variant, backward=backward)
        except Exception as error:
            if not variant.optional:
                raise
            missing.append(f"{variant.name}: {first_line(error)}")
            continue
        for name, got, want in zip(("output", "dq", "dk", "dv"), actual, expected[pattern], strict=False):
            off = row_error(got, want)
            if not off <= TOLERANCE[case.dtype]:
                wrong.append(f"{variant.name}: {name} is off by {off:.1e} (allowed {TOLERANCE[case.dtype]:.0e})")
    return wrong, missing


def row_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error of a row, relative to its size (at least the size of a middling row)."""
    size = expected.norm(dim=-1)
    error = (actual.double() - expected).norm(dim=-1) / torch.maximum(size, size.median())
    return float("nan") if error.isnan().any() else error.max().item()


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _oracle(case: Case, pattern: Pattern) -> list[Tensor]:
    query, key, value = (x.double().requires_grad_() for x in case.inputs())
    if isinstance(pattern, BlockSparseConfig):
        output = reference.block_sparse_attention(query, key, value, pattern, is_causal=case.is_causal)
    else:
        output = reference.dilated_attention(query, key, value, pattern, is_causal=case.is_causal)
    assert isinstance(output, Tensor)
    gradients = torch.autograd.grad(output, (query, key, value), _output_gradient(output))
    return [output.detach(), *gradients]


def _run(case: Case, variant: Variant, *, backward: bool) -> list[Tensor]:
    attention = variant.prepare()
    order = variant.order
    inputs = [x if order is None else x[:, :, order] for x in case.inputs()]
    back = slice(None) if order is None else order.argsort()
    if not backward:
        with torch.no_grad():
            return [attention(*inputs)[:, :, back]]
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    gradient = _output_gradient(output)
    gradients = torch.autograd.grad(output, inputs, gradient if order is None else gradient[:, :, order])
    return [x.detach()[:, :, back] for x in (output, *gradients)]


def _output_gradient(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(torch.bfloat16)
    return gradient.to(output.device, output.dtype)
