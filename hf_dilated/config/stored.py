"""What ``config.json`` keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_dilated.config.block_sparse import BlockSparseConfig
from hf_dilated.config.checks import ConfigError, known_fields
from hf_dilated.config.dilated import DilatedConfig
from hf_dilated.config.memory import MemoryConfig
from hf_dilated.config.ring import RingConfig

STORED_VERSION = 1
PARTS: dict[str, Any] = {
    "dilated": DilatedConfig,
    "block_sparse": BlockSparseConfig,
    "ring": RingConfig,
    "memory": MemoryConfig,
}


@dataclass(frozen=True, kw_only=True)
class StoredConfig:
    """What a checkpoint's ``config.json`` keeps under ``hf_dilated``: the backend, its pattern, and settings.

    Args:
        attn_implementation: The backend that runs.
        dilated: Its pattern, if it is dilated.
        block_sparse: Its pattern, if it is block-sparse.
        ring: How sequences are spread over ranks.
        memory: Settings of memory that a user made.
        original: Values of ``config.json`` that patching a checkpoint has replaced; None if it was not patched.

    Example:
        >>> pattern = DilatedConfig(segment_lengths=(16, 32), dilation_rates=(1, 2))
        >>> stored = StoredConfig(attn_implementation="dilated", dilated=pattern)
        >>> StoredConfig.from_dict(stored.to_dict()) == stored
        True
    """

    attn_implementation: str | None = None
    dilated: DilatedConfig | None = None
    block_sparse: BlockSparseConfig | None = None
    ring: RingConfig | None = None
    memory: MemoryConfig | None = None
    original: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of :meth:`from_dict`."""
        stored: dict[str, Any] = {"version": STORED_VERSION}
        if self.attn_implementation is not None:
            stored["attn_implementation"] = self.attn_implementation
        if self.original is not None:
            stored["original"] = dict(self.original)
        return stored | {name: part.to_dict() for name in PARTS if (part := getattr(self, name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StoredConfig":
        """Read the stored form.

        Raises:
            ConfigError: If it was written by a newer version, or has unknown keys or malformed values.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"hf_dilated: expected a dictionary, got {type(values).__name__}")
        fields = dict(values)
        version = fields.pop("version", STORED_VERSION)
        if version != STORED_VERSION:
            raise ConfigError(
                f"hf_dilated: the stored form has version {version!r}, this hf_dilated reads version "
                f"{STORED_VERSION}; upgrade with `pip install -U hf_dilated`"
            )
        fields = known_fields(cls, fields)
        name = fields.get("attn_implementation")
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"attn_implementation: expected a name, got {name!r}")
        for part, config_class in PARTS.items():
            if fields.get(part) is not None and not isinstance(fields[part], config_class):
                fields[part] = config_class.from_dict(fields[part])
        if not isinstance(fields.get("original", {}), Mapping | None):
            raise ConfigError(f"original: expected a dictionary, got {fields['original']!r}")
        return cls(**fields)
