"""The Triton kernels for block-sparse attention, as plain Python where there is no GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dilated import BlockParts, BlockSparseConfig
from tests.cases import Case, block_configs, cases
from tests.engine.checks import assert_equals_oracle

pytest.importorskip("triton")
from hf_dilated.engine import block_sparse

few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(block_sparse, "runs_fused", lambda x: x.element_size() <= 4)
    block_sparse.make_tables.cache_clear()
    yield
    block_sparse.make_tables.cache_clear()


@given(case=cases(longest=32, config=block_configs(32)), longest=st.sampled_from([1, 2, 32]))
@few
def test_generated(case, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sparse, "LONGEST_LIST", longest)
        block_sparse.make_tables.cache_clear()
        assert_equals_oracle(case, torch.float32, 2e-5)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [128, 150])
def test_blocks_larger_than_a_tile(is_causal, length):
    torch.manual_seed(0)
    groups = (BlockParts(local_blocks=2), BlockParts(global_blocks=1, random_blocks=1))
    config = BlockSparseConfig(block_size=64, layers=(groups,))
    tensors = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
    assert_equals_oracle(Case(config, *tensors, {"is_causal": is_causal}), torch.float32, 2e-5)
