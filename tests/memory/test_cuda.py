"""The pool of a CUDA device: the same numbers, its own segments, and what graphs capture stays."""

from contextlib import contextmanager

import pytest
import torch

from hf_dilated import DilatedConfig, dilated_attention
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.memory.buffers import manager_of, shared_cuda_pool
from hf_dilated.memory.persistent import PersistentBuffers
from hf_dilated.memory.pool.cuda import CudaPool

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PATTERN = DilatedConfig(segment_lengths=(128, 256, 512), dilation_rates=(1, 2, 8))


def attend(memory: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    output = dilated_attention(q, k, v, PATTERN, memory=memory)
    output.float().square().sum().backward()
    return [output.detach(), q.grad, k.grad, v.grad]


def test_off_by_default() -> None:
    assert not auto_configure_memory_pool(1 << 20).cuda


@pytest.mark.parametrize(("count", "is_pooled"), [(99, False), (100, True)])
def test_small_tensors_are_torchs_own(count: int, is_pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = []

    @contextmanager
    def use_mem_pool(*_):
        pooled.append(True)
        yield

    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pool = CudaPool(torch.device("cpu"), smallest=400)
    assert pool.empty((count,), torch.float32).shape == (count,)
    assert pooled == [True] * is_pooled
    assert pool._kinds.keys() == {"temp"} if is_pooled else not pool._kinds


def test_the_current_device_needs_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    pool = shared_cuda_pool(torch.device("cuda"), smallest=7)
    assert pool.device == torch.device("cuda", 1)
    assert pool is shared_cuda_pool(torch.device("cuda:1"), smallest=7)


@needs_cuda
def test_small_tensors_need_no_segment_of_ours() -> None:
    pool = CudaPool(torch.device("cuda", 0), smallest=1 << 20)
    kept = pool.empty((100,), torch.float32)
    assert pool.stats()["bytes_live"] == 0
    large = pool.empty((1 << 18,), torch.float32)
    assert pool.stats()["bytes_live"] >= large.nbytes > kept.nbytes


@needs_cuda
def test_the_same_to_the_bit() -> None:
    torch.use_deterministic_algorithms(True)
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


@needs_cuda
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
