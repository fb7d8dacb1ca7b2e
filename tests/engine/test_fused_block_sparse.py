"""The Triton kernels for block-sparse attention, as plain Python where there is no GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dilated import BlockParts, BlockSparseConfig, reference
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents
from tests.cases import Case, block_configs, cases
from tests.engine.checks import assert_equals_oracle

pytest.importorskip("triton")
from hf_dilated.engine import block_sparse, execute

few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(block_sparse, "runs_fused", lambda x: x.element_size() <= 4)
    block_sparse.make_tables.cache_clear()
    yield
    block_sparse.make_tables.cache_clear()


@given(case=cases(longest=20, config=block_configs(20)), longest=st.sampled_from([1, 2, 32]))
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


def test_blocks_chosen_by_content_are_merged():
    torch.manual_seed(0)
    config = BlockSparseConfig(block_size=8, global_blocks=1, topk_blocks=1)
    tensors = (torch.randn(1, heads, 50, 8) for heads in (4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "runs_fused", lambda x: x.element_size() <= 4)
        assert_equals_oracle(Case(config, *tensors), torch.float32, 2e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_lists_of_flash_attention_4(is_causal):
    """Its form: whole blocks by row and by column, own blocks apart."""
    parts = (BlockParts(local_blocks=2), BlockParts(stride_blocks=3, random_blocks=1))
    pattern = BlockSparsePattern(config=BlockSparseConfig(layers=(parts,)))
    documents = Documents.whole_rows(2, 128 * 9, 128 * 9)
    lists = block_sparse.flash_lists(pattern, documents, is_causal, 4, 2, torch.device("cpu"))
    for lists_, by_key in zip(lists, (False, True), strict=True):
        assert (lists_.edge_count == is_causal).all()
        assert lists_.edge.flatten(0, 1).squeeze(-1).tolist() == [list(range(9))] * 4
        for head in range(4):
            seen = reference.visible_blocks(parts[head // 2], 9, is_causal, (0, 0, head // 2))
            right = {(i, j) for i in range(9) for j in seen[i] if i != j or not is_causal}
            counts, rows = lists_.whole_count[0, head].tolist(), lists_.whole[0, head].tolist()
            found = {(i, j) for i in range(9) for j in rows[i][: counts[i]]}
            assert {(j, i) for i, j in found} == right if by_key else found == right


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [512, 500])
@pytest.mark.parametrize("head_size", [64, 128])
def test_blocks_of_a_gpu(is_causal, length, head_size):
    """On FlashAttention 4 where it is installed, and then on Triton's kernels."""
    torch.manual_seed(0)
    groups = (BlockParts(local_blocks=2), BlockParts(global_blocks=1, random_blocks=1))
    config = BlockSparseConfig(layers=(groups,))
    tensors = [torch.randn(2, heads, length, head_size, device="cuda") for heads in (4, 2, 2)]
    with torch.device("cuda"):
        case = Case(config, *tensors, {"is_causal": is_causal})
        torch.use_deterministic_algorithms(False)  # FlashAttention 4 is not
        assert_equals_oracle(case, torch.bfloat16, 4e-2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert_equals_oracle(case, torch.bfloat16, 4e-2)
