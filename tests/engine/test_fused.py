"""The Triton kernels, as plain Python where there is no GPU."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dilated import DilatedConfig, reference
from hf_dilated.engine import decode, execute, op
from hf_dilated.patterns import DilatedPattern
from tests.cases import cases
from tests.engine.checks import assert_equals_oracle

pytest.importorskip("triton")
from hf_dilated.engine import fused_decode
from hf_dilated.engine.fused import FusedGradient
from hf_dilated.engine.plan import Selection

few = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@given(case=cases(longest=16))
@few
def test_gather_and_merge(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "runs_fused", lambda x: x.element_size() <= 4)
        assert_equals_oracle(case, torch.float32, 2e-5)


def test_rows_that_repeat_are_all_added():
    """Keys that several blocks of queries see come several times in one call."""
    tokens = np.array([0, 3, 1, 3, 1, 3])
    selection = Selection(tokens, np.array([[0, 1]]), np.zeros(6, np.int64), np.array([2, 4]), 4, repeats=True)
    like, part = torch.randn(1, 2, 4, 8), torch.randn(6, 2, 8)
    total = FusedGradient(like)
    FusedGradient.add(selection, (total,), (part,))
    right = torch.zeros(4, 2, 8).index_add_(0, torch.tensor(tokens), part)
    torch.testing.assert_close(total.result()[0].transpose(0, 1), right)


@given(case=cases(longest=30), block=st.sampled_from([8, 16]))
@few
def test_decoding(case, block):
    config, query, key, value = case.config, case.query[:, :, -1:].float(), case.key.float(), case.value.float()
    options = {name: x for name, x in case.options.items() if name != "is_causal"}
    layer = options.pop("layer")
    if "position_ids" in options:
        options["position_ids"] = _over_all_keys(options["position_ids"], key.shape[2])
    positions = options.get("key_positions")
    if positions is None:
        positions = reference.positions(
            query.shape[0], 1, key.shape[2], *map(options.get, ("attention_mask", "position_ids"))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_decode, "BLOCK", block)
        patch.setattr(decode, "runs_fused", lambda x: True)
        fused_decode._tables_of.cache_clear()
        spec = DilatedPattern(config=config, layer=layer).spec
        output, lse = op.decode(query, key, value, positions, None, spec, 0.5)
        fused_decode._tables_of.cache_clear()
    right, right_lse = reference.dilated_attention(
        query, key, value, config, scale=0.5, key_positions=positions, layer=layer, return_lse=True
    )
    torch.testing.assert_close(output.double(), right, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), right_lse, atol=1e-5, rtol=0)


def _over_all_keys(position_ids, keys):
    return torch.nn.functional.pad(position_ids, (keys - position_ids.shape[1], 0))


def test_without_positions_the_last_slot_is_the_query():
    torch.manual_seed(0)
    config = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2))
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 21, 8), torch.randn(2, 2, 21, 8)
    output, _ = fused_decode.fused_decode(query, key, value, None, DilatedPattern(config=config), 8**-0.5)
    right = reference.dilated_attention(query, key, value, config)
    torch.testing.assert_close(output.double(), right, atol=1e-5, rtol=0)
