"""Block-sparse attention on FlashAttention 4 (the package flash-attn-4), for whole rows of blocks of 128 tokens."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_dilated.config import BlockParts
from hf_dilated.engine.kernels import FLASH_ATTENTION_4, Case
from hf_dilated.engine.kernels.flash_attention_4 import flash_attention_4
from hf_dilated.patterns import BlockSparsePattern
from hf_dilated.patterns.documents import Documents

BLOCK = 128  # the tile of its kernels for heads of up to 128 numbers
LARGEST_HEAD = 128
LIST_BYTES = 1 << 29  # of lists that differ between heads, in each direction


class Lists(NamedTuple):
    """Blocks that see each other, as its kernels and ours read them, in 32-bit integers.

    Counts (1, h, L) and indices (1, h, L, most): for h groups of heads, of L blocks. ``edge`` are seen through a mask,
    at most one each, and ``whole`` without one.
    """

    edge_count: Tensor
    edge: Tensor
    whole_count: Tensor
    whole: Tensor


def refuses(
    pattern: BlockSparsePattern, documents: Documents, is_causal: bool, query: Tensor, value: Tensor
) -> str | None:
    """Return why a call cannot run, or None if it can."""
    case = Case.of(query, value)
    if reason := FLASH_ATTENTION_4.refuses(case):
        return reason
    if case.device == "cuda" and case.capability[0] != 9:
        return "its tiles of blocks are known for compute capability 9 (Hopper) only"
    if torch.are_deterministic_algorithms_enabled():
        return "adds up gradients in no fixed order"
    if max(case.head_size, case.value_size) > LARGEST_HEAD:
        return f"needs head sizes up to {LARGEST_HEAD}, got {max(case.head_size, case.value_size)}"
    if pattern.config.block_size != BLOCK:
        return f"needs blocks of {BLOCK} tokens, got {pattern.config.block_size}"
    if not documents.are_whole_rows or documents.queries != documents.keys:
        return "needs whole documents, one a row"
    if not is_causal and documents.keys % BLOCK:
        return "needs whole blocks where attention is not causal"
    parts = pattern.config.parts(pattern.layer)
    if not all(own.local_blocks for own in parts):
        return "needs every token to see itself"
    if len(parts) > 1 and 4 * query.shape[1] * _most_pairs(parts, documents.keys // BLOCK) > LIST_BYTES:
        return f"needs lists for each head where heads differ, of more than {LIST_BYTES >> 20} MiB"
    return None


def _most_pairs(parts: tuple[BlockParts, ...], blocks: int) -> int:
    """Pairs of blocks that a list holds at most: each is as long as the longest."""
    widest = [
        own.local_blocks + own.dilated_blocks
        if own == BlockParts(local_blocks=own.local_blocks, dilated_blocks=own.dilated_blocks)
        else blocks
        for own in parts
    ]
    return blocks * min(blocks, max(widest))


def forward(lists: Lists, is_causal: bool, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: output (B, H, N, Dv), stored token by token, and LSE (B, H, N) in float32."""
    interface: Any = flash_attention_4()
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    output, lse, *_ = interface._flash_attn_fwd(
        *tensors, softmax_scale=scale, mask_mod=_mask(is_causal), block_sparse_tensors=_sparsity(lists), return_lse=True
    )
    return output.transpose(1, 2), lse


def backward(
    lists: Lists, is_causal: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`forward`; ``lists`` say which blocks of queries see a block of keys."""
    interface: Any = flash_attention_4()
    q, k, v, output, grad = (x.transpose(1, 2) for x in (q, k, v, output, grad))
    grads = interface._flash_attn_bwd(
        q, k, v, output, grad, lse.contiguous(),
        softmax_scale=scale, mask_mod=_mask(is_causal), block_sparse_tensors=_sparsity(lists),
    )  # fmt: skip
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads[:3])
    return grad_q, grad_k, grad_v


def _sparsity(lists: Lists) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(*lists, block_size=(BLOCK, BLOCK))


@cache
def _mask(is_causal: bool) -> Any:
    """The mask of edges, in the language of its kernels."""
    if not is_causal:
        return None
    import cutlass.cute as cute

    @cute.jit  # type: ignore[untyped-decorator, unused-ignore]
    def causal(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def]
        return key <= query

    return causal
