"""Checks that name the field and the fix."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A pattern that cannot be run as written; the message names the field and the fix."""


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__}: expected a dictionary, got {type(values).__name__}")
    fields = dataclasses.fields(cls)
    known = [field.name for field in fields]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(
            f"{cls.__name__}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}. "
            "A configuration of a newer hf_dilated needs `pip install -U hf_dilated`"
        )
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{cls.__name__}: missing {', '.join(missing)}")
    return dict(values)


def integer(name: str, value: Any) -> int:
    try:
        whole = not isinstance(value, bool) and value == int(value)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ConfigError(f"{name}: expected a whole number, got {value!r}")
    return int(value)


def integers(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"{name}: expected a sequence of whole numbers, got {values!r}")
    return tuple(integer(name, value) for value in values)


def instance(name: str, value: Any, cls: type) -> None:
    if not isinstance(value, cls):
        way_out = f"; {cls.__name__}.from_dict reads one" if isinstance(value, Mapping) else ""
        raise ConfigError(f"{name}: expected a {cls.__name__}, got {type(value).__name__}{way_out}")


def at_least(name: str, values: Sequence[int], least: int) -> None:
    for value in values:
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")


def one_of(name: str, value: Any, options: Sequence[str]) -> None:
    if value not in options:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def position_limit(config: Any) -> int | None:
    """Return the ``max_position_embeddings`` of a Transformers configuration; None for models without such a limit.

    Some of these say so with -1.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def longest_input(config: Any, max_length: int | None) -> int:
    """Return the longest sequence, in tokens, of a Transformers configuration or ``max_length``, the larger.

    Raises:
        ConfigError: If neither gives one.
    """
    positions = position_limit(config)
    if max_length is not None:
        at_least("max_length", (integer("max_length", max_length),), 1)
    if positions is None and max_length is None:
        raise ConfigError(
            f"max_length: {type(config).__name__} has no max_position_embeddings; pass max_length=…, "
            "the longest sequence in tokens"
        )
    return max(positions or 0, max_length or 0)
