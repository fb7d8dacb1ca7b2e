"""The attention function alone: which pattern a layer runs, and which arguments decide."""

import warnings

import pytest
import torch
from torch import nn

from hf_dilated import DilatedConfig, dilated_attention
from hf_dilated.functional import attend
from hf_dilated.integration.attention import attention_function
from hf_dilated.integration.documents import shared_positions
from hf_dilated.integration.layers import layer_pattern, ordinal
from hf_dilated.integration.masks import DTYPES, Form
from hf_dilated.patterns import DensePattern, DilatedPattern
from tests.tiny_models import tiny_config

PATTERN = DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2))
ALTERNATING = DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2), phase="alternate", dense_layers=(0,))


class Module(nn.Module):
    def __init__(self, pattern=PATTERN, *, layer_idx=0, is_causal=True, config=None):
        super().__init__()
        self.config = config or tiny_config("llama")
        self.config.hf_dilated = pattern
        self.layer_idx = layer_idx
        self.is_causal = is_causal


def heads(length=12, batch=1, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(batch, n, length, 8, dtype=dtype) for n in (4, 2, 2)]


def test_output_has_heads_last_and_no_weights():
    query, key, value = heads()
    output, weights = attention_function("dilated")(Module(), query, key, value, None, scaling=0.3)
    assert weights is None
    assert output.is_contiguous()
    expected = dilated_attention(query, key, value, PATTERN, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("by_argument", [True, False, None])
@pytest.mark.parametrize("by_module", [True, False])
def test_causality_is_the_arguments_before_the_modules(by_argument, by_module):
    query, key, value = heads()
    output, _ = attention_function("dilated")(
        Module(is_causal=by_module), query, key, value, None, is_causal=by_argument
    )
    is_causal = by_module if by_argument is None else by_argument
    expected = dilated_attention(query, key, value, PATTERN, is_causal=is_causal)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize("has_positions", [True, False])
def test_a_mask_decides_about_causality(by_mask, has_positions):
    query, key, value = heads()
    mask = torch.arange(12).view(1, 1, 1, 12).to(DTYPES[Form(by_mask, has_positions)])
    module = Module(is_causal=not by_mask)
    output, _ = attention_function("dilated")(module, query, key, value, mask, is_causal=not by_mask)
    expected = dilated_attention(query, key, value, PATTERN, is_causal=by_mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_a_changed_pattern_is_noticed():
    module, tensors = Module(), heads()
    before, _ = attention_function("dilated")(module, *tensors, None)
    module.config.hf_dilated = DilatedConfig(segment_lengths=(3,), dilation_rates=(1,))
    after, _ = attention_function("dilated")(module, *tensors, None)
    assert not torch.equal(before, after)


def test_learned_sinks_reach_the_softmax_with_their_gradient():
    query, key, value = heads()
    sinks = torch.randn(4, requires_grad=True)
    output, _ = attention_function("dilated")(Module(), query, key, value, None, s_aux=sinks)
    expected = attend(query, key, value, DilatedPattern(config=PATTERN), sink_logits=sinks)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    output.sum().backward()
    assert sinks.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa_does(dtype):
    query, key, value = heads()
    with torch.autocast("cpu", dtype=dtype):
        output, _ = attention_function("dilated")(Module(), query, key.to(dtype), value, None)
        expected = nn.functional.scaled_dot_product_attention(query, query, query)
    assert output.dtype == expected.dtype == dtype


def test_one_warning_for_inputs_longer_than_the_longest_segment():
    pattern = DilatedConfig(segment_lengths=(5,), dilation_rates=(1,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attention_function("dilated")(Module(pattern), *heads(5), None)
        assert not caught
        padded = torch.tensor([-1, -1, 0, 1, 2, 3]).view(1, 1, 1, 6)
        attention_function("dilated")(Module(pattern), *heads(6), padded)
        assert not caught
        for _ in range(2):
            attention_function("dilated")(Module(pattern), *heads(6), None)
    assert [str(w.message)[:44] for w in caught] == ["the input is longer than the longest segment"]


def test_windows_stay_dense_within_their_window():
    config = tiny_config("gemma3")
    assert layer_pattern(config, 0, 6) == DensePattern(window=6)


def test_dense_layers_do_not_count():
    config = tiny_config("llama")
    config.num_hidden_layers, config.hf_dilated = 4, ALTERNATING
    patterns = [layer_pattern(config, layer, None) for layer in range(4)]
    assert patterns[0] == DensePattern()
    assert [pattern.layer for pattern in patterns[1:]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "expected"), [("gemma3", {1: 0, 3: 1}), ("qwen3_next", {1: 0, 3: 1}), ("modernbert", {0: 0, 2: 1})]
)
def test_ordinals_count_the_layers_that_attend_to_everything(family, expected):
    config = tiny_config(family)
    assert {layer: ordinal(config, layer) for layer in expected} == expected
    last = max(expected)
    assert ordinal(config, last, dense_layers=(min(expected),)) == expected[last] - 1


def ids(*values):
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("mask", "position_ids", "expected"),
    [
        (None, ids(0, 1, 2, 3, 4), None),
        (None, ids(7, 8, 9, 10, 11), None),
        (None, ids(0, 1, 0, 0, 1), [0, 1, 0, 0, 1]),
        ([-1, 0, 1, 2, 3], ids(1, 0, 1, 2, 3), [-1, 0, 1, 2, 3]),  # padding wins
        ([0, 1, -1, -1, 2], ids(0, 1, 2, 3, 4), [0, 1, -1, -1, 2]),  # padding is counted
        ([0, 1, -1, -1, 2], ids(0, 1, 1, 1, 2), [0, 1, -1, -1, 2]),  # padding is not counted
        ([0, 1, -1, 2, 3], ids(0, 1, 1, 0, 1), [0, 1, -1, 0, 1]),
        ([0, 1, 2, 3, -2], ids(5, 0), [0, 1, 2, 0, -2]),  # the last written slots are the queries
        ([0, 1, 0, 1, 2], ids(0, 1, 0, 1, 2), [0, 1, 0, 1, 2]),
    ],
)
def test_documents_start_where_position_ids_jump(mask, position_ids, expected):
    mask = None if mask is None else torch.tensor(mask).view(1, 1, 1, -1)
    found = shared_positions(mask, position_ids, batch=1, queries=position_ids.shape[1], keys=5)
    assert expected == (None if found is None else found[0].tolist())


def test_layers_of_a_forward_share_the_positions():
    mask, position_ids = torch.tensor([0, 1, 2, 3]).view(1, 1, 1, 4), ids(0, 1, 0, 1)
    first = shared_positions(mask, position_ids, 1, 4, 4)
    assert shared_positions(mask, position_ids, 1, 4, 4) is first
    position_ids[0, 3] = 5
    assert shared_positions(mask, position_ids, 1, 4, 4).tolist() == [[0, 1, 0, 0]]


def test_positions_of_inference_tensors_are_never_stale():
    with torch.inference_mode():
        position_ids = ids(0, 1, 0, 1)
        assert shared_positions(None, position_ids, 1, 4, 4).tolist() == [[0, 1, 0, 1]]
        position_ids[0, 3] = 5
        assert shared_positions(None, position_ids, 1, 4, 4).tolist() == [[0, 1, 0, 0]]
