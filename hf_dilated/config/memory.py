"""What a user sets about memory; everything else is chosen."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_dilated.config.checks import ConfigError, at_least, integer, known_fields, one_of

MemoryMode = Literal["disabled", "lightweight", "full"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Explicit settings of the memory pool. ``None`` leaves a setting to the policy; each setting wins alone.

    Args:
        mode: ``"disabled"``, ``"lightweight"`` (size buckets) or ``"full"`` (best fit with coalescing).
        smallest: Bytes of the smallest buffer that is pooled.
        budget: Bytes that the pool keeps for reuse at most, beside what is in use.
        huge_pages: Ask the kernel for huge pages.
        numa: Place memory by the machine's NUMA nodes.
        cuda: Pool buffers on CUDA devices too (a ``torch.cuda.MemPool``).

    Raises:
        ConfigError: If a setting is malformed.

    Example:
        >>> MemoryConfig(mode="full", budget=1 << 30).to_dict()
        {'mode': 'full', 'budget': 1073741824}
    """

    mode: MemoryMode | None = None
    smallest: int | None = None
    budget: int | None = None
    huge_pages: bool | None = None
    numa: bool | None = None
    cuda: bool | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            one_of("mode", self.mode, get_args(MemoryMode))
        for name, least in (("smallest", 1), ("budget", 0)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, integer(name, value))
                at_least(name, (getattr(self, name),), least)
        for name in ("huge_pages", "numa", "cuda"):
            if (value := getattr(self, name)) is not None and not isinstance(value, bool):
                raise ConfigError(f"{name}: expected True or False, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that were made, the inverse of :meth:`from_dict`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MemoryConfig":
        """Build it from the values of :meth:`to_dict`.

        Raises:
            ConfigError: If a key is unknown or a value is malformed.
        """
        return cls(**known_fields(cls, values))
