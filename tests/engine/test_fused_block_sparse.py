"""The Triton kernels for block-sparse attention, as plain Python where there is no GPU."""

import dataclasses
import math

import pytest
import torch

from hf_dilated import BlockParts, BlockSparseConfig
from hf_dilated.memory import BufferType, buffers
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents
from tests.cases import Case
from tests.engine.checks import assert_equals_oracle

pytest.importorskip("triton")
from triton.runtime.interpreter import interpreter_builder

from hf_dilated.engine import block_sparse, flash_block_sparse, fused_block_sparse_backward, fused_chosen


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(block_sparse, "runs_fused", lambda x: x.element_size() <= 4)
    block_sparse.key_walk.cache_clear()
    yield
    block_sparse.key_walk.cache_clear()


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
    monkeypatch.setattr(block_sparse, "SLOTS", 99)
    _assert_right(config, tokens, tokens, options)


@pytest.mark.parametrize("longest_list", [1, 32])
def test_groups_of_heads_that_cross_key_value_heads(monkeypatch, longest_list):
    monkeypatch.setattr(block_sparse, "LONGEST_LIST", longest_list)
    monkeypatch.setattr(block_sparse, "SLOTS", 99)
    _assert_right(SMALL, 10, 10, {}, heads=6, kv_heads=3)


def _assert_right(config, queries, keys, options, heads=2, kv_heads=1):
    torch.manual_seed(0)
    tensors = (torch.randn(1, h, tokens, 8) for h, tokens in ((heads, queries), (kv_heads, keys), (kv_heads, keys)))
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


CHOSEN = (BlockParts(topk_blocks=2, random_blocks=1), BlockParts(global_blocks=1, topk_blocks=1))


@pytest.mark.parametrize(
    ("groups", "queries", "options"),
    [
        (2, 18, {"position_ids": torch.tensor([[*range(5), *range(13)]])}),
        (1, 6, {"attention_mask": torch.arange(18)[None] >= 2}),
    ],
    ids=["packed", "padded, the last of the keys"],
)
def test_blocks_chosen_by_content(groups, queries, options):
    _assert_right(BlockSparseConfig(block_size=4, layers=(CHOSEN[:groups],)), queries, 18, options)


def test_scratch_of_chosen_blocks_is_that_of_a_key_value_head(monkeypatch):
    sizes, empty = [], buffers.empty

    def counted(kind, shape, dtype, device):
        sizes.append(math.prod(shape) if kind == BufferType.TEMP else 0)
        return empty(kind, shape, dtype, device)

    monkeypatch.setattr(buffers, "empty", counted)
    turns, heads, kv_heads, tokens = 3, 6, 3, 18
    config = BlockSparseConfig(block_size=4, topk_blocks=turns)
    _assert_right(config, tokens, tokens, {}, heads=heads, kv_heads=kv_heads)
    assert max(sizes) == turns * heads // kv_heads * tokens * 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks Triton's interpreter")
@pytest.mark.parametrize("kernel", ["row sums", "merge of chosen blocks"])
def test_heads_far_apart(monkeypatch, kernel):
    """Head times stride needs 64 bits; there are no rows, so nothing is read."""
    options = dataclasses.replace(interpreter_builder.options, debug=True)  # it tells when 32 bits are not enough
    monkeypatch.setattr(interpreter_builder, "options", options)
    x, far, count, tokens, heads = torch.zeros(1), (0, 1 << 30, 16), 0, 1, 4
    if kernel == "row sums":
        fused_block_sparse_backward._delta_kernel[(heads,)](x, x, x, count, tokens, heads, *far, *far, 16, 16, 32)
    else:
        fused_chosen._merge_kernel[(heads // 2,)](x, x, x, x, 1, 1, count, tokens, heads, 2, *far, 16, 16, 16, 1)


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


class Interface:
    """A stand-in for FlashAttention 4: reads its lists, computes densely."""

    @staticmethod
    def _seen(lists, by_key):
        heads, blocks = lists.whole_count.shape[1:]
        seen = torch.zeros(heads, blocks * 128, blocks * 128, dtype=torch.bool)
        for head in range(heads):
            for kind, counts, indices in (("edge", *lists[:2]), ("whole", *lists[2:])):
                for i in range(blocks):
                    for j in indices[0, head, i, : counts[0, head, i]].tolist():
                        query, key = (j, i) if by_key else (i, j)
                        tile = torch.ones(128, 128, dtype=torch.bool)
                        place = seen[head, query * 128 : query * 128 + 128, key * 128 : key * 128 + 128]
                        place |= tile.tril() if kind == "edge" else tile
        return seen

    @staticmethod
    def _scores(q, k, v, seen, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        seen = seen[:, : q.shape[2], : k.shape[2]].to(q.device)
        return q, k, v, (q @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)

    @classmethod
    def _flash_attn_fwd(cls, q, k, v, *, softmax_scale, mask_mod, block_sparse_tensors, return_lse):
        assert return_lse
        *_, v, scores = cls._scores(q, k, v, cls._seen(block_sparse_tensors, by_key=False), softmax_scale)
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)

    @classmethod
    def _flash_attn_bwd(cls, q, k, v, output, grad, lse, *, softmax_scale, mask_mod, block_sparse_tensors):
        G, seen = k.shape[2], cls._seen(block_sparse_tensors, by_key=True)
        q, k, v, scores = cls._scores(q, k, v, seen, softmax_scale)
        grad, output = grad.transpose(1, 2), output.transpose(1, 2)
        weights = (scores - lse[..., None]).exp()
        grad_scores = weights * (grad @ v.transpose(2, 3) - (grad * output).sum(-1, keepdim=True)) * softmax_scale
        of_keys = grad_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad
        grads = grad_scores @ k, *(x.unflatten(1, (G, -1)).sum(2) for x in of_keys)
        return tuple(x.transpose(1, 2) for x in grads)


@pytest.fixture
def flash_attention_4(monkeypatch):
    kernel = dataclasses.replace(flash_block_sparse.FLASH_ATTENTION_4, refuses=lambda case: None)
    monkeypatch.setattr(flash_block_sparse, "FLASH_ATTENTION_4", kernel)
    monkeypatch.setattr(flash_block_sparse, "flash_attention_4", lambda: Interface)
    monkeypatch.setattr(flash_block_sparse, "_sparsity", lambda lists: lists)
    monkeypatch.setattr(flash_block_sparse, "_mask", lambda is_causal: is_causal)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("length", "is_causal"), [(384, True), (300, True), (384, False)])
@pytest.mark.parametrize("groups", [1, 2])
def test_flash_attention_4_gets_the_right_lists(flash_attention_4, groups, length, is_causal):
    torch.manual_seed(0)
    parts = (BlockParts(local_blocks=2), BlockParts(global_blocks=1))
    tensors = (torch.randn(2, heads, length, 8) for heads in (2, 1, 1))
    case = Case(BlockSparseConfig(layers=(parts[:groups],)), *tensors, {"is_causal": is_causal})
    assert_equals_oracle(case, torch.float32, 2e-5)


def test_flash_attention_4_runs_windows_that_differ_at_any_length(flash_attention_4):
    config = BlockSparseConfig(layers=((BlockParts(local_blocks=8), BlockParts(local_blocks=16)),))
    pattern, x = BlockSparsePattern(config=config), torch.zeros(1, 2, 1, 8).expand(-1, -1, 1 << 21, -1)
    assert flash_block_sparse.refuses(pattern, Documents.whole_rows(1, 1 << 21, 1 << 21), True, x, x) is None


@pytest.mark.parametrize(
    ("config", "length", "is_causal", "reason"),
    [
        (BlockSparseConfig(block_size=64), 256, True, "needs blocks of 128 tokens"),
        (BlockSparseConfig(local_blocks=0, global_blocks=1), 256, True, "needs every token to see itself"),
        (BlockSparseConfig(), 300, False, "needs whole blocks where attention is not causal"),
        (BlockSparseConfig(layers=((BlockParts(), BlockParts(global_blocks=1)),)), 1 << 21, True, "more than 512 MiB"),
    ],
)
def test_what_flash_attention_4_does_not_run(flash_attention_4, config, length, is_causal, reason):
    pattern, x = BlockSparsePattern(config=config), torch.zeros(1, 2, 1, 8).expand(-1, -1, length, -1)
    documents = Documents.whole_rows(1, length, length)
    assert reason in flash_block_sparse.refuses(pattern, documents, is_causal, x, x)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert "no fixed order" in flash_block_sparse.refuses(pattern, documents, is_causal, x, x)
    torch.use_deterministic_algorithms(False)
    more_keys, plain = Documents.whole_rows(1, length, length + 1), BlockSparsePattern(config=BlockSparseConfig())
    assert "whole documents" in flash_block_sparse.refuses(plain, more_keys, True, x, x)
