"""The attention function that Transformers calls in every layer."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_dilated.config import DilatedConfig
from hf_dilated.integration.attributes import attribute, text_part
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.documents import check_gaps, shared_positions
from hf_dilated.integration.kept import attend_kept, kept_keys
from hf_dilated.integration.layers import module_pattern
from hf_dilated.integration.masks import FORMS
from hf_dilated.integration.memory import module_memory
from hf_dilated.integration.packing import BOUNDARIES, WITHOUT_CHECK, check_boundaries
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patterns import DensePattern, DilatedPattern, Pattern

AttentionFunction = Callable[..., tuple[Tensor, None]]

# Arguments that pass through a model's layers and mean nothing to attention.
WITHOUT_MEANING = frozenset(
    {
        *BOUNDARIES,  # checked against the positions
        *WITHOUT_CHECK,
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
REASONS = {
    "cache": "continuous batching keeps keys in pages; use generate()",
    "position_bias": "a bias for every pair of tokens is dense attention",
    "output_attentions": "attention weights are never computed",
}


@functools.cache
def attention_function(backend: str) -> AttentionFunction:
    """Return the function that Transformers calls for a backend: :func:`attention_forward` of that backend."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return attention_forward(module, query, key, value, attention_mask, backend=backend, **options)

    return forward


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend with the pattern of the module's layer.

    Args:
        module: The attention module; its ``config`` holds the pattern, its ``layer_idx`` tells the layer.
        query: (B, H, N, D).
        key: (B, G, M, D); query head h reads head ``h // (H / G)``.
        value: (B, G, M, Dv).
        attention_mask: What :func:`hf_dilated.integration.masks.position_mask` returned; it decides about causality,
            as the masks of every other backend do. None if the model asks for no mask.
        backend: A name of :data:`hf_dilated.integration.backends.BACKENDS`.
        is_causal: Without a mask; None takes the module's own.
        sliding_window: The layer's window; the layer stays dense within it.
        s_aux: (H,) learned sink logits.

    Returns:
        Output (B, N, H, Dv), and None for the attention weights.

    Raises:
        UnsupportedError: For every argument that cannot be honoured exactly.
    """
    _check_options(module, dropout, softcap, options)
    is_causal = causality(module, attention_mask, is_causal)
    if (kept := kept_keys(key, value)) is not None:
        are_whole = _are_whole(query, attention_mask, options.get("position_ids"))
        pattern = module_pattern(module, sliding_window, backend)
        (query,), kept = _autocast(query), kept.each(_autocast)
        memory = module_memory(module) if query.shape[2] > 1 else ""  # one query allocates nothing large
        result = attend_kept(query, kept, pattern, are_whole=are_whole, scale=scaling, sink_logits=s_aux, memory=memory)
        return result.transpose(1, 2).contiguous(), None
    _check_lengths(module, query, key, attention_mask, is_causal)
    key_positions = _key_positions(query, key.shape[2], attention_mask, options.get("position_ids"))
    check_boundaries(options, key_positions, key.shape[0], key.shape[2])
    if sliding_window is not None and query.shape[2] > 1 and key_positions is not None:
        check_gaps(key_positions)
    pattern = module_pattern(module, sliding_window, backend)
    _check_heads(module, query.shape[1], pattern)
    _warn_if_long(pattern, key.shape[2], key_positions)
    query, key, value = _autocast(query, key, value)
    output = BACKENDS[backend].attend(
        query,
        key,
        value,
        pattern,
        is_causal=is_causal,
        scale=scaling,
        key_positions=key_positions,
        sink_logits=s_aux,
        memory=module_memory(module),
    )
    assert isinstance(output, Tensor)  # the log-sum-exp was not asked for
    return output.transpose(1, 2).contiguous(), None


def causality(module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None) -> bool:
    """Whether tokens see only earlier ones; arguments as in :func:`attention_forward`.

    Raises:
        UnsupportedError: If the mask is not one of :func:`hf_dilated.integration.masks.position_mask`.
    """
    if attention_mask is not None:
        if attention_mask.ndim != 4 or attention_mask.shape[1:3] != (1, 1) or attention_mask.dtype not in FORMS:
            raise UnsupportedError(
                f"attention_mask is a {attention_mask.dtype} tensor of shape {tuple(attention_mask.shape)}: a mask for "
                "pairs of tokens is dense attention. Pass the padding mask (batch, tokens), or documents as "
                "position_ids"
            )
        return FORMS[attention_mask.dtype].is_causal
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def _check_options(module: nn.Module, dropout: float, softcap: float | None, options: dict[str, Any]) -> None:
    if dropout and module.training:
        raise UnsupportedError(
            f"dropout={dropout}: attention dropout is not supported; set config.attention_dropout (or "
            "attention_probs_dropout_prob, attn_pdrop) to 0.0, other dropout may stay"
        )
    if softcap is not None:
        raise UnsupportedError(
            f"softcap={softcap}: capped attention logits are not supported; set config.attn_logit_softcapping=None "
            'if the model bears it, or use attn_implementation="eager"'
        )
    for name, value in options.items():
        if name not in WITHOUT_MEANING and value is not None and value is not False:
            reason = REASONS.get(name, "the backend does not know this argument")
            raise UnsupportedError(f'{name}: {reason}. Use attn_implementation="sdpa" or "eager" for this model')


def _check_lengths(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> None:
    B, N, M = query.shape[0], query.shape[2], key.shape[2]
    config = module.config
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    if crosses or (N != M and not is_causal) or N > M:
        raise UnsupportedError(
            f"{type(module).__name__} attends with {N} queries to {M} keys of another sequence: cross-attention and "
            'prefix tuning of encoders are not supported. Use attn_implementation="sdpa"'
        )
    if attention_mask is None:
        return
    if attention_mask.shape[3] != M or attention_mask.shape[0] not in (1, B):
        raise UnsupportedError(
            f"attention_mask covers {attention_mask.shape[0]} rows of {attention_mask.shape[3]} keys, but "
            f"{type(module).__name__} has {B} of {M}; something has changed the keys behind the mask"
        )


def _check_heads(module: nn.Module, heads: int, pattern: Pattern) -> None:
    """Refuse a part of a layer's heads: a pattern tells them apart by their number."""
    if isinstance(pattern, DensePattern) or heads == attribute(text_part(module.config), "num_attention_heads"):
        return
    if any(isinstance(weight, DTensor) for weight in module.parameters()):
        raise UnsupportedError(
            f"tp_plan: under tensor parallelism {type(module).__name__} has {heads} of its heads, and a pattern tells "
            'heads apart by their number. Use data parallelism or FSDP, or share sequences with "ring_dilated" or '
            '"ring_block_sparse"'
        )


def _key_positions(query: Tensor, keys: int, attention_mask: Tensor | None, position_ids: Any) -> Tensor | None:
    B, N = query.shape[0], query.shape[2]
    if not isinstance(position_ids, Tensor) or position_ids.shape not in ((B, N), (1, N)):
        position_ids = None  # of images and sound: they number no tokens
    if attention_mask is not None and not FORMS[attention_mask.dtype].has_positions:
        attention_mask = None
    return shared_positions(attention_mask, position_ids, B, N, keys)


def _are_whole(query: Tensor, attention_mask: Tensor | None, position_ids: Any) -> bool:
    """Whether rows are documents without padding: all that a cache knows of documents is the padding mask."""
    if query.shape[2] == 1:
        return False  # not asked for
    assert attention_mask is not None  # it has told the cache of the tokens
    keys = attention_mask.shape[3]
    told, found = (_key_positions(query, keys, attention_mask, ids) for ids in (None, position_ids))
    are_same = told is found if told is None or found is None else torch.equal(told, found)
    if not are_same:
        raise UnsupportedError("position_ids: documents packed into a row do not go with a cache that drops keys")
    return found is None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor for tensor in tensors)


def _warn_if_long(pattern: Pattern, slots: int, key_positions: Tensor | None) -> None:
    if torch.compiler.is_compiling() or not isinstance(pattern, DilatedPattern):
        return
    longest = pattern.config.sink_tokens + pattern.config.segment_lengths[-1]
    if slots <= longest or (key_positions is not None and key_positions.device.type != "cpu"):
        return
    if key_positions is None or int(key_positions.max()) >= longest:
        _warn_of_length(pattern.config)


@functools.cache
def _warn_of_length(config: DilatedConfig) -> None:
    """Warn once for every pattern."""
    warnings.warn(
        f"the input is longer than the longest segment, {config.segment_lengths[-1]} tokens: tokens further apart than "
        "that never see each other. Choose the pattern with DilatedConfig.from_model_config(config, max_length=…)",
        stacklevel=2,
    )
