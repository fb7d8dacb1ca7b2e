"""What is kept of a batch: its layout counts, and goes when others come."""

import gc
import weakref

import pytest

from hf_dilated import SequenceLayout
from hf_dilated.distributed import layout as layouts
from hf_dilated.distributed import pieces, shares
from hf_dilated.distributed.shares import Problem
from hf_dilated.patterns import DensePattern

LIMIT = 100_000
CACHES = (layouts._layout, shares.levels_of, shares.pair_levels, pieces._receives, pieces.trade_of)


def test_layouts_of_packed_batches_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in CACHES:
        cache.cache_clear()
        monkeypatch.setattr(cache, "limit", LIMIT)
    seen = []
    for length in range(1000, 1020):
        layout = SequenceLayout.of((1, length), 2)
        problem = Problem(layout, DensePattern(window=5).spec, 1, 1, is_causal=True, packs=False)
        pieces.trade_of(problem, 0, (1,))
        seen.append(weakref.ref(layout))
    for cache in CACHES:
        assert layout.row.nbytes < cache.nbytes <= LIMIT
    del layout, problem
    gc.collect()
    assert 0 < sum(layout() is not None for layout in seen) < 6
