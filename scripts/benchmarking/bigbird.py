"""Transformers' own BigBird attention, beside which the preset runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

from benchmarking.cases import Case

BLOCK = 64
RANDOM = 3


def bigbird_of_transformers(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the attention inside its module, without the projections, as it runs in evaluation.

    It is not compared with the oracle: it sees as many blocks a row as the preset of a window, two global blocks and
    three others, but the last block is global in place of the second, and in evaluation the three are always the same.
    """
    config = BigBirdConfig(
        hidden_size=case.heads * case.head_dim,
        num_attention_heads=case.heads,
        block_size=BLOCK,
        num_random_blocks=RANDOM,
        max_position_embeddings=case.length,
    )
    module: Any = BigBirdBlockSparseAttention(config, seed=0).eval()
    mask = torch.ones(case.batch, case.length, device=case.device)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(mask, BLOCK)
    sizes = (case.heads, RANDOM, case.head_dim, BLOCK, BLOCK, case.batch, case.length, case.length)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        masks = (x.to(query.dtype) for x in (band, rows, columns, blocked, blocked))
        output, _ = module.bigbird_block_sparse_attention(query, key, value, *masks, *sizes, 0, None, None)
        return output.reshape(case.batch, case.length, case.heads, -1).transpose(1, 2)

    return call
