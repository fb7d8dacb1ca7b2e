"""Block-sparse attention against the oracle."""

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dilated import BlockParts, BlockSparseConfig, block_sparse_attention, reference
from hf_dilated.engine.decode import decode
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents
from hf_dilated.patterns.partials import Spans
from tests.cases import block_configs, cases
from tests.engine.checks import assert_equals_oracle

EXAMPLES = int(os.environ.get("HF_DILATED_EXAMPLES", "80"))
generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(case=cases(longest=28, config=block_configs(28)))
@generated
def test_float64(case):
    assert_equals_oracle(case, torch.float64, 1e-11)


@given(case=cases(longest=28, config=block_configs(28, chosen=3)))
@settings(generated, max_examples=EXAMPLES // 2)
def test_blocks_chosen_by_content(case):
    case.options["is_causal"] = True
    assert_equals_oracle(case, torch.float64, 1e-11)


@given(case=cases(longest=28, config=block_configs(28)))
@settings(generated, max_examples=EXAMPLES // 4)
def test_bfloat16(case):
    assert_equals_oracle(case, torch.bfloat16, 4e-2)


@given(case=cases(longest=28, config=block_configs(28, chosen=2)))
@settings(generated, max_examples=EXAMPLES // 2)
def test_one_query_of_a_cache(case):
    query = case.query[:, :, -1:]
    layer, positions = case.options["layer"], case.options.get("key_positions")
    if positions is None:
        positions = reference.positions(query.shape[0], 1, case.key.shape[2], case.options.get("attention_mask"), None)
    pattern = BlockSparsePattern(config=case.config, layer=layer)
    output, lse = decode(query, case.key, case.value, positions, pattern, 0.5)
    right, right_lse = reference.block_sparse_attention(
        query, case.key, case.value, case.config, scale=0.5, key_positions=positions, layer=layer, return_lse=True
    )
    torch.testing.assert_close(output, right, atol=1e-11, rtol=0)
    torch.testing.assert_close(lse, right_lse, atol=1e-11, rtol=0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_heads_that_see_everything_gather_nothing(is_causal):
    config = BlockSparseConfig(block_size=4, layers=((BlockParts(stride_blocks=1), BlockParts(local_blocks=2)),))
    (level,) = BlockSparsePattern(config=config).levels(Documents.whole_rows(2, 30, 30), 4, 2, is_causal)[:1]
    parts = [part for part in level if 0 in part.heads]
    assert [(part.heads, part.is_causal, type(part.key)) for part in parts] == [((0, 1), is_causal, Spans)]
    assert parts[0].key.count.tolist() == [30, 30]


CONTENT = BlockSparseConfig(block_size=4, local_blocks=1, global_blocks=1, random_blocks=1, topk_blocks=2)


def test_step_by_step_equals_all_at_once():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 41, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = block_sparse_attention(query, key, value, CONTENT)
    for n in range(1, 42):
        step = query[:, :, n - 1 : n], key[:, :, :n], value[:, :, :n]
        planned = block_sparse_attention(*step, CONTENT)
        unplanned, _ = decode(*step, None, BlockSparsePattern(config=CONTENT), 8**-0.5)
        torch.testing.assert_close(planned, whole[:, :, n - 1 : n], atol=1e-12, rtol=0)
        torch.testing.assert_close(unplanned, whole[:, :, n - 1 : n], atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", [CONTENT, BlockSparseConfig(block_size=4, local_blocks=2, stride_blocks=3)])
def test_the_future_changes_nothing(config):
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, 60, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    before = block_sparse_attention(*tensors, config)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, :, 38:] = torch.randn_like(x[:, :, 38:]) * 100
    after = block_sparse_attention(*changed, config)
    torch.testing.assert_close(before[:, :, :38], after[:, :, :38], atol=1e-13, rtol=0)
    assert not torch.allclose(before[:, :, 38:], after[:, :, 38:])


@given(config=block_configs(40), is_causal=st.booleans())
@settings(generated, max_examples=EXAMPLES // 4)
def test_weights_sum_to_one(config, is_causal):
    query, key = torch.randn(1, 2, 40, 4, dtype=torch.float64), torch.randn(1, 1, 40, 4, dtype=torch.float64)
    ones = torch.ones_like(key)
    output, lse = block_sparse_attention(query, key, ones, config, is_causal=is_causal, return_lse=True)
    sees = ~lse.isneginf()
    torch.testing.assert_close(output[sees], torch.ones_like(output[sees]), atol=1e-12, rtol=0)
    assert not output[~sees].any()


def test_a_choice_trains_the_blocks_that_were_chosen():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    config = BlockSparseConfig(block_size=4, topk_blocks=2)
    (gradient,) = torch.autograd.grad(block_sparse_attention(query, key, value, config)[0, 0, -1].sum(), key)
    touched = gradient[0, 0].abs().sum(1).unflatten(0, (16, 4)).sum(1).nonzero()[:, 0].tolist()
    assert len(touched) == 3
    assert touched[-1] == 15


@pytest.mark.parametrize("length", [4, 16])
def test_choosing_needs_causal_attention(length):
    tensors = (torch.randn(1, 1, length, 8) for _ in range(3))
    with pytest.raises(ValueError, match="topk_blocks: .*needs causal attention"):
        block_sparse_attention(*tensors, BlockSparseConfig(block_size=4, topk_blocks=1), is_causal=False)


def test_a_mask_must_be_as_long_as_the_input():
    config = BlockSparseConfig(block_size=4, local_blocks=0, block_mask=torch.eye(3))
    tensors = [torch.randn(1, 1, 13, 8) for _ in range(3)]
    assert block_sparse_attention(*(x[:, :, :12] for x in tensors), config).shape[2] == 12
    with pytest.raises(ValueError, match="block_mask: has 3 rows, but the input needs 4"):
        block_sparse_attention(*tensors, config)
    with pytest.raises(ValueError, match="block_mask: has 3 rows, but the input needs 4"):  # dense without the mask
        block_sparse_attention(*tensors, dataclasses.replace(config, local_blocks=9))


@pytest.mark.parametrize("length", [4, 16])
def test_groups_of_heads_must_be_equally_large(length):
    config = BlockSparseConfig(block_size=4, layers=((BlockParts(),) * 3,))
    with pytest.raises(ValueError, match="3 groups of heads do not divide 4 query heads"):
        block_sparse_attention(*(torch.randn(1, 4, length, 8) for _ in range(3)), config)


def test_the_function_is_one_graph():
    tensors = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
    config = BlockSparseConfig(block_size=4, layers=((BlockParts(local_blocks=2), BlockParts(global_blocks=1)),))
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, config), block_sparse_attention(*tensors, config))
