"""The backends ``ring``, ``ring_dilated`` and ``ring_block_sparse`` inside Transformers' models, and generation."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_dilated.config import RingConfig
from hf_dilated.distributed.agreement import DisagreementError
from hf_dilated.distributed.cached import CachedSequence, chosen_logits, last_slots
from hf_dilated.distributed.ring import ring_attention
from hf_dilated.distributed.session import SequenceParallel, active
from hf_dilated.functional import attend as attend_here
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patterns import Pattern

NOT_SHARDED = "sharded over ranks, generate() supports one token a step: leave out {}"


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
    memory: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend across the ranks of the open ``sequence_parallel``; without one, in this process alone.

    Arguments as in :func:`hf_dilated.functional.attend`; the layout of the batch tells the positions.

    Raises:
        UnsupportedError: If the input is not a shard of the batch that was sharded last.
    """
    session = active()
    if session is None:
        return attend_here(
            query, key, value, pattern,
            is_causal=is_causal, scale=scale, key_positions=key_positions, sink_logits=sink_logits,
            memory=memory,
        )  # fmt: skip
    if session.cached is not None and query.shape[2] < key.shape[2]:
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        return session.cached.attend(query, key, value, pattern, scale, sink_logits)
    layout = session.layout
    shapes = {(x.shape[0], x.shape[2]) for x in (query, key)}
    if layout is None or shapes != {(layout.rows, layout.slots)}:
        raise UnsupportedError(
            f"{query.shape[0]} rows of {query.shape[2]} tokens and {key.shape[2]} keys are no shard of the last batch: "
            "inside sequence_parallel a model reads what sp.shard(batch) returned, and generates with "
            "hf_dilated.ring_generate"
        )
    return ring_attention(
        query, key, value, layout,
        pattern=pattern, is_causal=is_causal, scale=scale, sink_logits=sink_logits, config=session.config,
        memory=memory,
    )  # fmt: skip


def ring_generate(
    model: PreTrainedModel, session: SequenceParallel, input_ids: Tensor, attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Run ``model.generate`` with the prompt, and its cache, spread over the ranks of a session.

    All ranks call this with the same arguments, and draw alike if they sample: set the same seed.

    Args:
        model: Runs a ``ring`` backend.
        session: From ``sequence_parallel``.
        input_ids: (B, N), the whole prompt.
        attention_mask: (B, N), 0 for padding.
        options: Of ``generate``; greedy decoding, sampling and beams, one token a step.

    Returns:
        What ``generate`` returns, the same on every rank.

    Raises:
        UnsupportedError: For ways of generating that read several tokens a step, or caches of another kind.
    """
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "cache_implementation"):
        if options.get(name) is not None:
            raise UnsupportedError(NOT_SHARDED.format(name))
    if options.get("past_key_values") is not None or options.get("use_cache") is False:
        raise UnsupportedError(NOT_SHARDED.format("past_key_values and use_cache=False"))
    with _sharded(model, session):
        return model.generate(
            input_ids, attention_mask=attention_mask, past_key_values=DynamicCache(), use_cache=True, **options
        )


@contextmanager
def _sharded(model: PreTrainedModel, session: SequenceParallel) -> Iterator[None]:
    """Let ``model`` read its shard of a prompt, and then one token after the other on all ranks."""
    original, backend = model.forward, model.config.get_text_config()._attn_implementation
    session.kind = "zigzag" if ring_settings(backend, session.config).layout == "zigzag" else "contiguous"

    @functools.wraps(original)
    def forward(input_ids: Tensor, **options: Any) -> Any:
        for name in ("cache_position", "position_ids", "logits_to_keep"):
            options.pop(name, None)
        mask = options.pop("attention_mask", None)
        if session.cached is None:
            return _read_prompt(original, session, input_ids, mask, options)
        return _read_token(original, session, input_ids[:, -1:], options)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        session.cached = None


def _read_prompt(
    forward: Any, session: SequenceParallel, input_ids: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Any:
    batch: dict[str, Tensor] = {"input_ids": input_ids}
    if mask is not None:
        batch |= {"attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    shard = session.shard(batch)
    layout = session.layout
    assert layout is not None
    kept = torch.tensor(last_slots(layout), device=input_ids.device)
    output = forward(**shard, **options, logits_to_keep=kept)
    session.cached = CachedSequence.of(session.wire, layout, input_ids.device)
    output.logits = chosen_logits(session.wire, layout, output.logits)[:, None]
    return output


def _read_token(forward: Any, session: SequenceParallel, token: Tensor, options: dict[str, Any]) -> Any:
    cached = session.cached
    assert cached is not None
    everywhere = session.wire.gather(token).wait()
    if not (everywhere == token).all():
        raise DisagreementError("the ranks have drawn different tokens: set the same seed on all of them")
    cached.append()
    return forward(input_ids=token, position_ids=cached.length[:, None] - 1, **options)


def ring_settings(backend: str, config: RingConfig) -> RingConfig:
    """Choose the layout that ``"auto"`` stands for: zigzag for dense attention, contiguous for patterns."""
    if config.layout != "auto":
        return config
    return RingConfig(**{**config.to_dict(), "layout": "zigzag" if backend == "ring" else "contiguous"})
