"""Under ``torch.use_deterministic_algorithms(True)`` two runs give the same bits, and nothing refuses to run."""

import pytest
import torch
from torch import Tensor

from hf_dilated import BlockSparseConfig, DilatedConfig, block_sparse_attention, dilated_attention

PATTERNS = {
    "dilated": DilatedConfig(segment_lengths=(128, 512, 1024), dilation_rates=(1, 2, 8), sink_tokens=2),
    "count": DilatedConfig(segment_lengths=(128, 512, 1024), dilation_rates=(1, 2, 8), overlap="count"),
    "blocks": BlockSparseConfig(block_size=64, local_blocks=2, global_blocks=1, random_blocks=2),
    "chosen blocks": BlockSparseConfig(block_size=64, local_blocks=1, topk_blocks=2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PATTERNS)
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    pattern = PATTERNS[name]
    attend = dilated_attention if isinstance(pattern, DilatedConfig) else block_sparse_attention
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = [torch.randn(2, h, 1500, 64, generator=generator, device="cpu") for h in (8, 2, 2, 8)]
    query, key, value, grad = (x.to(torch.get_default_device(), dtype).requires_grad_() for x in tensors)
    packed = torch.cat([torch.arange(n) for n in (700, 800)]).expand(2, -1)

    def run() -> list[Tensor]:
        output = attend(query, key, value, pattern, position_ids=packed)
        return [output.detach(), *torch.autograd.grad(output, (query, key, value), grad)]

    for first, second in zip(run(), run(), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)
