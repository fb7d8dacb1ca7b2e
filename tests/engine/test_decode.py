from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from hf_dilated import BlockSparseConfig, DilatedConfig, dilated_attention, reference
from hf_dilated.engine.decode import decode
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern
from tests.cases import cases


@given(case=cases())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_query_equals_the_oracle(case):
    query = case.query[:, :, -1:]
    layer, positions = case.options["layer"], case.options.get("key_positions")
    if positions is None:
        positions = reference.positions(query.shape[0], 1, case.key.shape[2], case.options.get("attention_mask"), None)
    pattern = DilatedPattern(config=case.config, layer=layer)
    output, lse = decode(query, case.key, case.value, positions, pattern, 0.5)
    right, right_lse = reference.dilated_attention(
        query, case.key, case.value, case.config, scale=0.5, key_positions=positions, layer=layer, return_lse=True
    )
    torch.testing.assert_close(output, right, atol=1e-11, rtol=0)
    torch.testing.assert_close(lse, right_lse, atol=1e-11, rtol=0)


def test_step_by_step_equals_all_at_once():
    torch.manual_seed(0)
    config = DilatedConfig(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate")
    query, key, value = (torch.randn(2, heads, 40, 8, dtype=torch.float64) for heads in (8, 4, 4))
    whole = dilated_attention(query, key, value, config, layer=1)
    for n in range(1, 41):
        step = query[:, :, n - 1 : n], key[:, :, :n], value[:, :, :n]
        planned = dilated_attention(*step, config, layer=1)
        unplanned, _ = decode(*step, None, DilatedPattern(config=config, layer=1), 8**-0.5)
        torch.testing.assert_close(planned, whole[:, :, n - 1 : n], atol=1e-12, rtol=0)
        torch.testing.assert_close(unplanned, whole[:, :, n - 1 : n], atol=1e-12, rtol=0)


def test_keys_that_the_pattern_cannot_see_are_not_read():
    config = DilatedConfig(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4))
    query, key, value = (torch.randn(1, 4, n, 8, dtype=torch.float64) for n in (1, 64, 64))
    seen, is_seen = DilatedPattern(config=config).visible(torch.tensor([63]), 64, 4, 4)
    unseen = torch.ones(64, dtype=torch.bool)
    unseen[seen[is_seen]] = False
    assert unseen.sum() >= 48
    expected = dilated_attention(query, key, value, config)
    key[:, :, unseen] = value[:, :, unseen] = float("nan")
    assert torch.equal(dilated_attention(query, key, value, config), expected)
    assert torch.equal(
        decode(query, key, value, None, DilatedPattern(config=config), 8**-0.5)[0].isnan().any(), torch.tensor(False)
    )


def test_window():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (1, 20, 20))
    output, _ = decode(query, key, value, None, DensePattern(window=5), 8**-0.5)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, 15:], value[:, :, 15:])
    torch.testing.assert_close(output, dense, atol=1e-12, rtol=0)


class _Largest(TorchDispatchMode):
    """The most numbers that any operator gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in tree_leaves(result):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (14, 2), (6, 1), (4, 4)])
def test_heads_that_see_everything_are_read_where_they_lie(heads, kv_heads, dtype, padded):
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=heads, max_position_embeddings=8192, hidden_size=heads * 8)
    by_head = BlockSparseConfig.from_model_config(config).layers[0]
    near = replace(by_head[-1], local_blocks=2)
    config = BlockSparseConfig(block_size=4, layers=(tuple(parts if parts.sees_all else near for parts in by_head),))
    query, key, value = (torch.randn(2, n, m, 8).to(dtype) for n, m in ((heads, 1), (kv_heads, 200), (kv_heads, 200)))
    positions = None
    if padded:
        positions = torch.arange(200) - torch.tensor([[0], [9]])
        positions = positions.clamp(min=-1).masked_fill(torch.arange(200) >= 190, -2)
        key[:, :, 190:] = value[:, :, 190:] = float("nan")
    with _Largest() as largest:
        output, lse = decode(query, key, value, positions, BlockSparsePattern(config=config), 8**-0.5)
    right, right_lse = reference.block_sparse_attention(
        query, key.nan_to_num(), value.nan_to_num(), config, key_positions=positions, return_lse=True
    )
    close = {"atol": 1e-11, "rtol": 0} if dtype == torch.float64 else {"atol": 2e-2, "rtol": 0}
    torch.testing.assert_close(output.double(), right.double(), **close)
    torch.testing.assert_close(lse.double(), right_lse.double(), **close)
    dense_keys = -(-sum(map(attrgetter("sees_all"), by_head)) * kv_heads // len(by_head))
    assert largest.numel <= max(2 * dense_keys * 200 * 8, 2 * heads * 20 * 8)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", [
    DensePattern(),
    DilatedPattern(config=DilatedConfig(segment_lengths=(64, 256), dilation_rates=(1, 2))),
    BlockSparsePattern(config=BlockSparseConfig(block_size=4, local_blocks=16)),
])  # fmt: skip
def test_a_document_that_sees_all_of_itself_is_read_where_it_lies(pattern, padded):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, m, 8, dtype=torch.float64) for n, m in ((6, 1), (2, 60), (2, 60)))
    positions = (torch.arange(60) - torch.tensor([[0], [9]])).clamp(min=-1) if padded else None
    with _Largest() as largest:
        output, lse = decode(query, key, value, positions, pattern, 0.4)
    bias = torch.zeros(2, 1, 1, 60, dtype=torch.float64)
    if padded:
        bias[1, ..., :9] = -torch.inf
    key, value = (x.repeat_interleave(3, 1) for x in (key, value))
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.4)
    torch.testing.assert_close(output, right, atol=1e-12, rtol=0)
    right_lse = ((query @ key.transpose(2, 3)) * 0.4 + bias).logsumexp(3)
    torch.testing.assert_close(lse, right_lse, atol=1e-12, rtol=0)
    assert largest.numel <= 2 * 2 * 60 * 8
