"""What cannot be done exactly raises, and says what and why."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers as tf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_dilated import ConfigError, DilatedConfig
from hf_dilated.integration.attention import attention_function
from hf_dilated.integration.support import UnsupportedError, uses_attention_interface
from tests.tiny_models import SIZES, inputs, tiny_config, tiny_model, tokens

PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2))


def run(family, **given):
    model = tiny_model(family, "dilated")
    model.config.hf_dilated = PATTERN
    return model(**inputs(family, 1, 12) | given)


@pytest.mark.parametrize(
    "config",
    [
        tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
        tf.CodeGenConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=32),
        tf.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=32, num_layers=1, attention_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_bypass_the_interface(config):
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="dilated")
    with pytest.raises(UnsupportedError, match="computes its attention itself"):
        model(tokens(1, 8))


def test_models_that_keep_their_attention_in_silence_are_known():
    for model in (tf.DebertaV2Model, tf.MPNetModel):
        assert not uses_attention_interface(model.config_class)
    for model in (tf.LlamaModel, tf.ViTModel, tf.ModernBertModel):
        assert uses_attention_interface(model.config_class)


def test_a_family_with_the_model_of_another_uses_the_interface_of_that_one():
    if not hasattr(tf, "InternLM3Config"):
        pytest.skip("newer Transformers")
    assert uses_attention_interface(tf.InternLM3Config)


def test_a_family_is_known_before_its_model_is_loaded():
    code = (
        "from hf_dilated.integration.support import uses_attention_interface as uses;"
        "from transformers import BloomConfig, LlamaConfig;"
        "assert uses(LlamaConfig) and not uses(BloomConfig)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_indexer_of_the_model():
    model = tiny_model("llama", "dilated")
    model.config.index_topk = 4
    with pytest.raises(UnsupportedError, match="index_topk=4: an indexer of the model"):
        model(tokens(1, 8))


def test_a_part_of_the_heads():
    """Tensor parallelism: the weights of a layer are split over ranks."""
    model = tiny_model("llama", "dilated")
    model.config.hf_dilated = PATTERN
    model.config.num_attention_heads *= 2  # as if every rank had half of them
    model(tokens(1, 12))  # some layers have other numbers of heads
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in model.model.layers:
            projection = layer.self_attn.q_proj
            mesh = init_device_mesh("cpu", (1,))
            projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))
            projection.forward = partial(nn.functional.linear, weight=projection.weight.to_local())
        with pytest.raises(UnsupportedError, match="tp_plan: under tensor parallelism LlamaAttention has 4 of its"):
            model(tokens(1, 12))
        model.set_attn_implementation("sdpa")
        model(tokens(1, 12))
    finally:
        torch.distributed.destroy_process_group()


def test_encoder_decoders():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = tf.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=32, **sizes, **ffn)
    model = tf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="dilated")
    with pytest.raises(UnsupportedError, match="is_encoder_decoder"):
        model(tokens(1, 8), decoder_input_ids=tokens(1, 8))


def test_cross_attention_of_a_decoder():
    config = tf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True, attention_probs_dropout_prob=0.0)
    model = tf.AutoModel.from_config(config, attn_implementation="dilated")
    with pytest.raises(UnsupportedError, match="add_cross_attention"):
        model(tokens(1, 8), encoder_hidden_states=torch.zeros(1, 8, 32))


def test_relative_position_bias():
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, is_encoder_decoder=False
    )
    model = tf.T5EncoderModel._from_config(config, attn_implementation="dilated").eval()
    model.config.hf_dilated = PATTERN
    with pytest.raises(UnsupportedError, match="position_bias"):
        model(tokens(1, 8))


def test_softcap():
    with pytest.raises(UnsupportedError, match=r"softcap=50\.0"):
        run("gemma2")


def test_every_layer_windowed():
    with pytest.raises(UnsupportedError, match="every layer of MistralConfig has a window"):
        run("mistral_windowed")


def test_chunked_attention_of_llama4():
    config = tf.Llama4TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=4,
        intermediate_size_mlp=32, layer_types=["chunked_attention", "full_attention"], moe_layers=[],
    )  # fmt: skip
    model = tf.Llama4ForCausalLM._from_config(config, attn_implementation="dilated").eval()
    with pytest.raises(UnsupportedError, match="and_masks"):
        model(tokens(1, 8))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_masks_for_pairs_of_tokens(dtype):
    mask = torch.ones(1, 1, 12, 12).tril().to(dtype)
    with pytest.raises(UnsupportedError, match="a mask for pairs of tokens is dense attention"):
        run("llama", attention_mask=mask)


def test_attention_dropout_only_while_training():
    model = tiny_model("llama", "dilated", attention_dropout=0.1)
    model(tokens(1, 8))
    with pytest.raises(UnsupportedError, match=r"dropout=0.1.*attention_dropout"):
        model.train()(tokens(1, 8))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attention_weights(family):
    with pytest.raises(ValueError, match="output_attentions"):
        run(family, output_attentions=True)


@pytest.mark.parametrize("option", ["phase", "rotate", "dense_layers"])
def test_layers_without_an_index(option):
    value = {"phase": "alternate", "rotate": True, "dense_layers": (0,)}[option]
    model = tiny_model("vit", "dilated")
    model.config.hf_dilated = DilatedConfig.from_dict(PATTERN.to_dict() | {option: value})
    with pytest.raises(UnsupportedError, match="do not know their index"):
        model(**inputs("vit", 1, 1))


def test_a_model_that_does_not_know_its_length():
    with pytest.raises(ConfigError, match=r"max_length.*config\.hf_dilated"):
        tiny_model("vit", "dilated")(**inputs("vit", 1, 1))


def test_continuous_batching():
    model = tiny_model("llama", "dilated")
    with pytest.raises(ValueError, match=r"dilated.* is not supported"):
        model.generate_batch([[3, 4, 5]], generation_config=tf.GenerationConfig(max_new_tokens=2))


class Module(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.config = tiny_config("llama")
        self.config.hf_dilated = PATTERN
        for name, value in settings.items():
            setattr(self.config, name, value)


def call(module=None, queries=6, keys=6, attention_mask=None, **options):
    query, key = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8)
    return attention_function("dilated")(module or Module(), query, key, key, attention_mask, **options)


@pytest.mark.parametrize(
    "name", ["cache", "position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q", "anything"]
)
def test_unknown_arguments_are_named(name):
    call(**{name: None})
    call(**{name: False})
    with pytest.raises(UnsupportedError, match=f"^{name}: "):
        call(**{name: torch.ones(1)})


def test_an_argument_of_the_head_means_nothing_to_attention():
    call(logits_to_keep=1)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(3, 6, False), (6, 3, True), (6, 3, False)])
def test_other_keys_than_the_queries_own(queries, keys, causal):
    with pytest.raises(UnsupportedError, match="cross-attention"):
        call(queries=queries, keys=keys, is_causal=causal)


def test_keys_lengthened_behind_the_mask():
    with pytest.raises(UnsupportedError, match="changed the keys"):
        call(keys=8, attention_mask=torch.arange(6).view(1, 1, 1, 6))


def test_a_window_that_only_the_mask_knows():
    with pytest.raises(UnsupportedError, match="does not pass it"):
        call(Module(sliding_window=4))


def test_a_layer_type_that_cannot_be_counted():
    module = Module(layer_types=["full_attention", "indexed_attention"], num_hidden_layers=2)
    module.config.hf_dilated = DilatedConfig.from_dict(PATTERN.to_dict() | {"rotate": True})
    module.layer_idx = 1
    with pytest.raises(UnsupportedError, match="'indexed_attention'"):
        call(module)
