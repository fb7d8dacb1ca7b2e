"""Which pool a model gets, and why."""

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_dilated.config.memory import MemoryConfig, MemoryMode
from hf_dilated.memory.profile import measured_thresholds
from hf_dilated.memory.system import System, system
from hf_dilated.memory.thresholds import NEVER, Thresholds

SMALLEST = 4 << 20  # bytes; malloc's warm heap hands out smaller ones in less time than a pool takes to count them
BUDGET_SHARE = 4  # of the memory that this process may have, one part is kept for reuse at most


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """How buffers are allocated; every field is decided.

    Attributes:
        mode: ``"disabled"`` (torch's own allocations), ``"lightweight"`` (size buckets) or ``"full"`` (best fit with
            coalescing, NUMA placement).
        reason: Why this mode.
        attention_type: The backend that it is for: lifetimes of buffers differ.
        smallest: Bytes of the smallest buffer that is pooled.
        budget: Bytes kept for reuse at most, beside what is in use.
        huge_pages: Whether the kernel is asked for huge pages.
        numa: Whether memory is placed by NUMA nodes.
        cuda: Whether buffers on CUDA devices are pooled too.
        plan: Buffers, in bytes, that are allocated before the first.
    """

    mode: MemoryMode = "disabled"
    reason: str = dataclasses.field(default="", compare=False)
    attention_type: str = "dilated"
    smallest: int = SMALLEST
    budget: int = 0
    huge_pages: bool = False
    numa: bool = False
    cuda: bool = False
    plan: tuple[int, ...] = ()

    @property
    def spec(self) -> str:
        """The policy as text, which travels through compiled graphs; empty for ``"disabled"``."""
        if self.mode == "disabled":
            return ""
        values = dataclasses.asdict(self)
        del values["reason"]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, spec: str) -> "MemoryPolicy":
        """Return the policy of a :attr:`spec`.

        Example:
            >>> policy = auto_configure_memory_pool(16384)
            >>> MemoryPolicy.parse(policy.spec) == policy
            True
        """
        if not spec:
            return cls()
        values = json.loads(spec)
        return cls(**values | {"plan": tuple(values["plan"])})


def auto_configure_memory_pool(
    max_seq_len: int,
    attention_type: str = "dilated",
    *,
    mode: MemoryMode | None = None,
    thresholds: Thresholds | None = None,
    **overrides: Any,
) -> MemoryPolicy:
    """Choose the pool for a model.

    Args:
        max_seq_len: Longest input, in tokens.
        attention_type: The backend; ``ring``, ``distributed`` and ``block_sparse`` types are pooled at any length.
        mode: Overrides the choice.
        thresholds: Lengths at which the modes begin; by default those measured on this machine by
            ``hf-dilated profile``, or else 4096 and 8192.
        overrides: Other fields of :class:`hf_dilated.config.MemoryConfig`; each wins alone.

    Raises:
        ConfigError: If a setting is unknown or malformed.

    Example:
        >>> auto_configure_memory_pool(2048).mode
        'disabled'
        >>> auto_configure_memory_pool(2048, "ring_dilated").mode
        'lightweight'
        >>> auto_configure_memory_pool(2048, mode="full").reason
        'set by the user'
    """
    settings = MemoryConfig.from_dict({"mode": mode, **overrides})
    return resolve(settings, max_seq_len, attention_type, thresholds or measured_thresholds())


def resolve(
    settings: MemoryConfig,
    max_seq_len: int,
    attention_type: str,
    thresholds: Thresholds,
    plan: tuple[int, ...] = (),
    machine: System | None = None,
) -> MemoryPolicy:
    """Fill in what the user left open."""
    machine = machine or system()
    chosen, reason = _mode(max_seq_len, attention_type, thresholds)
    if settings.mode is not None:
        chosen, reason = settings.mode, "set by the user"
    automatic = {
        "smallest": SMALLEST,
        "budget": machine.usage().limit // BUDGET_SHARE,
        "huge_pages": machine.has_huge_pages(),
        "numa": chosen == "full",
        "cuda": False,
    }
    given = {name: value for name, value in settings.to_dict().items() if name != "mode"}
    return MemoryPolicy(mode=chosen, reason=reason, attention_type=attention_type, plan=plan, **automatic | given)


def _mode(length: int, attention_type: str, thresholds: Thresholds) -> tuple[MemoryMode, str]:
    begin = f"{thresholds.lightweight:,}" if thresholds.lightweight < NEVER else "no length on"
    source = "" if thresholds.origin == "default" else f" ({thresholds.origin})"
    if length >= thresholds.full:
        return "full", f"{length:,} tokens, full from {thresholds.full:,}{source}"
    if length >= thresholds.lightweight:
        return "lightweight", f"{length:,} tokens, lightweight from {thresholds.lightweight:,}{source}"
    for kind in ("ring", "distributed", "block_sparse"):
        if kind in attention_type:
            return "lightweight", f"{kind} is always pooled"
    return "disabled", f"{length:,} tokens, pooled from {begin}{source}"
