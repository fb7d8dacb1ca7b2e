"""Attention functions on tensors, for models that do not come from Transformers."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from hf_dilated.config import BlockSparseConfig, DilatedConfig
from hf_dilated.config.checks import instance
from hf_dilated.engine import op
from hf_dilated.patterns import BlockSparsePattern, DilatedPattern, Pattern

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: DilatedConfig,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
    layer: int = 0,
    return_lse: bool = False,
    memory: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention (LongNet, arXiv:2307.02486) along the branches of a configuration.

    The queries are the last N written of the M key slots. A row without any key has output 0 and LSE -inf.

    Args:
        query: (B, H, N, D), float64, float32, bfloat16 or float16.
        key: (B, G, M, D), G a divisor of H: grouped heads are not repeated.
        value: (B, G, M, Dv).
        config: Segment lengths, dilation rates and options. Its ``dense_layers`` belong to a model; here the
            pattern always runs.
        is_causal: Whether tokens see only earlier ones.
        scale: Factor of the scores; ``1 / sqrt(D)`` by default.
        attention_mask: (B, M) bool, True for real tokens.
        position_ids: (B, N) or (B, M) integers. A document starts at a real token whose entry is not its
            predecessor's plus one; the values mean nothing else.
        key_positions: (B, M) integers, each slot's index within its document, -1 for padding, -2 for slots
            not written yet, the last ones of their row. Replaces ``attention_mask`` and ``position_ids``.
        layer: Ordinal among the layers that run the pattern; ``phase`` and ``rotate`` depend on it.
        return_lse: Also return the log-sum-exp, which is not differentiable.
        memory: Where large tensors come from: the ``spec`` of a :class:`hf_dilated.MemoryPolicy`; by default torch.

    Returns:
        Output (B, H, N, Dv) and, if asked for, LSE (B, H, N) in float32 (float64 for float64 input).

    Raises:
        ValueError: If shapes do not fit together; a ``ConfigError`` if the configuration is of another kind.
        TypeError: If dtypes do not.

    Example:
        >>> query, key, value = (torch.randn(1, 8, 100, 32) for _ in range(3))
        >>> pattern = DilatedConfig(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
        >>> dilated_attention(query, key, value, pattern).shape
        torch.Size([1, 8, 100, 32])
    """
    instance("config", config, DilatedConfig)
    positions = known_positions(query, key, attention_mask, position_ids, key_positions)
    return attend(
        query, key, value, DilatedPattern(config=config, layer=layer),
        is_causal=is_causal, scale=scale, key_positions=positions, return_lse=return_lse, memory=memory,
    )  # fmt: skip


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: BlockSparseConfig,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
    layer: int = 0,
    return_lse: bool = False,
    memory: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Block-sparse attention: one softmax over the blocks that the parts of a configuration show.

    Arguments, result and errors are those of :func:`dilated_attention`.

    Args:
        config: Parts, block size and options. Its ``dense_layers`` belong to a model; here the pattern always runs.

    Example:
        >>> query, key, value = (torch.randn(1, 8, 1000, 32) for _ in range(3))
        >>> pattern = BlockSparseConfig(block_size=64, local_blocks=2, global_blocks=1, stride_blocks=8)
        >>> block_sparse_attention(query, key, value, pattern).shape
        torch.Size([1, 8, 1000, 32])
    """
    instance("config", config, BlockSparseConfig)
    positions = known_positions(query, key, attention_mask, position_ids, key_positions)
    return attend(
        query, key, value, BlockSparsePattern(config=config, layer=layer),
        is_causal=is_causal, scale=scale, key_positions=positions, return_lse=return_lse, memory=memory,
    )  # fmt: skip


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    key_positions: Tensor | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    memory: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention along any pattern; arguments as in :func:`dilated_attention`.

    Args:
        pattern: Who attends to whom.
        sink_logits: (H,) learned logits that take part in every softmax of their head without a value.

    Example:
        >>> from hf_dilated.patterns import DensePattern
        >>> query, key, value = (torch.randn(1, 8, 100, 32) for _ in range(3))
        >>> attend(query, key, value, DensePattern(window=16)).shape
        torch.Size([1, 8, 100, 32])
    """
    check_inputs(query, key, value, key_positions, sink_logits)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    inputs = (query, key, value) if sink_logits is None else (query, key, value, sink_logits)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    plain = key_positions is None and sink_logits is None and not return_lse
    if plain and not torch.compiler.is_compiling() and _is_stock(query, key, pattern, is_causal, needs_gradient):
        pattern.check(query.shape[1], is_causal)
        square, grouped = query.shape[2] == key.shape[2], query.shape[1] != key.shape[1]
        with op.running(query):
            return scaled_dot_product_attention(
                query, key, value, is_causal=is_causal and square, scale=scale, enable_gqa=grouped
            )
    if query.shape[2] == 1 and is_causal and query.device.type != "cpu" and not needs_gradient:
        one = query, key, value, key_positions, sink_logits
        if torch.compiler.is_compiling() or type(query) is not Tensor or not query.is_cuda:
            output, lse = op.decode(*one, pattern.spec, scale)
        else:
            output, lse = op.decode_now(*one, pattern, scale)
        return (output, lse) if return_lse else output
    output, lse = op.attend(query, key, value, key_positions, sink_logits, pattern.spec, is_causal, scale, memory)
    return (output, lse.detach()) if return_lse else output


def _is_stock(query: Tensor, key: Tensor, pattern: Pattern, is_causal: bool, needs_gradient: bool) -> bool:
    """Whether torch's own attention does the same as well: one dense document, whole or its last token.

    Not its last token on a GPU, if we can help it: there torch may take cuDNN, which plans anew for every length.
    """
    N, M = query.shape[2], key.shape[2]
    if query.is_cuda and query.dtype == torch.float32 and query.shape[1] != key.shape[1]:
        return False  # grouped heads in float32 would run on the kernel that keeps all scores
    return pattern.is_dense(M) and (N == M or (N == 1 and is_causal and (needs_gradient or not query.is_cuda)))


def known_positions(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    key_positions: Tensor | None = None,
) -> Tensor | None:
    """Return the ``key_positions`` that :func:`attend` takes; arguments as in :func:`dilated_attention`."""
    if key_positions is not None:
        if attention_mask is not None or position_ids is not None:
            raise ValueError(
                "key_positions: already say what attention_mask and position_ids do; pass one or the others"
            )
        return key_positions
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise TypeError(f"attention_mask: expected bool, True for real tokens, got {attention_mask.dtype}")
    return token_positions(query.shape[0], query.shape[2], key.shape[2], attention_mask, position_ids)


def token_positions(
    B: int, N: int, M: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Number the real tokens of every document from 0, padding -1: (B, M), or None if there is nothing to say.

    Args:
        B: Rows.
        N: Queries, the last of the key slots.
        M: Key slots.
        attention_mask: (B, M), True or 1 for real tokens.
        position_ids: (B, N) or (B, M) integers.
    """
    if attention_mask is None and position_ids is None:
        return None
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    if attention_mask is None:
        real = torch.ones(B, M, dtype=torch.bool, device=given.device)
    else:
        if attention_mask.shape != (B, M):
            raise ValueError(f"attention_mask: expected ({B}, {M}), got {_size(attention_mask)}")
        real = attention_mask.bool()
    starts = torch.zeros_like(real)
    if position_ids is not None:
        if position_ids.shape not in ((B, N), (B, M)):
            raise ValueError(f"position_ids: expected ({B}, {N}) or ({B}, {M}), got {_size(position_ids)}")
        if position_ids.dtype not in INTEGERS:
            raise TypeError(f"position_ids: expected integers, got {position_ids.dtype}")
        jumps = (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(real.device)
        starts = pad(jumps, (M - jumps.shape[1], 0), value=False) & real
    count = real.long().cumsum(1) - 1
    start_count = torch.where(starts, count, 0).cummax(1).values
    return torch.where(real, count - start_count, -1)


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, key_positions: Tensor | None, sink_logits: Tensor | None
) -> None:
    """Refuse tensors that do not fit together; arguments as in :func:`attend`."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected (batch, heads, tokens, head size), got {_size(x)}")
        if x.dtype != query.dtype or not x.is_floating_point():
            raise TypeError(f"{name}: expected the same floating dtype as the query, got {x.dtype} and {query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}: is on {x.device}, the query on {query.device}")
    (B, H, N, D), (G, M) = query.shape, key.shape[1:3]
    if H == 0 or D == 0:
        raise ValueError(f"query: expected at least one head, and a head size of at least 1, got {_size(query)}")
    if key.shape[0] != B or key.shape[3] != D:
        raise ValueError(f"key: {_size(key)} does not fit the query {_size(query)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: {_size(value)} does not fit the key {_size(key)}")
    if G == 0 or H % G:
        raise ValueError(f"key: {G} key-value heads do not divide {H} query heads")
    if N > M:
        raise ValueError(f"query: {N} queries, but only {M} keys; the queries are the last of the key slots")
    if key_positions is not None:
        if key_positions.shape != (B, M):
            raise ValueError(f"key_positions: expected ({B}, {M}), got {_size(key_positions)}")
        if key_positions.dtype not in INTEGERS:
            raise TypeError(f"key_positions: expected integers, got {key_positions.dtype}")
    if sink_logits is not None and sink_logits.shape != (H,):
        raise ValueError(f"sink_logits: expected ({H},), got {_size(sink_logits)}")


def _size(x: Tensor) -> str:
    return str(tuple(x.shape))
