"""What was measured on a machine: from which length on pooling pays, and what a model allocates.

``hf-dilated profile`` writes it; policies read it. Thresholds follow from the measurements by :func:`thresholds_of`
alone.
"""

import dataclasses
import functools
import json
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_dilated.memory.system import system
from hf_dilated.memory.thresholds import NEVER, Thresholds

PROFILE_VERSION = 1
LEAST = 0.98  # a ratio below this is a loss
LONGEST_PLAN = 64  # buffers
ORIGIN = "profile of this machine"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One comparison with torch's own allocations.

    Attributes:
        length: Tokens.
        kind: ``"forward"`` or ``"step"`` (forward and backward).
        mode: ``"lightweight"`` or ``"full"``.
        ratio: Speed-up, a ratio of medians.
        low: Lower end of its 95 % interval.
        high: Upper end.
        noise: Upper end of the same interval of a control: torch's own allocations against themselves.
    """

    length: int
    kind: str
    mode: str
    ratio: float
    low: float
    high: float
    noise: float

    @property
    def loses(self) -> bool:
        """Whether it is certainly slower."""
        return self.high < LEAST

    @property
    def pays(self) -> bool:
        """Whether it is faster beyond the noise."""
        return self.low > max(1.0, self.noise)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A machine's profile.

    Attributes:
        machine: What it was measured on; a profile of another machine is ignored.
        thresholds: From which length on each mode is used.
        measurements: What they follow from.
        plans: Buffers, in bytes, that a model needs at once; by :func:`model_key`.
    """

    machine: dict[str, Any]
    thresholds: Thresholds
    measurements: tuple[Measurement, ...] = ()
    plans: dict[str, list[int]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"version": PROFILE_VERSION, **dataclasses.asdict(self)}, indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read one.

        Raises:
            ValueError: If it is not a profile of this version.
        """
        try:
            values = json.loads(path.read_text())
            if (version := values.pop("version")) != PROFILE_VERSION:
                raise ValueError(f"version {version}, this hf_dilated reads {PROFILE_VERSION}")
            return cls(
                machine=values["machine"],
                thresholds=Thresholds(**values["thresholds"]),
                measurements=tuple(Measurement(**row) for row in values["measurements"]),
                plans={str(key): [int(size) for size in plan] for key, plan in values["plans"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no profile: {error}") from error


def profile_path() -> Path:
    """Return where the profile lies: ``$HF_DILATED_PROFILE``, or in the user's cache."""
    if given := os.environ.get("HF_DILATED_PROFILE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dilated" / "profile.json"


def this_machine() -> dict[str, Any]:
    """Describe what a profile depends on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(system().usage().limit / (1 << 30)),
        "huge_pages": system().has_huge_pages(),
        "torch": torch.__version__,
        "hf_dilated": metadata.version("hf_dilated"),
    }


@functools.cache
def current_profile() -> Profile | None:
    """Return this machine's profile; None, with a notice, if the file is of another machine or version."""
    path = profile_path()
    if not path.is_file():
        return None
    try:
        profile = Profile.load(path)
    except ValueError as error:
        warnings.warn(f"{error}; it is ignored. Run `hf-dilated profile` again", stacklevel=2)
        return None
    machine = this_machine()
    if different := [name for name in machine if machine[name] != profile.machine.get(name)]:
        warnings.warn(
            f"{path} was measured with another {', '.join(different)}; it is ignored. Run `hf-dilated profile` again, "
            "or `hf-dilated profile --remove`",
            stacklevel=2,
        )
        return None
    return profile


def measured_thresholds() -> Thresholds:
    """Return the thresholds of this machine's profile, or the defaults."""
    profile = current_profile()
    return Thresholds() if profile is None else profile.thresholds


def measured_plan(key: str) -> tuple[int, ...]:
    """Return the buffers that a model needs at once, if a run of it was recorded."""
    profile = current_profile()
    return () if profile is None else tuple(profile.plans.get(key, ()))[:LONGEST_PLAN]


def model_key(config: Any, read: Callable[[Any, str, Any], Any] = getattr) -> str:
    """Name the models that allocate alike; ``read`` takes an attribute or a default, as ``getattr`` does."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return "-".join(str(read(config, name, None) or 0) for name in ("model_type", *names))


def thresholds_of(measurements: Sequence[Measurement]) -> Thresholds:
    """Choose: a mode begins at the shortest length from which on it pays somewhere and loses nowhere.

    Example:
        >>> def row(length, ratio): return Measurement(
        ...     length=length, kind="step", mode="full", ratio=ratio, low=ratio - 0.01, high=ratio + 0.01, noise=1.02)
        >>> thresholds_of([row(2048, 1.0), row(4096, 0.9), row(8192, 1.1), row(16384, 1.2)]).full
        8192
    """
    full = _begin([m for m in measurements if m.mode == "full"])
    lightweight = _begin([m for m in measurements if m.mode == "lightweight"])
    return Thresholds(lightweight=min(lightweight, full), full=full, origin=ORIGIN)


def _begin(measurements: Sequence[Measurement]) -> int:
    by_length: dict[int, list[Measurement]] = {}
    for measurement in measurements:
        by_length.setdefault(measurement.length, []).append(measurement)
    begin = NEVER
    for length in sorted(by_length, reverse=True):
        if any(m.loses for m in by_length[length]) or not any(m.pays for m in by_length[length]):
            break
        begin = length
    return begin


def explain(thresholds: Thresholds, measurements: Sequence[Measurement]) -> str:
    """Say what was chosen, and why."""
    longest = max((m.length for m in measurements), default=0)
    lines = []
    for name, begin in (("lightweight", thresholds.lightweight), ("full", thresholds.full)):
        if begin == NEVER:
            lines.append(f"{name}: never; at {longest:,} tokens, the longest measured, it is not faster than the noise")
        else:
            lines.append(f"{name}: from {begin:,} tokens, from where on it is faster than the noise and never slower")
    return "\n".join(lines)


def merged(profile: Profile | None, plans: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the plans of a profile with new ones; the same model's replace the old."""
    return {**(profile.plans if profile else {}), **plans}
