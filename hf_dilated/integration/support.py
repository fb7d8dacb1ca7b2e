"""Which models let their attention be replaced, and the error for everything that cannot be done exactly."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel


class UnsupportedError(ValueError):
    """Something that the backend cannot compute exactly; the message names it and the way out."""


_INTERFACE_USERS: set[type] = set()


def check_model(config: Any) -> None:
    """Refuse configurations whose models do not hand all of their attention to the backend.

    Raises:
        UnsupportedError: For encoder-decoders, cross-attention, models that choose the keys of each query by an
            indexer, and models that bypass the attention interface.
    """
    for option in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, option, False):
            raise UnsupportedError(
                f"{type(config).__name__} has {option}=True: cross-attention has no positions that a pattern could "
                'use. Load this model with attn_implementation="sdpa"'
            )
    if index_topk := getattr(config, "index_topk", None):
        raise UnsupportedError(
            f"{type(config).__name__} has index_topk={index_topk}: an indexer of the model chooses the keys of every "
            'query, so there is no place for a pattern. Load this model with attn_implementation="sdpa"'
        )
    if not uses_attention_interface(type(config)):
        raise UnsupportedError(
            f"the model of {type(config).__name__} computes its attention itself and would ignore this backend. "
            'Load it with attn_implementation="eager" or "sdpa"'
        )


@torch._dynamo.assume_constant_result
def uses_attention_interface(config_class: type) -> bool:
    """Whether the model classes of a configuration class call Transformers' attention interface.

    Models that do not (Bloom, CodeGen, XGLM, DeBERTa, MPNet, …) accept the name of any backend in silence.

    Example:
        >>> from transformers import BloomConfig, BloomModel, LlamaConfig, LlamaModel
        >>> uses_attention_interface(LlamaConfig), uses_attention_interface(BloomConfig)
        (True, False)
    """
    if config_class in _INTERFACE_USERS:
        return True
    name = _name(config_class)
    classes = [model for model in _model_classes(PreTrainedModel) if _name(model.config_class) == name]
    bases = [model for model in classes if PreTrainedModel in model.__bases__]
    if not classes:  # not loaded yet, or another family's: InternLM3 runs the model of Llama
        mapped = AutoModel._model_mapping.get(config_class, None)
        classes = [mapped] if isinstance(mapped, type) else []
    uses_it = any(model._can_set_attn_implementation() for model in bases or classes)
    if uses_it:
        _INTERFACE_USERS.add(config_class)
    return uses_it


def _name(config_class: type | None) -> Any:
    """What tells configuration classes apart.

    Transformers imports the code of a checkpoint once for the configuration and once for the model, from two folders
    with a hash for a name: the same class twice.
    """
    if config_class is None or not config_class.__module__.startswith("transformers_modules."):
        return config_class
    package, _, file = config_class.__module__.rpartition(".")
    return package.rpartition(".")[0], file, config_class.__qualname__


def _model_classes(base: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for model in base.__subclasses__():
        yield model
        yield from _model_classes(model)
