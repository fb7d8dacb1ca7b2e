"""The Triton kernels for blocks that tokens chose, as plain Python where there is no GPU."""

import pytest
import torch

from hf_dilated import BlockParts, BlockSparseConfig
from hf_dilated.memory import BufferType, buffers
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents
from tests.cases import Case

pytest.importorskip("triton")
import triton
import triton.language as tl

from hf_dilated.engine import block_sparse, fused_choice, fused_chosen, fused_chosen_backward
from hf_dilated.engine.chosen import chosen_blocks
from hf_dilated.engine.fused_block_sparse import Sizes
from hf_dilated.engine.fused_items import _over, reciprocal


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(block_sparse, "runs_fused", lambda x: x.element_size() <= 4)


@pytest.fixture
def _poisoned(monkeypatch):
    """What nobody has written must not be read."""
    empty = buffers.empty

    def poison(kind, shape, dtype, device):
        found = empty(kind, shape, dtype, device)
        return found.fill_(torch.nan) if kind == BufferType.TEMP else found

    monkeypatch.setattr(buffers, "empty", poison)


FEW = (BlockParts(topk_blocks=2, global_blocks=1), BlockParts(topk_blocks=1))  # many tokens find less to choose


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("size", "columns", "longest_part", "options"),
    [(32, 16, 16, {"position_ids": torch.tensor([[*range(3), *range(67)]])}), (16, 128, 1024, {})],
    ids=["blocks in slices, lists in parts, packed", "in one piece"],
)
def test_output_and_gradients(monkeypatch, size, columns, longest_part, options):
    sizes = Sizes(32, columns, 4, 1)
    monkeypatch.setattr(fused_chosen_backward, "LONGEST_PART", longest_part)
    monkeypatch.setattr(fused_chosen_backward, "BACKWARD", (sizes,) * 3)
    monkeypatch.setattr(fused_chosen, "LONGEST_TILE", longest_part)
    monkeypatch.setattr(fused_chosen, "FORWARD", (sizes,) * 3)
    monkeypatch.setattr(fused_chosen_backward, "SLOTS", 2)
    torch.manual_seed(0)
    config = BlockSparseConfig(block_size=size, layers=(FEW,))
    case = Case(config, *(torch.randn(1, heads, 70, d) for heads, d in ((4, 8), (2, 8), (2, 4))), options)
    assert_same_as_the_oracle(case)


def assert_same_as_the_oracle(case):
    ours, exact = case.to(torch.float32), case.to(torch.float64)
    results = []
    for x, output in (ours, ours.run()), (exact, exact.right()):
        grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        results.append((output, *torch.autograd.grad(output, (x.query, x.key, x.value), grad)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("_poisoned")
def test_key_value_heads_share_launches():
    """Two at once, and the third alone."""
    torch.manual_seed(0)
    config = BlockSparseConfig(block_size=4, topk_blocks=1)
    case = Case(config, *(torch.randn(1, 3, 18, 4) for _ in range(3)), {})
    with pytest.MonkeyPatch.context() as patch:
        for module in (fused_chosen, fused_chosen_backward):
            patch.setattr(module, "heads_at_once", lambda kv_heads, results: 2)
        assert_same_as_the_oracle(case)


def test_more_choices_than_can_be_sorted_are_refused():
    few = torch.empty(0)
    places = fused_choice.Places(few, few, None)
    query = torch.empty(1, 32, 1 << 20, 8, device="meta")
    with pytest.raises(ValueError, match="topk_blocks: 64 blocks for each of 1,048,576 tokens of 32 heads"):
        fused_choice.choose(places, 64, 128, query, query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_choice_is_that_of_float32(dtype):
    """Also of small keys that differ little, and of those that repeat: the earlier block wins."""
    torch.manual_seed(0)
    tokens, size = 176, 8
    query, key = torch.randn(1, 2, tokens, 16).to(dtype), torch.randn(1, 1, tokens, 16) / 64 + torch.randn(16)
    key = (key / 4096).to(dtype)
    key[:, :, 48:64] = key[:, :, 16:32]
    documents = Documents.whole_rows(1, tokens, tokens)
    pattern = BlockSparsePattern(config=BlockSparseConfig(block_size=size, topk_blocks=3))
    places = block_sparse._places(pattern, documents, 2, query.device)
    blocks = fused_choice.choose(places, 3, size, query, key).blocks
    expected = chosen_blocks(pattern, documents, True, query.float(), key.float())[0]
    none = tokens // size
    assert torch.equal(blocks.sort(dim=-1).values, torch.where(expected < 0, none, expected).sort(dim=-1).values)


@triton.jit
def _quotients(N, OUT, by, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(OUT + i, _over(tl.load(N + i), by))


@pytest.mark.parametrize("divisor", [1, 3, 7, 1 << 16, 46341, (1 << 31) - 1])
def test_divisors_are_exact(divisor):
    last = (1 << 31) - 1
    multiples = {divisor * m + d for m in (1, 2, last // 2 // divisor, last // divisor) for d in (-1, 0, 1)}
    numbers = sorted({0, last - 1, last} | {n for n in multiples if 0 <= n <= last})
    numbers = torch.tensor(numbers + [1] * (16 - len(numbers)), dtype=torch.int32)
    found = torch.zeros_like(numbers)
    _quotients[(1,)](numbers, found, reciprocal(divisor), 16)
    assert torch.equal(found, numbers // divisor)


def test_items_are_sorted_and_cut():
    blocks = torch.tensor([3, 0, 6, 3, 3, 0, 6, 5, 3, 3, 3, 4], dtype=torch.int32)  # 6: none
    found, order = blocks.sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(7), out_int32=True)
    choice = fused_choice.Choice(blocks.view(2, 2, 3), order, starts)
    tiles = fused_choice.cut(choice, 2, 4)
    assert tiles.starts.tolist() == [0, 1, 1, 1, 3, 4, 5]
    assert tiles.blocks.tolist() == [0, 3, 3, 4, 5] + [6] * (2 * tiles.most - 5)
