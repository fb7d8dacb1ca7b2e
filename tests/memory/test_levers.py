"""The levers of the process are pulled, and released again; in a process of their own."""

import os
import subprocess
import sys

import pytest

from hf_dilated.memory import levers

PROGRAM = """
import os, resource, torch
from hf_dilated.memory.levers import Levers, pull_levers, release_levers


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(16 << 20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


first = faults()
assert pull_levers(huge_pages=False) == Levers(malloc=True, huge_pages=False)
faults()
kept = min(faults() for _ in range(4))  # the kernel may have taken pages back in between
release_levers()
after = faults()
assert kept < first / 10 and kept < after / 10, (first, kept, after)
assert pull_levers(malloc=False).huge_pages and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
release_levers()
assert "THP_MEM_ALLOC_ENABLE" not in os.environ
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_malloc_keeps_what_it_has() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_nothing_is_done_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "_libc", lambda: object())  # as where malloc is another
    monkeypatch.delenv(levers.TORCH_HUGE_PAGES, raising=False)
    assert levers.pull_levers(huge_pages=False) == levers.Levers(malloc=False, huge_pages=False)
    assert levers.release_levers() == 0
    assert levers.TORCH_HUGE_PAGES not in os.environ
