"""The Triton kernels for block-sparse attention, as plain Python where there is no GPU."""

import pytest
import torch

from hf_dilated import BlockParts, BlockSparseConfig, reference
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents
from tests.cases import Case
from tests.engine.checks import assert_equals_oracle

pytest.importorskip("triton")
from hf_dilated.engine import block_sparse, execute


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(block_sparse, "runs_fused", lambda x: x.element_size() <= 4)
    block_sparse.make_tables.cache_clear()
    yield
    block_sparse.make_tables.cache_clear()


GROUPS = (BlockParts(local_blocks=2), BlockParts(global_blocks=1, random_blocks=1))
SMALL = BlockSparseConfig(block_size=4, layers=(GROUPS,))  # smaller than a tile of the kernels
LARGE = BlockSparseConfig(block_size=64, layers=(GROUPS,))  # larger


@pytest.mark.parametrize(
    ("config", "tokens", "options"),
    [
        (SMALL, 14, {"attention_mask": torch.arange(14)[None] >= 3}),
        (SMALL, 14, {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8]])}),
        (SMALL, 13, {"is_causal": False}),
        (LARGE, 70, {}),
    ],
    ids=["padded", "packed", "in both directions", "large blocks"],
)
@pytest.mark.parametrize("longest_list", [1, 32])
def test_output_and_gradients(monkeypatch, config, tokens, options, longest_list):
    monkeypatch.setattr(block_sparse, "LONGEST_LIST", longest_list)
    torch.manual_seed(0)
    tensors = (torch.randn(1, heads, tokens, 8) for heads in (2, 1, 1))
    case = Case(config, *tensors, options).to(torch.float32)
    exact = case.to(torch.float64)
    grad = torch.randn_like(case.query)
    inputs = (case.query, case.key, case.value), (exact.query, exact.key, exact.value)
    output, right = case.run(), exact.right()
    found = output, *torch.autograd.grad(output, inputs[0], grad)
    expected = right, *torch.autograd.grad(right, inputs[1], grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=0)


def test_queries_that_are_the_last_of_the_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 15, 8), torch.randn(1, 2, 15, 8)
    case = Case(SMALL, query, key, value)
    torch.testing.assert_close(case.run().double(), case.right(), atol=2e-5, rtol=0)


def test_blocks_chosen_by_content_are_merged():
    torch.manual_seed(0)
    config = BlockSparseConfig(block_size=4, topk_blocks=1)
    tensors = (torch.randn(1, heads, 21, 8) for heads in (2, 1, 1))
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
