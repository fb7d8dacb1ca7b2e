"""``torch.compile(fullgraph=True)``: no graph breaks, same numbers."""

import pytest
import torch
from torch import nn
from torch._dynamo.variables import functions
from transformers import BigBirdPegasusConfig, BigBirdPegasusForCausalLM, MistralConfig, MistralModel, masking_utils

from hf_dilated import DilatedConfig
from hf_dilated.integration.attention import attention_function
from hf_dilated.integration.masks import FORMS
from hf_dilated.integration.support import UnsupportedError
from tests.tiny_models import tiny_config, tiny_model, tokens

PATTERN = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate")
WINDOWED = MistralConfig(sliding_window=4, attn_implementation="dilated")
MODELS = (MistralModel,)  # loaded, as they are when a model asks for its mask


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(function, backend="eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def model_of(family, **options):
    model = tiny_model(family, "dilated", **options)
    model.config.hf_dilated = PATTERN
    return model


def test_a_model_and_its_gradients_are_one_graph():
    ids = tokens(2, 40)
    packed = {"position_ids": torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1), "use_cache": False}
    found = []
    for compiled in (False, True):
        model = model_of("llama", num_hidden_layers=1)
        run = one_graph(model, "aot_eager") if compiled else model
        output = run(ids, labels=ids, **packed)
        output.loss.backward()
        found.append((output.logits, model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(found[1], found[0])


def test_only_plain_values_are_taken_for_constants(monkeypatch):
    """The compiler of torch 2.11 takes nothing else; later ones also take objects."""
    store, seen = functions.invoke_and_store_as_constant, []

    def strict(tx, function, name, arguments, options):
        seen.extend(value.as_python_constant() for value in [*arguments, *options.values()])
        return store(tx, function, name, arguments, options)

    monkeypatch.setattr(functions, "invoke_and_store_as_constant", strict)
    model = tiny_model("llama", "dilated", num_hidden_layers=1)
    with torch.no_grad():
        one_graph(model)(tokens(1, 8))
    assert all(value is None or isinstance(value, str | int | tuple | type) for value in seen)
    assert "LlamaConfig" in seen


def test_an_encoder_is_one_graph():
    model, ids = model_of("bert"), tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(one_graph(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoder_whose_layers_do_not_know_that_they_are_causal(compiled):
    sizes = {"vocab_size": 64, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    config = BigBirdPegasusConfig(**sizes, max_position_embeddings=64)
    config.hf_dilated = PATTERN
    model = BigBirdPegasusForCausalLM._from_config(config, attn_implementation="dilated").eval()
    run = one_graph(model) if compiled else model
    ids = tokens(2, 40)
    changed = torch.cat([ids[:, :30], ids[:, 30:].flip(1)], 1)
    with torch.no_grad():
        torch.testing.assert_close(run(ids).logits[:, :30], run(changed).logits[:, :30])


def test_layers_compiled_one_by_one_keep_their_own_pattern():
    model, ids = model_of("llama"), tokens(1, 40)
    with torch.no_grad():
        expected = model(ids).logits
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(ids).logits, expected)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = tiny_config("llama")
        self.config.hf_dilated = PATTERN
        self.layer_idx = 1

    def forward(self, query, key, value):
        return attention_function("dilated")(self, query, key, value, None)[0]


def test_a_changed_pattern_compiles_again():
    module = Attention()
    tensors = [torch.randn(1, heads, 40, 8) for heads in (4, 2, 2)]
    compiled = one_graph(module)
    before = compiled(*tensors)
    module.config.hf_dilated = DilatedConfig(segment_lengths=(4,), dilation_rates=(1,))
    after = compiled(*tensors)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, module(*tensors))


@pytest.mark.parametrize(
    ("builder", "given"),
    [
        ("create_causal_mask", {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}),
        ("create_causal_mask", {"position_ids": torch.tensor([[0, 1, 2, 3, 4]])}),
        ("create_causal_mask", {"attention_mask": torch.tensor([[0, 1, 1, 1, 0]])}),
        ("create_sliding_window_causal_mask", {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}),
        ("create_sliding_window_causal_mask", {"attention_mask": torch.tensor([[0, 1, 1, 1, 0]])}),
        ("create_bidirectional_sliding_window_mask", {"attention_mask": torch.tensor([[0, 1, 1, 1, 0]])}),
    ],
)
def test_masks_are_the_same_while_tracing(builder, given):
    given = {"attention_mask": None, "past_key_values": None} | given

    def build(embeddings):
        return getattr(masking_utils, builder)(WINDOWED, embeddings, **given)

    embeddings = torch.zeros(1, 5, 8)
    expected = build(embeddings)
    found = one_graph(build)(embeddings)
    assert FORMS[found.dtype].is_causal == FORMS[expected.dtype].is_causal
    expected = expected if FORMS[expected.dtype].has_positions else torch.arange(5).view(1, 1, 1, 5)
    assert torch.equal(found, expected.to(found.device))


@pytest.mark.parametrize(
    ("builder", "given", "seen"),
    [
        ("create_causal_mask", {"block_sequence_ids": torch.tensor([[-1, 0, 0, -1]])}, "or_masks"),
        ("create_causal_mask", {"and_mask_function": lambda b, h, q, kv: kv < 2}, "and_masks"),
        ("create_chunked_causal_mask", {}, "and_masks"),
    ],
)
def test_masks_with_additions_are_refused_while_tracing(builder, given, seen):
    config = MistralConfig(attn_implementation="dilated")
    config.attention_chunk_size = 2

    def build(embeddings):
        return getattr(masking_utils, builder)(config, embeddings, None, None, **given)

    words = f"{seen}|Observed exception"  # torch 2.11 keeps the words of an error to itself
    with pytest.raises((UnsupportedError, torch._dynamo.exc.TorchDynamoException), match=words):
        one_graph(build)(torch.zeros(1, 4, 8))
