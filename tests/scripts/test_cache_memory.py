"""The table of kept keys: what a cache holds, and no more than the text says."""

import cache_memory
import pytest


def test_the_numbers_are_those_of_a_cache() -> None:
    rows = cache_memory.measure((8192,), check=True)
    kept = {(row.heads, row.kv_heads, row.pattern): row.kept for row in rows}
    assert kept[32, 32, "head"] == kept[32, 8, "kv_head"] == 4092  # the segment of 2,048 tokens and half of the others
    assert kept[32, 8, "head"] == 8188
    assert kept[32, 8, "block_sparse"] == (2 * 8191 + 6 * (17 * 128 + 127)) / 8  # 16 blocks, the first, the own one
    assert kept[14, 2, "block_sparse"] == (8191 + 17 * 128 + 127) / 2
    text = cache_memory.table(rows, (8192,))
    assert "| 32/8 | `kv_head` | 4,092 (50.0%, 16 MiB) |" in text


def test_a_cache_that_holds_other_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_memory, "held_keys", lambda *arguments: 1)
    with pytest.raises(SystemExit, match="a cache of 8192 tokens holds other keys"):
        cache_memory.measure((8192,), check=True)
