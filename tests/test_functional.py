import pytest
import torch

from hf_dilated import (
    BlockSparseConfig,
    ConfigError,
    DilatedConfig,
    block_sparse_attention,
    dilated_attention,
    reference,
)
from hf_dilated.functional import attend
from hf_dilated.patterns import DensePattern

CONFIG = DilatedConfig(segment_lengths=(4, 8), dilation_rates=(1, 2))


def tensors(**changes):
    shapes = {"query": (2, 4, 6, 8), "key": (2, 2, 10, 8), "value": (2, 2, 10, 8), **changes}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (4, 6, 8)}, "query: expected (batch, heads, tokens, head size), got (4, 6, 8)"),
        ({"key": (2, 3, 10, 8), "value": (2, 3, 10, 8)}, "key: 3 key-value heads do not divide 4 query heads"),
        ({"key": (2, 2, 10, 4)}, "key: (2, 2, 10, 4) does not fit the query (2, 4, 6, 8)"),
        ({"value": (2, 2, 9, 8)}, "value: (2, 2, 9, 8) does not fit the key (2, 2, 10, 8)"),
        ({"query": (2, 4, 11, 8)}, "query: 11 queries, but only 10 keys"),
        ({"query": (2, 0, 6, 8)}, "query: expected at least one head, and a head size of at least 1"),
        ({"query": (2, 4, 6, 0), "key": (2, 2, 10, 0)}, "a head size of at least 1, got (2, 4, 6, 0)"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is the test
        dilated_attention(**tensors(**changes), config=CONFIG)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, "attention_mask: expected (2, 10)"),
        ({"attention_mask": torch.ones(2, 10)}, TypeError, "attention_mask: expected bool"),
        ({"position_ids": torch.zeros(2, 7, dtype=torch.long)}, ValueError, "position_ids: expected (2, 6) or (2, 10)"),
        ({"position_ids": torch.zeros(2, 6)}, TypeError, "position_ids: expected integers"),
        ({"key_positions": torch.zeros(1, 10, dtype=torch.long)}, ValueError, "key_positions: expected (2, 10)"),
        ({"key_positions": torch.zeros(2, 10)}, TypeError, "key_positions: expected integers"),
        ({"key_positions": torch.full((2, 10), -2)}, ValueError, "6 queries, but only 0 slots are written"),
        ({"key_positions": torch.tensor([[0, -2, *range(1, 9)], [*range(10)]])}, ValueError, "last ones of their row"),
        ({"key_positions": torch.arange(1, 11).repeat(2, 1)}, ValueError, "must count 0, 1, 2"),
        (
            {"key_positions": torch.arange(10).repeat(2, 1), "attention_mask": torch.ones(2, 10, dtype=torch.bool)},
            ValueError,
            "pass one or the others",
        ),
    ],
)
def test_masks_that_do_not_fit(options, error, message):
    with pytest.raises(error) as raised:
        dilated_attention(**tensors(), config=CONFIG, **options)
    assert message in str(raised.value)


def test_dtypes_that_do_not_fit():
    inputs = tensors()
    with pytest.raises(TypeError, match="key: expected the same floating dtype as the query, got torch.float64"):
        dilated_attention(inputs["query"], inputs["key"].double(), inputs["value"], CONFIG)
    with pytest.raises(TypeError, match="query: expected the same floating dtype"):
        dilated_attention(*(x.long() for x in inputs.values()), CONFIG)
    with pytest.raises(ValueError, match="sink_logits: expected"):
        attend(*inputs.values(), DensePattern(), sink_logits=torch.zeros(3))
    with pytest.raises(ValueError, match="window: expected at least 1"):
        DensePattern(window=0)


@pytest.mark.parametrize(
    ("run", "kind", "other"),
    [
        (dilated_attention, "DilatedConfig", BlockSparseConfig(local_blocks=1)),
        (block_sparse_attention, "BlockSparseConfig", CONFIG),
    ],
)
def test_a_configuration_of_another_kind(run, kind, other):
    with pytest.raises(ConfigError, match=f"config: expected a {kind}, got dict; {kind}.from_dict reads one"):
        run(**tensors(), config=other.to_dict())
    with pytest.raises(ConfigError, match=f"config: expected a {kind}, got {type(other).__name__}$"):
        run(**tensors(), config=other)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("is_causal", [True, False])
def test_no_row_has_an_empty_result(queries, is_causal):
    inputs = tensors(query=(0, 4, queries, 8), key=(0, 2, 10, 8), value=(0, 2, 10, 3))
    for x in inputs.values():
        x.requires_grad_()
    masks = {"attention_mask": torch.ones(0, 10, dtype=torch.bool), "position_ids": torch.ones(0, 10, dtype=torch.long)}
    for run, config in ((dilated_attention, CONFIG), (block_sparse_attention, BlockSparseConfig(local_blocks=1))):
        output, lse = run(**inputs, config=config, is_causal=is_causal, return_lse=True, **masks)
        output.sum().backward()
        assert (output.shape, lse.shape) == ((0, 4, queries, 3), (0, 4, queries))
        assert all(x.grad.shape == x.shape for x in inputs.values())


@pytest.fixture
def long_inputs():
    torch.manual_seed(0)
    return [torch.randn(1, heads, 40, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def test_the_future_changes_nothing(long_inputs):
    before = dilated_attention(*long_inputs, CONFIG)
    changed = [x.clone() for x in long_inputs]
    for x in changed:
        x[:, :, 25:] = torch.randn_like(x[:, :, 25:]) * 100
    after = dilated_attention(*changed, CONFIG)
    assert torch.equal(before[:, :, :25], after[:, :, :25])
    assert not torch.equal(before[:, :, 25:], after[:, :, 25:])


def test_another_document_changes_nothing(long_inputs):
    position_ids = torch.cat([torch.arange(13), torch.arange(27)])[None]
    before = dilated_attention(*long_inputs, CONFIG, position_ids=position_ids)
    alone = dilated_attention(*(x[:, :, 13:] for x in long_inputs), CONFIG)
    torch.testing.assert_close(before[:, :, 13:], alone, atol=1e-12, rtol=0)
    for x in long_inputs:
        x[:, :, :13] = float("nan")
    after = dilated_attention(*long_inputs, CONFIG, position_ids=position_ids)
    assert torch.equal(before[:, :, 13:], after[:, :, 13:])


def test_padding_changes_nothing(long_inputs):
    mask = torch.arange(40)[None] >= 7
    before = dilated_attention(*long_inputs, CONFIG, attention_mask=mask)
    torch.testing.assert_close(
        before[:, :, 7:], dilated_attention(*(x[:, :, 7:] for x in long_inputs), CONFIG), atol=1e-12, rtol=0
    )
    for x in long_inputs:
        x[:, :, :7] = float("nan")
    after = dilated_attention(*long_inputs, CONFIG, attention_mask=mask)
    assert torch.equal(before[:, :, 7:], after[:, :, 7:])
    assert (after[:, :, :7] == 0).all()


def test_chunks_equal_the_whole(long_inputs):
    query, key, value = long_inputs
    whole = dilated_attention(query, key, value, CONFIG)
    for begin, end in ((0, 11), (11, 12), (12, 29), (29, 40)):
        part = dilated_attention(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], CONFIG)
        torch.testing.assert_close(part, whole[:, :, begin:end], atol=1e-12, rtol=0)


def test_more_keys_than_branches_reach_are_not_seen(long_inputs):
    query, key, value = long_inputs
    right = reference.dilated_attention(query, key, value, CONFIG, scale=0.7)
    torch.testing.assert_close(dilated_attention(query, key, value, CONFIG, scale=0.7), right, atol=1e-12, rtol=0)
