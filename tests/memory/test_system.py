"""Limits and topologies, on recorded machines."""

import mmap
from pathlib import Path

import pytest

from hf_dilated.memory.numa import MPOL_INTERLEAVE, MPOL_PREFERRED, Placement, Topology, place
from hf_dilated.memory.pool.mapping import Mapping
from hf_dilated.memory.system import System

GIB = 1 << 30


def recorded(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {40 << 20} kB"}


@pytest.mark.parametrize(
    ("files", "limit", "available"),
    [
        ({}, 64, 40),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, 64, 40),
        ({"sys/fs/cgroup/memory.max": str(8 * GIB), "sys/fs/cgroup/memory.current": str(6 * GIB)}, 8, 2),
        (
            {
                "sys/fs/cgroup/memory.max": str(8 * GIB),
                "sys/fs/cgroup/memory.current": str(6 * GIB),
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}",
            },
            8,
            3,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/job",
                "sys/fs/cgroup/user/memory.max": str(16 * GIB),
                "sys/fs/cgroup/user/memory.current": str(1 * GIB),
                "sys/fs/cgroup/user/job/memory.max": str(32 * GIB),
                "sys/fs/cgroup/user/job/memory.current": str(31 * GIB),
            },
            16,
            1,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(1 * GIB),
            },
            4,
            3,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            },
            64,
            40,
        ),
    ],
    ids=["no group", "no limit", "v2", "v2 with files that can go", "v2 nested", "v1", "v1 without limit"],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], limit: int, available: int) -> None:
    usage = System(recorded(tmp_path, MEMINFO | files)).usage()
    assert (usage.limit, usage.available) == (limit * GIB, available * GIB)


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    machine = System(tmp_path)
    assert machine.usage().limit == machine.usage().available > 0
    assert machine.resident() == 0
    assert not machine.has_huge_pages()


@pytest.mark.parametrize(("text", "has"), [("always [madvise] never", True), ("always madvise [never]", False)])
def test_huge_pages(tmp_path: Path, text: str, has: bool) -> None:
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    assert System(recorded(tmp_path, {path: text})).has_huge_pages() is has


def topology(root: Path, nodes: dict[int, tuple[str, int]]) -> Topology:
    files = {f"node{n}/cpulist": cpus for n, (cpus, _) in nodes.items()}
    sizes = {f"node{n}/meminfo": f"Node {n} MemTotal:       {kb} kB" for n, (_, kb) in nodes.items()}
    return Topology.read(recorded(root, files | sizes))


TWO_SOCKETS = {0: ("0-15,32-47", 1), 1: ("16-31,48-63", 1)}


@pytest.mark.parametrize(
    ("nodes", "cpus", "placement"),
    [
        ({0: ("0-1", 1)}, {0, 1}, None),
        ({}, {0, 1}, None),
        (TWO_SOCKETS, {3, 40}, Placement(MPOL_PREFERRED, (0,))),
        (TWO_SOCKETS, {20}, Placement(MPOL_PREFERRED, (1,))),
        (TWO_SOCKETS, {0, 63}, Placement(MPOL_INTERLEAVE, (0, 1))),
        ({0: ("0-7", 1), 1: ("8-15", 0)}, {0, 9}, None),
        ({0: ("0-7", 1), 1: ("8-15", 1), 2: ("", 1)}, {0, 9}, Placement(MPOL_INTERLEAVE, (0, 1))),
        ({0: ("0-7", 1), 70: ("8-15", 1)}, {9}, Placement(MPOL_PREFERRED, (70,))),
    ],
    ids=["one", "unknown", "first", "second", "both", "no memory", "memory alone", "far"],
)
def test_placement(
    tmp_path: Path, nodes: dict[int, tuple[str, int]], cpus: set[int], placement: Placement | None
) -> None:
    found = topology(tmp_path, nodes)
    assert found.placement(cpus) == placement
    assert found.explain(cpus)


def test_the_kernel_agrees_on_this_machine() -> None:
    """With one node the call changes nothing, but shows that its arguments are well-formed."""
    if not Topology.read().nodes:
        pytest.skip("the kernel shows no nodes")
    mapping = Mapping(4 << 20, huge_pages=False, placement=None)
    assert mapping.address % mmap.PAGESIZE == 0
    assert place(mapping.address, mapping.size, Placement(MPOL_PREFERRED, (0,)))
    assert place(mapping.address, mapping.size, Placement(MPOL_INTERLEAVE, (0,)))
    assert not place(mapping.address, mapping.size, Placement(MPOL_INTERLEAVE, (900,)))
