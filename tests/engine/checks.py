"""Holding the engine against the oracle."""

import torch
from torch import Tensor

from tests.cases import Case


def assert_equals_oracle(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Compare output, LSE and gradients; errors are relative to the largest entry, at least to 1."""
    ours, exact = case.to(dtype), case.to(torch.float64)
    output, lse = ours.run(return_lse=True)
    expected, expected_lse = exact.right(return_lse=True)
    assert not lse.requires_grad
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    _assert_close(output, expected, tolerance, "output")
    alone = ours.run()
    _assert_close(alone, expected, tolerance, "output without the LSE")
    _assert_close(lse.clamp(min=-1e9), expected_lse.clamp(min=-1e9), tolerance, "lse")
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(output, (ours.query, ours.key, ours.value), grad.to(dtype))
    inputs = (exact.query, exact.key, exact.value)
    expected_grads = torch.autograd.grad(expected, inputs, grad.to(dtype).double(), retain_graph=True)
    for name, found, right in zip(("query", "key", "value"), grads, expected_grads, strict=True):
        _assert_close(found, right, tolerance, f"gradient of the {name}")
    (of_sum,) = torch.autograd.grad(alone.sum(), ours.value)  # its gradient is one number, expanded
    (expected_of_sum,) = torch.autograd.grad(expected.sum(), exact.value)
    _assert_close(of_sum, expected_of_sum, tolerance, "gradient of the sum")


def _assert_close(found: Tensor, right: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == right.shape
    error = ((found.double() - right).abs().max() / right.abs().max().clamp(min=1)).item() if right.numel() else 0.0
    assert error <= tolerance, f"{what} is off by {error:.1e}"
