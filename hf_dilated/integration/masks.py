"""The mask function: not a mask, but where every key slot stands in its document.

It returns (B, 1, 1, M) integers: the position ``p`` of the token in each key slot, -1 for padding, -2 for a slot that
is not written yet; the queries are the last N written slots. Where every slot holds a token of one document and the
queries are the last N, the numbers are all 0 and mean nothing. The dtype tells these two apart, and causal masks from
bidirectional ones: it is known while ``torch.compile`` traces. Transformers calls the function once a forward and kind
of layer, and all such layers share the result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils

from hf_dilated.integration.kept import tell
from hf_dilated.integration.remembered import Remembered
from hf_dilated.integration.support import UnsupportedError, check_model

PADDING, NOT_WRITTEN = -1, -2
MaskFunction = Callable[..., Any]
# Arguments that only choose between forms of a dense mask.
BIDIRECTIONAL_OPTION = "allow_is_bidirectional_skip"  # of the builders of bidirectional masks, of no others
DENSE_ONLY = frozenset({"dtype", "allow_is_causal_skip", BIDIRECTIONAL_OPTION, "allow_torch_fix"})


class Form(NamedTuple):
    """What the dtype of a mask says."""

    is_causal: bool
    has_positions: bool


FORMS = {
    torch.int64: Form(is_causal=True, has_positions=True),
    torch.int32: Form(is_causal=False, has_positions=True),
    torch.int16: Form(is_causal=True, has_positions=False),
    torch.int8: Form(is_causal=False, has_positions=False),
}
DTYPES = {form: dtype for dtype, form in FORMS.items()}


class Meaning(NamedTuple):
    """What a mask function of Transformers allows."""

    is_causal: bool
    is_windowed: bool
    is_packed: bool


_masks: Remembered[Tensor] = Remembered()


def position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    config: Any,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """Say where every key slot stands; registered with Transformers as the mask function of the backends.

    Args:
        q_offset: Tokens before the first query; a tensor if it is kept on the device, as static caches do.
        kv_offset: Tokens before the first key slot, for caches that keep a window.
        mask_function: Causal, bidirectional, sliding-window and packed ones are understood.
        attention_mask: (B, L) bool, True for real tokens; slots beyond L are padding.
        config: Configuration of the model that asks.

    Returns:
        Positions (B, 1, 1, M) in a dtype of :data:`FORMS`, on ``device``; the same tensor for all kinds of layers
        that share a padding mask. While ``torch.compile`` traces they are on the CPU for several queries, because the
        engine plans there. Whole documents without padding: zeros (1, 1, 1, M) that take no memory.

    Raises:
        UnsupportedError: If the model bypasses the backend, or the mask means something else.
    """
    check_model(config)
    for name, value in options.items():
        if name not in DENSE_ONLY and value is not None:
            raise UnsupportedError(f"{name}={value!r}: the mask function does not know this argument of Transformers")
    tracing = torch.compiler.is_compiling()
    if tracing:
        may_be_packed = attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
        is_causal = BIDIRECTIONAL_OPTION not in options
        meaning = _meaning_while_tracing(mask_function, config, local_size, use_vmap, is_causal, may_be_packed)
    else:
        meaning = _meaning(mask_function)
    _check_shape(meaning, attention_mask, q_length, kv_length, kv_offset)
    if attention_mask is None and not meaning.is_packed and isinstance(q_offset, int):
        if kv_offset + kv_length == q_offset + q_length:
            tell(kv_length, None)
            return _whole(meaning, kv_length)
        device = device if q_length == 1 else "cpu"  # nothing has to be fetched
    form = DTYPES[Form(meaning.is_causal, has_positions=True)]

    def build() -> Tensor:
        if meaning.is_packed:
            position = _packed_positions(mask_function, batch_size, q_length, device)
        else:
            position = _positions(attention_mask, batch_size, kv_length, q_offset + q_length, kv_offset, device)
        return position[:, None, None, :].to(form)

    if tracing:
        return build().cpu() if q_length > 1 else build()
    if meaning.is_packed:
        return build()
    tensors = [x for x in (attention_mask, q_offset) if isinstance(x, Tensor)]
    end = None if isinstance(q_offset, Tensor) else q_offset + q_length
    mask = _masks.get(tensors, (batch_size, q_length, kv_length, end, kv_offset, str(device), form), build)
    tell(kv_length, mask[:, 0, 0])
    return mask


def _whole(meaning: Meaning, kv_length: int) -> Tensor:
    dtype = DTYPES[Form(meaning.is_causal, has_positions=False)]
    return torch.zeros((), dtype=dtype).expand(1, 1, 1, kv_length)


def _positions(
    attention_mask: Tensor | None,
    batch_size: int,
    kv_length: int,
    end: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Tensor:
    """Number the real tokens of every row; ``end`` is the number of tokens written so far."""
    slot = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    written = (slot < end).expand(batch_size, -1)
    if attention_mask is None:
        return torch.where(written, slot - kv_offset, NOT_WRITTEN)
    missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
    mask = pad(attention_mask, (0, missing), value=False)[:, kv_offset : kv_offset + kv_length]
    position = torch.where(mask, mask.long().cumsum(-1) - 1, PADDING)
    return torch.where(written, position, NOT_WRITTEN)


def _packed_positions(mask_function: MaskFunction, batch_size: int, length: int, device: torch.device | str) -> Tensor:
    """Number the tokens of every document; a document starts at a token that does not see the one before it."""
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(length, device=device)[None, :]
    goes_on = mask_function(row, 0, token, (token - 1).clamp(min=0)) & (token > 0)
    start = torch.where(goes_on, 0, token).cummax(-1).values
    return (token - start).expand(batch_size, -1)


def _check_shape(
    meaning: Meaning, attention_mask: Tensor | None, q_length: int, kv_length: int, kv_offset: int
) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: pass the padding mask (batch, tokens)"
        )
    if not meaning.is_causal and kv_length != q_length:
        raise UnsupportedError(
            f"bidirectional attention of {q_length} queries to {kv_length} keys: cross-attention, caches and prefix "
            'tuning of encoders are not supported. Use attn_implementation="sdpa"'
        )
    if kv_offset and not meaning.is_windowed:
        raise UnsupportedError(
            f"the cache has dropped {kv_offset} tokens of a layer that has no window; use a cache that keeps all"
        )


def _code(function: MaskFunction | None) -> Any:
    return getattr(function, "__code__", None)


def _overlays() -> dict[Any, str]:
    """Code of the closures that Transformers builds its masks from."""
    nothing = torch.zeros(1, 1, dtype=torch.long)
    causal = masking_utils.causal_mask_function
    overlays = {
        _code(masking_utils.sliding_window_overlay(1)): "window",
        _code(masking_utils.sliding_window_bidirectional_overlay(1)): "window on both sides",
        _code(masking_utils.packed_sequence_mask_function(nothing)): "packed",
        BOTH: "both",
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # since Transformers 5.23
        overlays[_code(masking_utils.remap_positions_for_packed_sequence(causal, nothing))] = "renumbered"
    return overlays


BOTH = _code(masking_utils.and_masks(masking_utils.causal_mask_function))
OVERLAYS = _overlays()
PLAIN = {masking_utils.causal_mask_function: "causal", masking_utils.bidirectional_mask_function: "bidirectional"}
UNDERSTOOD = {
    frozenset(words)
    for words in (("causal",), ("causal", "window"), ("bidirectional",), ("bidirectional", "window on both sides"))
}


def _meaning(function: MaskFunction) -> Meaning:
    """Read a mask function by its structure."""
    words = _words(function)
    base = words - {"packed"}
    if base not in UNDERSTOOD:
        raise _not_understood(function)
    return Meaning("causal" in base, len(base) == 2, "packed" in words)


def _words(function: MaskFunction) -> frozenset[str]:
    if function in PLAIN:
        return frozenset({PLAIN[function]})
    word = OVERLAYS.get(_code(function), "unknown")
    if word == "both":
        return frozenset().union(*map(_words, _captured(function)["mask_functions"]))
    if word == "renumbered":
        return _words(_captured(function)["mask_function"])
    return frozenset({word})


def _meaning_while_tracing(
    function: MaskFunction, config: Any, local_size: int | None, use_vmap: bool, is_causal: bool, may_be_packed: bool
) -> Meaning:
    """The same while ``torch.compile`` traces, where a closure cannot be looked into.

    Transformers then always takes position ids for possible documents, so every union may be a packed one; its
    arguments say whether somebody has added a mask function and whether the union is causal, and a window and chunks
    exclude each other.
    """
    if function is masking_utils.causal_mask_function or function is masking_utils.bidirectional_mask_function:
        return Meaning(function is masking_utils.causal_mask_function, is_windowed=False, is_packed=False)
    is_chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    if use_vmap or is_chunked or _code(function) is not BOTH:
        raise _not_understood(function)
    return Meaning(is_causal=is_causal, is_windowed=local_size is not None, is_packed=may_be_packed)


def _captured(function: MaskFunction) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _not_understood(function: MaskFunction) -> UnsupportedError:
    name = getattr(function, "__qualname__", "an object")
    return UnsupportedError(
        f"the model masks with {name} of {getattr(function, '__module__', 'unknown origin')}; understood are causal, "
        "bidirectional, sliding-window and packed masks without additions (image blocks, chunks and custom mask "
        'functions are not). Use attn_implementation="sdpa" for this model or input'
    )
