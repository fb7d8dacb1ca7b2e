"""NUMA: where the memory of a machine with several nodes is placed.

The kernel puts a page on the node of the thread that touches it first. A pool breaks that: a block outlives its first
user. So its pages are placed when they are mapped: on the process's node if it runs on one node alone, in turns over
its nodes if its threads run on several.
"""

import ctypes
import os
import platform
import re
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MPOL_PREFERRED, MPOL_INTERLEAVE = 1, 3
MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call


@dataclass(frozen=True)
class Placement:
    """A policy of ``mbind`` and its nodes.

    Example:
        >>> Placement(MPOL_INTERLEAVE, (0, 1)).mask
        3
    """

    policy: int
    nodes: tuple[int, ...]

    @property
    def mask(self) -> int:
        """The nodes as bits."""
        return sum(1 << node for node in self.nodes)


@dataclass(frozen=True)
class Topology:
    """The processors of every node that has memory."""

    nodes: dict[int, frozenset[int]]

    @classmethod
    def read(cls, root: Path = Path("/sys/devices/system/node")) -> "Topology":
        """Read what the kernel says; nothing is known where it says nothing."""
        nodes = {}
        for folder in root.glob("node[0-9]*"):
            total = re.search(r"MemTotal:\s+(\d+)", _text(folder / "meminfo"))
            if total is None or int(total[1]) > 0:
                nodes[int(folder.name[4:])] = parse_cpus(_text(folder / "cpulist"))
        return cls(dict(sorted(nodes.items())))

    def placement(self, cpus: Set[int]) -> Placement | None:
        """Return where memory of a process on these processors belongs; None if there is nothing to choose."""
        if len(self.nodes) < 2:
            return None
        used = tuple(node for node, own in self.nodes.items() if own & cpus)
        if not used:
            return None
        return Placement(MPOL_PREFERRED if len(used) == 1 else MPOL_INTERLEAVE, used)

    def explain(self, cpus: Set[int]) -> str:
        """Say what is done, and why.

        Example:
            >>> Topology({0: frozenset({0, 1})}).explain({0, 1})
            'one NUMA node: nothing to place'
        """
        placement = self.placement(cpus)
        if placement is None:
            count = len(self.nodes)
            return "one NUMA node: nothing to place" if count == 1 else f"{count} NUMA nodes with memory and processors"
        names = ", ".join(map(str, placement.nodes))
        if placement.policy == MPOL_PREFERRED:
            return f"all threads run on NUMA node {names}: memory is placed there"
        return f"threads run on NUMA nodes {names}: pages are placed on them in turns"


def parse_cpus(text: str) -> frozenset[int]:
    """Read a list of processors as the kernel writes it.

    Example:
        >>> sorted(parse_cpus("0-2,8"))
        [0, 1, 2, 8]
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@cache
def own_placement() -> Placement | None:
    """Return the placement of this process's memory, or None."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return Topology.read().placement(os.sched_getaffinity(0))


def place(address: int, size: int, placement: Placement) -> bool:
    """Tell the kernel where untouched pages belong; return whether it agreed."""
    number = MBIND.get(platform.machine())
    if number is None:
        return False
    bits = max(placement.nodes) + 2  # the kernel reads one bit less than it is told of
    words = -(-bits // 64)
    mask = (ctypes.c_uint64 * words)(*(placement.mask >> 64 * i & (1 << 64) - 1 for i in range(words)))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (number, address, size, placement.policy, ctypes.addressof(mask), bits, 0)
    return libc.syscall(*map(ctypes.c_long, arguments)) == 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
