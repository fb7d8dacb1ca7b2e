import pytest
import torch

from hf_dilated.engine import kernels
from hf_dilated.engine.kernels import Case

H100 = {"device": "cuda", "capability": (9, 0), "head_size": 128, "value_size": 128, "deterministic": False}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"recurs": True}, "cudnn"),
        ({}, "flash_attention_2"),
        ({"recurs": True, "deterministic": True}, "flash_attention_2"),
        ({"recurs": True, "value_size": 64}, "cudnn"),
        ({"value_size": 64}, "efficient"),
        ({"dtype": torch.float32}, "efficient"),
        ({"dtype": torch.float64}, "math"),
        ({"head_size": 12, "value_size": 12}, "math"),
        ({"capability": (7, 5), "recurs": True}, "efficient"),
        ({"device": "cpu", "dtype": torch.float64}, "cpu_flash"),
        ({"device": "cpu", "value_size": 64}, "math"),
    ],
)
def test_choice(changes, name):
    case = Case(**{"dtype": torch.bfloat16, **H100, **changes})
    assert kernels.choose(case).name == name
    for skipped, reason in kernels.explain(case):
        if skipped == name:
            break
        assert reason


@pytest.mark.parametrize("name", ["cpu_flash", "math"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_forward_and_backward(name, is_causal):
    kernel = next(k for k in kernels.KERNELS if k.name == name)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 9, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    right = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    grad = torch.randn_like(right)
    with torch.no_grad():
        output, lse = kernel.forward(query, key, value, is_causal, 0.3)
        grads = kernel.backward(grad, query, key, value, output, lse, is_causal, 0.3)
    torch.testing.assert_close(output, right, atol=1e-12, rtol=0)
    for found, expected in zip(grads, torch.autograd.grad(right, (query, key, value), grad), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [32, 40])
def test_lse_of_the_efficient_kernel_lies_side_by_side(length):
    lse = torch.randn(2, length, 4).transpose(1, 2)
    padded = kernels._padded_to_32(lse)
    assert padded.shape[2] % 32 == 0
    assert padded.is_contiguous()
    assert torch.equal(padded[..., :length], lse)
