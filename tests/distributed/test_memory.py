"""Two ranks get the same to the bit with and without a pool, however keys and values travel."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.config import RingConfig
from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.distributed.ring import ring_attention
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.memory.buffers import manager_of
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern
from tests.distributed.processes import run_on_ranks

PATTERNS = (
    DensePattern(),
    DilatedPattern(config=DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), sink_tokens=2)),
    BlockSparsePattern(config=BlockSparseConfig(block_size=8, local_blocks=2, global_blocks=1)),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRANSPORTS = ("gather", "exchange", "rows", "heads")
RANKS = 2


def compare(rank: int) -> list[str]:
    """Return the cases in which outputs or gradients differ, or no buffer came from a pool."""
    layout = SequenceLayout.of((2, 60), RANKS, attention_mask=torch.arange(60)[None] >= torch.tensor([[0], [9]]))
    wrong = []
    for number, (pattern, dtype) in enumerate(itertools.product(PATTERNS, DTYPES)):
        transport = TRANSPORTS[(number + number // len(DTYPES)) % len(TRANSPORTS)]  # each with other dtypes
        generator = torch.Generator().manual_seed(number)
        whole = [torch.randn(2, 60, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2)]
        spec = auto_configure_memory_pool(8192, "ring", mode=("full", "lightweight")[number % 2], smallest=1).spec
        found = []
        for memory in ("", spec):
            q, k, v = (layout.shard(x, rank).transpose(1, 2).requires_grad_() for x in whole)

            def run(*inputs: torch.Tensor, memory: str = memory) -> torch.Tensor:
                return ring_attention(
                    *inputs, layout, group=dist.group.WORLD, pattern=pattern, memory=memory,  # noqa: B023
                    config=RingConfig(transport=transport),  # noqa: B023
                )  # fmt: skip

            output = checkpoint(run, q, k, v, use_reentrant=False)
            output.square().sum().backward()
            found.append([output.detach(), q.grad, k.grad, v.grad])
        if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
            wrong.append(f"{pattern.spec} {dtype} {transport}: differs")
        if not manager_of(spec).stats()["cpu"]["types"]["comm"]["peak_bytes"]:
            wrong.append(f"{pattern.spec} {dtype} {transport}: nothing from the pool")
    return wrong


@pytest.mark.timeout(180)
def test_the_same_to_the_bit() -> None:
    for rank, wrong in enumerate(run_on_ranks(RANKS, compare)):
        assert wrong == [], f"rank {rank}"
