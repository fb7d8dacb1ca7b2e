"""The lengths from which pools pay."""

from dataclasses import dataclass

NEVER = 1 << 60  # tokens


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Tokens from which each mode pays; ``origin`` says who found that out."""

    lightweight: int = 4096
    full: int = 8192
    origin: str = "default"
