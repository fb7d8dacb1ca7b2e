"""The Triton kernels that list blocks, as plain Python where there is no GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dilated import BlockParts, BlockSparseConfig, block_sparse_attention, reference
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from hf_dilated.engine import (
    block_sparse,
    fused_block_lists,
    fused_block_sparse,
    fused_block_sparse_backward,
    fused_choice,
    fused_chosen,
    fused_chosen_backward,
)


@pytest.fixture(autouse=True)
def _without_what_others_kept():
    caches = [getattr(block_sparse, name) for name in ("flash_lists", "query_walk", "key_walk", "_shown", "_places")]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


ROWS = 8
MIXED = BlockParts(local_blocks=2, stride_blocks=3, dilated_blocks=3, random_blocks=2)
DRAWN = BlockParts(global_blocks=1, random_blocks=3)
MASKED = BlockParts(
    local_blocks=0, random_blocks=1, block_mask=torch.arange(ROWS)[:, None] * torch.arange(ROWS) % 5 == 1
)


MARKED = BlockParts(local_blocks=1, block_mask=torch.arange(ROWS)[:, None] * torch.arange(ROWS) % 4 == 3)
POPULAR = BlockParts(local_blocks=0, global_blocks=2, stride_blocks=4)


@pytest.mark.parametrize(
    "parts", [(MIXED,), (DRAWN, MASKED), (MARKED,), (POPULAR,)], ids=["alike", "two groups", "marked", "popular"]
)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("by_key", [False, True])
def test_lists(monkeypatch, parts, is_causal, by_key):
    monkeypatch.setattr(fused_block_lists, "CANDIDATES", 4)  # more than one step
    pattern = BlockSparsePattern(config=BlockSparseConfig(block_size=16, seed=3, layers=(parts,)))
    documents = Documents.whole_rows(2, 16 * ROWS - 5, 16 * ROWS - 5)  # the last block is not whole
    lists = block_sparse.flash_lists(pattern, documents, is_causal, 2, torch.get_default_device(), by_key=by_key)
    assert lists.whole.shape[:3] == (1, len(parts), ROWS)
    for group, own in enumerate(parts):
        seen = reference.visible_blocks(own, ROWS, is_causal, (3, 0, group))
        for block in range(ROWS):
            right = [i for i in range(ROWS) if block in seen[i]] if by_key else sorted(seen[block])
            edge = block if is_causal else -1 if by_key else ROWS - 1
            whole, masked = (x[0, group, block].item() for x in (lists.whole_count, lists.edge_count))
            assert lists.whole[0, group, block, :whole].tolist() == [i for i in right if i != edge]
            assert not lists.whole[0, group, block, whole:].any()
            assert lists.edge[0, group, block, :masked].tolist() == [i for i in right if i == edge]


class Kernel:
    """In place of a kernel: keeps what it is called with."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((arguments, options))


class Operators(TorchDispatchMode):
    """Names the operators on the device ``meta`` that are more than an allocation or a view."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        is_there = any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in (*args, result))
        if is_there and not function.is_view and "empty" not in function.__name__:
            self.found.append(function.__name__)
        return result


def test_what_lists_cost(monkeypatch):
    """A transfer and a launch for every length and direction; for twice the blocks, one of each to draw among them."""
    launches = []
    for name in ("_draw_kernel", "_list_kernel"):
        monkeypatch.setattr(fused_block_lists, name, Kernel(launches))
    pattern = BlockSparsePattern(config=BlockSparseConfig(layers=((MIXED, BlockParts()),)))
    for length, of_draws in ((500, 1), (400, 0), (100_000, 1), (131_072, 0), (70_000, 0)):
        documents = Documents.whole_rows(1, length, length)
        for by_key, expected in ((False, 1 + of_draws), (False, 0), (True, 1), (True, 0)):
            with Operators() as operators, torch.device("meta"):
                block_sparse.flash_lists(pattern, documents, True, 4, torch.device("meta"), by_key=by_key)
            assert operators.found == ["_to_copy.default"] * expected
            assert len(launches) == expected
            launches.clear()


def test_lengths_share_what_is_drawn():
    """The longer document comes first: it draws for the shorter one."""
    pattern = BlockSparsePattern(config=BlockSparseConfig(block_size=16, seed=3, layers=((DRAWN,),)))
    for blocks in (ROWS, 5):
        documents = Documents.whole_rows(1, 16 * blocks, 16 * blocks)
        lists = block_sparse.flash_lists(pattern, documents, True, 1, torch.get_default_device(), by_key=False)
        seen = reference.visible_blocks(DRAWN, blocks, True, (3, 0, 0))
        for block in range(blocks):
            whole = lists.whole[0, 0, block, : lists.whole_count[0, 0, block].item()].tolist()
            assert whole == sorted(seen[block] - {block})


BLOCKS = 512
DIAGONAL = torch.eye(BLOCKS, dtype=torch.bool)
SEEN_BY_ALL = DIAGONAL | (torch.arange(BLOCKS) == 0)
IN_TWO_GROUPS = BlockSparseConfig(layers=((BlockParts(local_blocks=9), BlockParts(dilated_blocks=9)),))


@pytest.mark.parametrize(
    ("config", "blocks", "slots", "widest"),
    [
        (BlockSparseConfig(block_mask=DIAGONAL), BLOCKS, 0, 2),
        (BlockSparseConfig(block_mask=SEEN_BY_ALL), BLOCKS, BLOCKS // 32, BLOCKS),
        (BlockSparseConfig(block_mask=SEEN_BY_ALL), 320, 320 // 32, 320),
        (IN_TWO_GROUPS, BLOCKS, 0, 10),
        (BlockSparseConfig.strided(8), 256, 4 * sum(range(2, 9)), 249),
    ],
    ids=["sparse mask", "mask with a popular block", "part of it", "two groups", "strided"],
)
def test_slots_and_tables(monkeypatch, config, blocks, slots, widest):
    """Only blocks that many rows really see are cut into parts, and only what is seen has room in a table."""
    walk, split = walk_of(monkeypatch, config, blocks)
    assert split.slots == slots
    assert walk.lists.whole.shape[3] == widest


@pytest.mark.parametrize("blocks", [1024, 8192])
def test_parts_are_bounded(monkeypatch, blocks):
    """Popular blocks are as many as the document is long, and so is what sees them: slots would be its square."""
    walk, split = walk_of(monkeypatch, BlockSparseConfig.strided(8), blocks)
    assert blocks // 4 < split.slots <= blocks
    assert len(walk.entries) <= 2 * blocks


def walk_of(monkeypatch, config, blocks):
    for name in ("_draw_kernel", "_list_kernel"):
        monkeypatch.setattr(fused_block_lists, name, Kernel([]))
    pattern, documents = BlockSparsePattern(config=config), Documents.whole_rows(1, 128 * blocks, 128 * blocks)
    return block_sparse.key_walk(pattern, documents, True, 4, torch.device("meta"))


KERNELS = {
    fused_block_lists: ("_draw_kernel", "_list_kernel"),
    fused_block_sparse: ("_forward_kernel",),
    fused_block_sparse_backward: ("_delta_kernel", "_query_kernel", "_key_kernel", "_sum_kernel"),
    fused_choice: ("_mean_kernel", "_choose_kernel"),
    fused_chosen: ("_forward_kernel", "_merge_kernel"),
    fused_chosen_backward: ("_backward_kernel", "_add_queries_kernel", "_add_keys_kernel"),
}


def programs_of(kernel, unspecialized):
    """A function that says which program Triton makes of a kernel's arguments."""
    function = JITFunction(kernel.fn, do_not_specialize=unspecialized)
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(function.signature, function.params, backend)

    def program(arguments, options):
        _, specialization, rest = bind(*arguments, **options)
        return str((specialization, sorted(rest.items())))

    return program


@pytest.mark.parametrize("by_token", [True, False])
def test_lengths_and_numbers_of_choices_do_not_recompile(monkeypatch, by_token):
    """Of choices that double, from four on, three small kernels keep as many, and are compiled for that."""
    calls = {(module, name): [] for module, names in KERNELS.items() for name in names}
    programs = {(module, name): programs_of(getattr(module, name), module.LENGTHS) for module, name in calls}
    for (module, name), kept in calls.items():
        monkeypatch.setattr(module, name, Kernel(kept))
    monkeypatch.setattr(block_sparse, "runs_fused", lambda x: True)
    lengths = 129, 500, 512, 1000, 1024, 1111, 2000, 2048, 4097, 6000
    for length, turns in zip(lengths, (1, 2, 3, 4, 1, 2, 3, 4, 8, 16), strict=True):
        config = BlockSparseConfig(layers=((MIXED, BlockParts(local_blocks=40, topk_blocks=turns)),))
        query, key, value = (
            torch.zeros((1, length, heads, 16) if by_token else (1, heads, length, 16), dtype=torch.bfloat16)
            for heads in (4, 2, 2)
        )
        tensors = [(x.transpose(1, 2) if by_token else x).requires_grad_() for x in (query, key, value)]
        output = block_sparse_attention(*tensors, config)
        torch.autograd.grad(output, tensors, torch.zeros_like(output))
    for key, kept in calls.items():
        assert len(kept) > 1
        programs_of_it = {programs[key](*call) for call in kept}
        several = {"_list_kernel": 2, "_choose_kernel": 3, "_merge_kernel": 3, "_add_queries_kernel": 3}
        assert len(programs_of_it) == several.get(key[1], 1), key[1]
