"""The pool of a CUDA device: the same numbers, its own segments, and what graphs capture stays."""

import pytest
import torch

from hf_dilated import DilatedConfig, dilated_attention
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.memory.buffers import manager_of
from hf_dilated.memory.persistent import PersistentBuffers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PATTERN = DilatedConfig(segment_lengths=(128, 256, 512), dilation_rates=(1, 2, 8))


def attend(memory: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    output = dilated_attention(q, k, v, PATTERN, memory=memory)
    output.float().square().sum().backward()
    return [output.detach(), q.grad, k.grad, v.grad]


def test_off_by_default() -> None:
    assert not auto_configure_memory_pool(1 << 20).cuda


def test_the_same_to_the_bit() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        spec = auto_configure_memory_pool(8192, cuda=True, smallest=1).spec
        for _ in range(3):
            for ours, right in zip(attend(spec), attend(""), strict=True):
                assert torch.equal(ours, right)
        stats = manager_of(spec).stats()["cuda:0"]
        assert stats["hits"] > 0
        assert stats["bytes_cached"] >= 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_graphs_workspace_stays() -> None:
    own, device = PersistentBuffers(), torch.device("cuda", 0)
    graph = torch.cuda.CUDAGraph()
    first = own.get("scores", (1024,), torch.float32, device)
    with torch.cuda.graph(graph):
        own.get("scores", (1024,), torch.float32, device).fill_(3)
    own.get("scores", (1 << 20,), torch.float32, device).zero_()
    first.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert (first == 3).all()
