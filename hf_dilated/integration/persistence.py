"""``config.hf_dilated``: backend and pattern live in a model's ``config.json``.

Transformers never saves ``attn_implementation``. Here a configuration that runs one of our backends, or that was
told to, writes three things: the backend and its pattern under ``hf_dilated``, and the key ``attn_implementation``,
which Transformers obeys when it loads a model, so that a program without this package stops and names the backend.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_dilated.config import ConfigError, MemoryConfig, StoredConfig
from hf_dilated.integration.backends import BACKENDS, Backend
from hf_dilated.integration.carried import carry, own_classes
from hf_dilated.integration.layers import backend_config

FIELD = "hf_dilated"
PATTERN_KEYS = frozenset(
    field.name for backend in BACKENDS.values() for field in dataclasses.fields(backend.config_class)
)
STORED_KEYS = frozenset(field.name for field in dataclasses.fields(StoredConfig)) | {"version"}


class StoredField:
    """The attribute ``hf_dilated`` of every Transformers configuration.

    It takes the configuration of a backend, a ``StoredConfig`` or the dictionary of either, checks it, and reads back
    as the plain dictionary that is saved, or None. Of a multimodal configuration it is the text part's. A backend named
    in it is selected unless the caller has named one; a pattern alone stands for its own backend,
    and a ``MemoryConfig`` joins what is there.

    Example:
        >>> from hf_dilated import DilatedConfig
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig()
        >>> config.hf_dilated = DilatedConfig(segment_lengths=(512, 1024), dilation_rates=(1, 2))
        >>> config.hf_dilated["attn_implementation"]
        'dilated'
        >>> config.hf_dilated = {"dilated": {"segment_lengths": [512], "dilation_rate": [1]}}
        Traceback (most recent call last):
        ...
        hf_dilated.config.checks.ConfigError: DilatedConfig: unknown 'dilation_rate'; known are segment_lengths, ...
    """

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return self if config is None else vars(_holder(config)).get(FIELD)

    def __set__(self, config: Any, value: Any) -> None:
        holder = _holder(config)
        if value is None:
            vars(holder).pop(FIELD, None)
            return
        stored = _parse(value, stored_config(config))
        vars(holder)[FIELD] = stored.to_dict()
        if stored.attn_implementation and holder._attn_implementation is None:
            holder._attn_implementation = stored.attn_implementation

    def __delete__(self, config: Any) -> None:
        vars(_holder(config)).pop(FIELD, None)


def stored_config(config: Any) -> StoredConfig:
    """Return what ``config.hf_dilated`` holds, checked; an empty ``StoredConfig`` where nothing is stored.

    Raises:
        ConfigError: If the dictionary was changed into something that cannot be run.
    """
    value = vars(_holder(config)).get(FIELD)
    return StoredConfig() if value is None else _parse(value, StoredConfig())


def install() -> None:
    """Give every Transformers configuration the attribute ``hf_dilated``, let it be saved, and let models obey it.

    Safe to repeat.
    """
    if isinstance(vars(PreTrainedConfig).get(FIELD), StoredField):
        return
    PreTrainedConfig.hf_dilated = StoredField()
    PreTrainedConfig.to_dict = _saving(PreTrainedConfig.to_dict)
    PreTrainedConfig.save_pretrained = _carrying(PreTrainedConfig.save_pretrained)
    PreTrainedModel.__init__ = _obeying(PreTrainedModel.__init__)


def _holder(config: Any) -> Any:
    """The configuration that attention modules read: of a multimodal model the text part."""
    if not type(config).sub_configs:
        return config
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise ConfigError(
            f"hf_dilated: {type(config).__name__} has several text parts; set it on the one that is meant, "
            f"one of {', '.join(config.sub_configs)}"
        ) from error
    if text is not config and FIELD in vars(config):  # since before this package was imported
        vars(text)[FIELD] = vars(config).pop(FIELD)
    return text


def _holds_itself(config: Any) -> bool:
    try:
        return _holder(config) is config
    except ConfigError:
        return False


def _parse(value: Any, current: StoredConfig) -> StoredConfig:
    if isinstance(value, StoredConfig):
        stored = value
    elif any(isinstance(value, backend.config_class) for backend in BACKENDS.values()):
        stored = _with_pattern(value, current)
    elif isinstance(value, MemoryConfig):
        stored = dataclasses.replace(current, memory=value)
    elif isinstance(value, Mapping) and PATTERN_KEYS & set(value) and not STORED_KEYS & set(value):
        stored = _with_pattern(_closest(set(value)).from_dict(value), current)
    else:
        stored = StoredConfig.from_dict(value)
    if stored.attn_implementation not in (None, *BACKENDS):
        raise ConfigError(
            f"attn_implementation: this hf_dilated has no backend {stored.attn_implementation!r}; it has "
            f"{', '.join(map(repr, BACKENDS))}. A newer one may have it: `pip install -U hf_dilated`"
        )
    return stored


def _closest(keys: set[str]) -> Any:
    """The class of configurations that most of these keys belong to."""
    classes = dict.fromkeys(backend.config_class for backend in BACKENDS.values())
    return max(classes, key=lambda config_class: len(keys & {field.name for field in dataclasses.fields(config_class)}))


def _with_pattern(pattern: Any, current: StoredConfig) -> StoredConfig:
    """Add the pattern, and select the first backend that it belongs to unless another of them is selected."""
    own = {name: backend for name, backend in BACKENDS.items() if backend.config_class is type(pattern)}
    name = current.attn_implementation if current.attn_implementation in own else next(iter(own))
    return dataclasses.replace(current, attn_implementation=name, **{own[name].part: pattern})


def _saving(to_dict: Any) -> Any:
    @functools.wraps(to_dict)
    def wrapper(config: Any) -> dict[str, Any]:
        values = to_dict(config)
        own = config._attn_implementation if config._attn_implementation in BACKENDS else None
        if FIELD in vars(config) or (own and _holds_itself(config)):
            stored = _to_save(config, own)
            values[FIELD] = stored.to_dict()
            own = stored.attn_implementation
        if backend := _backends(own, {name: values.get(name) for name in config.sub_configs}):
            values["attn_implementation"] = backend
        return values

    return wrapper


def _carrying(save_pretrained: Any) -> Any:
    @functools.wraps(save_pretrained)
    def wrapper(config: Any, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        if push_to_hub and own_classes(getattr(config, "auto_map", None)):
            raise ValueError(
                "push_to_hub: this configuration names code that is written beside it after it was uploaded; call "
                "config.push_to_hub(repo_id), or push the model"
            )
        save_pretrained(config, save_directory, push_to_hub, **options)
        carry(config, Path(save_directory))

    return wrapper


def _obeying(init: Any) -> Any:
    """A configuration that is older than the import holds a plain value, which was not checked and selected nothing."""

    @functools.wraps(init)
    def wrapper(model: Any, config: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(config, PreTrainedConfig) and FIELD in vars(config):
            config.hf_dilated = vars(config)[FIELD]
        init(model, config, *arguments, **options)

    return wrapper


def _to_save(config: Any, running: str | None) -> StoredConfig:
    """The backend that runs and its pattern, else what the configuration was given."""
    stored = stored_config(config)
    if running is None:
        return stored
    return dataclasses.replace(
        stored, attn_implementation=running, **{BACKENDS[running].part: _pattern(config, BACKENDS[running])}
    )


def _pattern(config: Any, backend: Backend) -> Any:
    """The pattern that runs; None where none was given and none can be chosen, so that none ever ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return backend_config(config, backend.name)
        except ConfigError:
            return None


def _backends(own: str | None, parts: dict[str, Any]) -> str | dict[str, Any] | None:
    """The value of ``attn_implementation`` that selects the same backends again, in the form Transformers takes."""
    named = {
        name: part["attn_implementation"]
        for name, part in parts.items()
        if isinstance(part, Mapping) and "attn_implementation" in part
    }
    if not named:
        return own
    return ({"": own} if own else {}) | named
