"""What the operating system says about memory: limits, pressure, huge pages."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

CGROUP_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
UNLIMITED = 1 << 60  # version 1 writes a number near 2^63 for "no limit"
ASSUMED = 8 << 30  # where the system tells nothing


class Usage(NamedTuple):
    """Bytes that this process may have, and those that it could still get."""

    limit: int
    available: int


class System:
    """Reads the files under ``root`` (``/``; recorded ones in tests).

    Example:
        >>> System().usage().available <= System().usage().limit
        True
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def usage(self) -> Usage:
        """Return the tightest of the machine's memory and the control groups that this process is in."""
        found = [self._machine(), *self._groups()]
        limit = min(usage.limit for usage in found)
        return Usage(limit, max(0, min(limit, *(usage.available for usage in found))))

    def resident(self) -> int:
        """Return the bytes of this process that are in memory; 0 where the system does not tell."""
        return self._field("proc/self/status", "VmRSS") or 0

    def has_huge_pages(self) -> bool:
        """Whether the kernel gives huge pages to those who ask for them."""
        text = self._read("sys/kernel/mm/transparent_hugepage/enabled") or ""
        return "[always]" in text or "[madvise]" in text

    def _machine(self) -> Usage:
        total = self._field("proc/meminfo", "MemTotal") or ASSUMED
        return Usage(total, self._field("proc/meminfo", "MemAvailable") or total)

    def _groups(self) -> list[Usage]:
        found = []
        for folder in self._group_folders():
            for limit_file, usage_file in CGROUP_FILES:
                limit, used = self._read(f"{folder}/{limit_file}"), self._read(f"{folder}/{usage_file}")
                if limit and used and limit.isdigit() and int(limit) < UNLIMITED:
                    cache_ = self._field(f"{folder}/{limit_file.rpartition('/')[0]}/memory.stat", "inactive_file", 1)
                    found.append(Usage(int(limit), int(limit) - int(used) + (cache_ or 0)))
        return found

    def _group_folders(self) -> list[str]:
        """The process's own group and those above it; a container sees its own as the top."""
        lines = (self._read("proc/self/cgroup") or "").splitlines()
        own = next((line.split("::", 1)[1].strip("/") for line in lines if line.startswith("0::")), "")
        parts = own.split("/") if own else []
        return ["/".join(["sys/fs/cgroup", *parts[:depth]]) for depth in range(len(parts) + 1)]

    def _field(self, path: str, name: str, unit: int = 1024) -> int | None:
        for line in (self._read(path) or "").splitlines():
            words = line.replace(":", " ").split()
            if words and words[0] == name:
                return int(words[1]) * unit
        return None

    def _read(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return None


@cache
def system() -> System:
    """Return the system that this process runs on."""
    return System()
