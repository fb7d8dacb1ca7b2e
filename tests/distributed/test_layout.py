"""Layouts: every real token on one rank, documents folded, work balanced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dilated import SequenceLayout
from hf_dilated.distributed import layout as layouts


@given(
    rows=st.integers(1, 3), length=st.integers(1, 40), ranks=st.sampled_from([1, 2, 3, 4, 8]),
    kind=st.sampled_from(["zigzag", "contiguous"]), shortest=st.sampled_from([1, 3, 128]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_real_token_has_one_place(rows, length, ranks, kind, shortest, seed):
    torch.manual_seed(seed)
    mask = torch.rand(rows, length) < 0.8
    ids = torch.where(torch.rand(rows, length) < 0.1, 0, torch.arange(length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "SHORTEST_PIECE", shortest)
        layout = SequenceLayout.of((rows, length), ranks, kind=kind, attention_mask=mask, position_ids=ids)
    columns = torch.stack([layout.columns(rank) for rank in range(ranks)])
    for row in range(rows):
        held = columns[:, row][columns[:, row] >= 0].sort().values
        assert held.tolist() == mask[row].nonzero()[:, 0].tolist()
        for rank in range(ranks):  # ascending, empty slots last
            own = columns[rank, row]
            own = own[own >= 0]
            assert (own.diff() > 0).all()
            assert (columns[rank, row, : len(own)] == own).all()
    x = torch.randn(rows, length, 2)
    shards = torch.stack([layout.shard(x, rank) for rank in range(ranks)])
    torch.testing.assert_close(layout.unshard(shards), torch.where(mask[..., None], x, 0))
    for row, (rank, slot) in enumerate(layout.last):
        if mask[row].any():
            assert layout.columns(rank)[row, slot] == mask[row].nonzero()[-1, 0]


def test_zigzag_balances_causal_work_of_packed_documents():
    bounds = torch.tensor([0, 3104, 6304, 7904, 8064, 8192]) * 4
    ids = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    layout = SequenceLayout.of((1, int(bounds[-1])), 4, position_ids=ids)
    pairs = [int((layout.positions(rank) + 1).sum()) for rank in range(4)]
    assert max(pairs) < 1.02 * sum(pairs) / 4
    assert layout.slots == int(bounds[-1]) / 4


def test_equal_batches_share_a_layout():
    one, other = (SequenceLayout.of((1, 9), 2, attention_mask=torch.ones(1, 9)) for _ in range(2))
    assert one is other
