import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hf_dilated import DilatedConfig, dilated_attention, reference
from hf_dilated.engine import kernels
from hf_dilated.engine.kernels.plain import PLAIN
from tests.cases import Case, cases
from tests.engine.checks import assert_equals_oracle

EXAMPLES = int(os.environ.get("HF_DILATED_EXAMPLES", "250"))
generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(case=cases())
@generated
def test_float64(case):
    assert_equals_oracle(case, torch.float64, 1e-11)


@given(case=cases(longest=120))
@settings(generated, max_examples=EXAMPLES // 4)
def test_float64_on_longer_inputs(case):
    assert_equals_oracle(case, torch.float64, 1e-11)


@given(case=cases())
@settings(generated, max_examples=EXAMPLES // 5)
def test_float32(case):
    assert_equals_oracle(case, torch.float32, 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
@given(case=cases())
@settings(generated, max_examples=EXAMPLES // 10)
def test_half_precision(dtype, tolerance, case):
    assert_equals_oracle(case, dtype, tolerance)


@given(case=cases())
@settings(generated, max_examples=EXAMPLES // 2)
def test_sequences_of_different_lengths_share_a_call(case):
    """The path of GPUs, with a stand-in for their kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "choose_packed", lambda case: kernels.Packed(_packed_forward, _packed_backward))
        assert_equals_oracle(case, torch.float64, 1e-11)


def _sequences(lengths):
    query, key = lengths.query.tolist(), lengths.key.tolist()
    for i in range(len(query) - 1):
        yield slice(query[i], query[i + 1]), slice(key[i], key[i + 1])


def _batch(x):
    return x.transpose(0, 1).unsqueeze(0)


def _packed_forward(q, k, v, lengths, is_causal, scale):
    output, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for i, j in _sequences(lengths):
        part, part_lse = PLAIN.forward(_batch(q[i]), _batch(k[j]), _batch(v[j]), is_causal, scale)
        output[i], lse[i] = part[0].transpose(0, 1), part_lse[0].transpose(0, 1)
    return output, lse


def _packed_backward(grad, q, k, v, output, lse, lengths, is_causal, scale):
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for i, j in _sequences(lengths):
        tensors = (_batch(x) for x in (grad[i], q[i], k[j], v[j], output[i], lse[i]))
        for total, part, where in zip(grads, PLAIN.backward(*tensors, is_causal, scale), (i, j, j), strict=True):
            total[where] = part[0].transpose(0, 1)
    return tuple(grads)


def test_values_may_have_another_head_size():
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    value = torch.randn(1, 2, 40, 6)
    config = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), sink_tokens=2)
    assert_equals_oracle(Case(config, query, key, value), torch.float64, 1e-11)


def test_bfloat16_error_is_at_most_twice_that_of_dense_attention():
    torch.manual_seed(0)
    case = Case(
        DilatedConfig(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4)),
        *(torch.randn(1, 8, 512, 64, dtype=torch.bfloat16) for _ in range(3)),
    )

    def error(found, right):
        return ((found.double() - right).norm() / right.norm()).item()

    ours = dilated_attention(case.query, case.key, case.value, case.config)
    right = reference.dilated_attention(case.query, case.key, case.value, case.config)
    dense = torch.nn.functional.scaled_dot_product_attention
    half, double = (dense(*(x.to(d) for x in (case.query, case.key, case.value)), is_causal=True)
                    for d in (torch.bfloat16, torch.float64))  # fmt: skip
    assert error(ours, right) <= 2 * error(half, double)


def test_repeats_bit_for_bit():
    torch.manual_seed(0)
    case = Case(
        DilatedConfig(segment_lengths=(8, 32), dilation_rates=(1, 4), sink_tokens=1),
        *(torch.randn(2, 6, 50, 8) for _ in range(3)),
    ).to(torch.float32)

    def run():
        output = dilated_attention(case.query, case.key, case.value, case.config)
        return output, *torch.autograd.grad(output.square().sum(), (case.query, case.key, case.value))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
