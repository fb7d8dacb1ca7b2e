"""Ring attention as data."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_dilated.config.checks import at_least, integer, known_fields, one_of

Placement = Literal["auto", "zigzag", "contiguous"]
Transport = Literal["auto", "gather", "exchange", "symmetric", "heads", "rows"]

GIBIBYTE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """How one sequence is spread over the processes of a group, and how keys and values travel.

    Nothing here changes what is computed.

    Args:
        layout: Which tokens a rank holds. ``"zigzag"`` gives it an early and a late piece of every long document, so
            that causal work balances; ``"contiguous"`` gives it neighbours, which suits patterns that see mostly near
            tokens. ``"auto"`` takes zigzag for dense causal attention, contiguous otherwise, as the last batch has
            shown.
        transport: How keys and values travel. ``"gather"``: all at once to every rank. ``"exchange"``: shard by shard,
            the next one while one is computed with. ``"symmetric"``: as gather or exchange, pulled by the copy engines
            of the GPUs of one host. ``"heads"``: tokens for heads, so that a rank attends with some
            heads to everything (heads must divide). ``"rows"``: only the rows that a rank's queries see. ``"auto"``
            takes rows for patterns and windows, for dense attention gather while that needs at most ``gather_bytes``,
            and exchange beyond.
        gather_bytes: Most bytes of gathered keys and values that a rank keeps for a moment.
        chunk_tokens: In one process: compute chunks of so many tokens at a time, with scratch for a few of them instead
            of a whole layer; 0 computes everything at once, which is faster. Several processes do not use it.
        timeout_seconds: After this time without a sign of life, a rank counts as lost and the others stop. A process
            gives signs of life by itself from when it opens its session, however long it loads data, compiles or saves.
            One that lives but does not come, or has not opened the session yet, is waited for as long as the process
            group says (``init_process_group(timeout=…)``).

    Raises:
        ConfigError: If a field is malformed.

    Example:
        >>> RingConfig(transport="exchange").layout
        'auto'
    """

    layout: Placement = "auto"
    transport: Transport = "auto"
    gather_bytes: int = 4 * GIBIBYTE
    chunk_tokens: int = 0
    timeout_seconds: int = 60

    def __post_init__(self) -> None:
        one_of("layout", self.layout, get_args(Placement))
        one_of("transport", self.transport, get_args(Transport))
        for name, least in (("gather_bytes", 0), ("chunk_tokens", 0), ("timeout_seconds", 1)):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
            at_least(name, (getattr(self, name),), least)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that run another pattern than the others: none."""
        return ()

    @property
    def depends_on_layer(self) -> bool:
        """Whether two layers may run different patterns."""
        return False

    def dense_length(self, layer: int = 0) -> int:
        """Longest document, in tokens, that ``layer`` attends to exactly as dense attention does: any."""
        return sys.maxsize

    @classmethod
    def from_model_config(cls, config: Any, max_length: int | None = None) -> "RingConfig":
        """Return the defaults, which suit any model."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RingConfig":
        """Build a configuration from the values of :meth:`to_dict`.

        Raises:
            ConfigError: If a key is unknown or a value is malformed.
        """
        return cls(**known_fields(cls, values))
