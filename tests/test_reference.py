"""The oracle itself, against cases small enough to do by hand and against the paper's own recipe."""

import math

import pytest
import torch

from hf_dilated import DilatedConfig, reference


def multiplicity(config, tokens, heads=2, **options):
    options = {"kv_heads": heads, "is_causal": True, **options}
    return reference.multiplicity(torch.arange(tokens), tokens, config, heads=heads, **options)


def test_by_hand():
    config = DilatedConfig.longnet((2, 4), (1, 2))
    m = multiplicity(config, 5)
    assert m[0].tolist() == [[2, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 2, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 2]]
    assert m[1].tolist() == [[1, 0, 0, 0, 0], [1, 2, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 2, 0], [0, 0, 0, 0, 1]]


def test_once_is_count_without_the_repetition():
    nested = {"segment_lengths": (2, 4, 12), "dilation_rates": (1, 2, 4)}
    count, once = (multiplicity(DilatedConfig(**nested, overlap=o), 30, heads=5) for o in ("count", "once"))
    assert torch.equal(count.clamp(max=1), once)
    assert count.max() == 3


def test_sinks_are_seen_by_all_and_see_all_when_not_causal():
    config = DilatedConfig(segment_lengths=(4,), dilation_rates=(1,), sink_tokens=2)
    assert (multiplicity(config, 20)[:, 2:, :2] == 1).all()
    m = multiplicity(config, 20, is_causal=False)
    assert (m[:, :2] == 1).all()
    assert (m[:, :, :2] == 1).all()
    assert m[0, 2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]  # the grid begins behind the sinks


def test_phase_shifts_every_second_layer():
    config = DilatedConfig(segment_lengths=(4,), dilation_rates=(1,), phase="alternate")
    assert multiplicity(config, 8, layer=1)[0, 3].nonzero().flatten().tolist() == [2, 3]
    assert torch.equal(multiplicity(config, 8, layer=2), multiplicity(config, 8, layer=0))


@pytest.mark.parametrize(
    ("offset", "expected"),
    [("head", [0, 1, 2, 0, 1, 2, 0, 1]), ("kv_head", [0, 0, 1, 1, 2, 2, 0, 0]), ("grouped", [0, 0, 0, 1, 1, 1, 2, 2])],
)
def test_residues(offset, expected):
    config = DilatedConfig(segment_lengths=(6,), dilation_rates=(3,), overlap="count", offset=offset)
    found = [reference.residue(h, 3, config, heads=8, kv_heads=4, layer=5) for h in range(8)]
    assert found == expected


def test_positions():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    position_ids = torch.tensor([[7, 8, 9, 10, 11, 3]])
    assert reference.positions(1, 6, 6, mask, None).tolist() == [[-1, 0, 1, -1, 2, 3]]
    assert reference.positions(1, 6, 6, mask, position_ids).tolist() == [[-1, 0, 1, -1, 2, 0]]
    assert reference.positions(1, 2, 6, mask, position_ids[:, 4:]).tolist() == [[-1, 0, 1, -1, 2, 0]]


def test_rows_without_keys_are_zero():
    config = DilatedConfig.longnet((4,), (2,))
    query, key, value = (torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3))
    output, lse = reference.dilated_attention(query, key, value, config, return_lse=True)
    assert (output[0, 0, 1::2] == 0).all()
    assert lse[0, 0].isneginf().tolist() == [False, True, False, True]
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert grad.isfinite().all()


def test_longnet_paper_recipe():
    """Sections 2.2 and 2.3 of the paper: sparsify segments, attend, scatter, weigh branches by their softmax sums."""
    torch.manual_seed(0)
    segments, rates, heads, tokens, size = (4, 8, 16), (1, 2, 4), 6, 32, 5
    query, key, value = (torch.randn(1, heads, tokens, size, dtype=torch.float64) for _ in range(3))
    weighted, total = torch.zeros_like(value), torch.zeros(1, heads, tokens, dtype=torch.float64)
    for w, r in zip(segments, rates, strict=True):
        for head in range(heads):
            for begin in range(0, tokens, w):
                kept = torch.arange(begin + head % r, begin + w, r)
                scores = query[0, head, kept] @ key[0, head, kept].T / math.sqrt(size)
                sums = scores.exp().tril()
                weighted[0, head, kept] += sums @ value[0, head, kept]
                total[0, head, kept] += sums.sum(-1)
    output = reference.dilated_attention(query, key, value, DilatedConfig.longnet(segments, rates))
    torch.testing.assert_close(output, weighted / total.unsqueeze(-1), atol=1e-12, rtol=0)
