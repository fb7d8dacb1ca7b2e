import pytest
import torch

from hf_dilated.engine import kernels
from hf_dilated.engine.kernels import Case, efficient, flash_attention_4
from hf_dilated.engine.kernels.plain import PLAIN

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


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "flash_attention_2"), ({"value_size": 64}, "efficient"), ({"device": "cpu"}, "cpu_flash")],
)
def test_choice_for_one_token(changes, name):
    assert kernels.choose_for_one(Case(**{"dtype": torch.bfloat16, **H100, "recurs": True, **changes})).name == name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, "flash-attn-4"), ({"capability": (8, 0)}, "9.0"), ({"head_size": 512, "value_size": 512}, "up to 256")],
)
def test_flash_attention_4_says_why_it_is_skipped(monkeypatch, changes, reason):
    monkeypatch.setattr(flash_attention_4, "flash_attention_4", lambda: None)
    case = Case(**{"dtype": torch.bfloat16, **H100, **changes})
    name, why = kernels.explain(case)[0]
    assert name == "flash_attention_4"
    assert reason in why


@pytest.fixture
def stand_in(monkeypatch):
    """FlashAttention 4's two functions, (B, L, H, D) and packed, in plain torch."""

    class Interface:
        @staticmethod
        def _flash_attn_fwd(q, k, v, *, softmax_scale, causal, return_lse, cu_seqlens_q=None, **_):
            assert return_lse
            rows = [x.transpose(-3, -2) for x in (q, k, v)]
            if cu_seqlens_q is None:
                output, lse = PLAIN.forward(*rows, causal, softmax_scale)
                return output.transpose(1, 2), lse, None, None, None
            output, lse = PLAIN.forward(*(x.unsqueeze(0) for x in rows), causal, softmax_scale)
            return output[0].transpose(0, 1), lse[0], None, None, None

        @staticmethod
        def _flash_attn_bwd(q, k, v, out, dout, lse, *, softmax_scale, causal, deterministic, cu_seqlens_q=None, **_):
            rows = [x.transpose(-3, -2) for x in (dout, q, k, v, out)]
            if cu_seqlens_q is None:
                return tuple(x.transpose(1, 2) for x in PLAIN.backward(*rows, lse, causal, softmax_scale))
            batch = (x.unsqueeze(0) for x in (*rows, lse))
            return tuple(x[0].transpose(0, 1) for x in PLAIN.backward(*batch, causal, softmax_scale))

    monkeypatch.setattr(flash_attention_4, "flash_attention_4", lambda: Interface)


@pytest.mark.usefixtures("stand_in")
def test_flash_attention_4_in_its_own_layout():
    """One sequence, as a batch and packed, against the plain kernel."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(1, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    kernel = flash_attention_4.FLASH_ATTENTION_4
    output, lse = PLAIN.forward(query, key, value, True, 0.3)
    right = output, lse, *PLAIN.backward(grad, query, key, value, output, lse, True, 0.3)
    found = (
        *kernel.forward(query, key, value, True, 0.3),
        *kernel.backward(grad, query, key, value, output, lse, True, 0.3),
    )
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)
    start = torch.tensor([0, 9], dtype=torch.int32)
    lengths = kernels.PackedLengths(start, start, 9, 9)
    packed = [x[0].transpose(0, 1) for x in (grad, query, key, value, output, lse)]
    found = (
        *kernel.packed.forward(*packed[1:4], lengths, True, 0.3),
        *kernel.packed.backward(*packed, lengths, True, 0.3),
    )
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y[0].transpose(0, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["cpu_flash", "math"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_forward_and_backward(name, is_causal):
    if name == "cpu_flash" and torch.get_default_device().type != "cpu":
        pytest.skip("a kernel of the CPU")
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
    padded = efficient._padded_to_32(lse)
    assert padded.shape[2] % 32 == 0
    assert padded.is_contiguous()
    assert torch.equal(padded[..., :length], lse)
