"""Losses by position: against the model's own loss, and windows against what they are said to see."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dilated.evaluation.perplexity import PeakMemory, perplexity_by_position, read, read_in_windows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def document():
    return torch.randint(50, (45,), generator=torch.Generator().manual_seed(1))


def test_losses_are_those_of_the_model(model, document):
    reading = read(model, document)
    assert reading.losses.shape == document.shape
    assert reading.losses[0].isnan()
    assert reading.seconds > 0
    own = model(input_ids=document[None], labels=document[None]).loss.item()
    assert reading.losses[1:].mean().item() == pytest.approx(own, rel=1e-5)


def test_losses_are_taken_in_parts_without_a_difference(model, document, monkeypatch):
    whole = read(model, document).losses
    monkeypatch.setattr("hf_dilated.evaluation.perplexity.ROWS_AT_ONCE", 7)
    torch.testing.assert_close(read(model, document).losses, whole, equal_nan=True)


def test_reading_ignores_dropout(document):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.9, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    torch.testing.assert_close(read(model, document).losses, read(model, document).losses, equal_nan=True)


def test_windows_see_what_they_should(model, document):
    losses = read_in_windows(model, document, 16).losses
    for token in range(1, len(document)):
        start = max(0, (token - 8) // 8 * 8)  # the first window that ends behind the token
        context = document[start:token]
        assert 1 <= len(context) < 16
        assert len(context) >= min(8, token)
        logits = model(input_ids=context[None]).logits[0, -1]
        expected = -logits.log_softmax(0)[document[token]].item()
        assert losses[token].item() == pytest.approx(expected, rel=1e-4), token


def test_one_window_is_one_pass(model, document):
    torch.testing.assert_close(
        read_in_windows(model, document, 45).losses, read(model, document).losses, equal_nan=True
    )


def test_perplexity_averages_tokens_not_documents():
    long, short = torch.tensor([math.nan, 1.0, 1.0, 1.0, 5.0]), torch.tensor([math.nan, 4.0])
    first, second = perplexity_by_position([long, short], [0, 3, 8, 16])
    assert (first.start, first.stop, first.tokens) == (0, 3, 3)
    assert first.perplexity == pytest.approx(math.exp(2))
    assert (second.start, second.stop, second.tokens) == (3, 8, 2)
    assert second.perplexity == pytest.approx(math.exp(3))


@pytest.mark.parametrize("reader", [read, lambda model, tokens: read_in_windows(model, tokens, 8)])
@pytest.mark.parametrize("shape", [(1, 8), (1,), (0,)])
def test_only_one_document_of_at_least_two_tokens(model, reader, shape):
    with pytest.raises(ValueError, match=r"input_ids: expected the \(N,\) tokens of one document"):
        reader(model, torch.zeros(shape, dtype=torch.long))


def test_a_window_has_two_tokens(model, document):
    with pytest.raises(ValueError, match="window: expected at least 2 tokens, got 1"):
        read_in_windows(model, document, 1)


def test_peak_memory_is_the_peak_of_the_block():
    memory = PeakMemory(torch.device("cpu"))
    with memory.measured():
        block = torch.ones(64 << 20)
        del block
    if memory.peak_bytes is None:
        pytest.skip("this system does not tell the peak")
    assert 250e6 < memory.peak_bytes < 400e6
    with memory.measured():
        torch.ones(1 << 20)
    assert memory.peak_bytes < 100e6
