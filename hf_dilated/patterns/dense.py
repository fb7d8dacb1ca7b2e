"""Dense attention within a document, optionally within a window."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DensePattern:
    """Every token of a document sees every other (causal: every earlier one).

    Args:
        window: A query at position i sees keys at j with ``|i - j| < window``; None sees all.
    """

    window: int | None = None
