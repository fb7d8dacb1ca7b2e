"""A tiny random model of any family, from its default configuration."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

LAYERS = 8  # enough for every alternation of layers that is in use
HEADS, KV_HEADS, HEAD, HIDDEN, VOCABULARY, POSITIONS = 4, 2, 16, 64, 96, 512

# By the names that configurations use. What a family does not have is not touched.
_SIZES: list[tuple[float, str]] = [
    (0, "pad_token_id"),
    (
        HIDDEN,
        "hidden_size n_embd d_model dim emb_dim n_embed embedding_size embed_dim word_embed_proj_dim "
        "intermediate_size ffn_dim ffn_hidden_size n_inner d_ff decoder_ffn_dim encoder_ffn_dim hidden_dim "
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size dense_intermediate_size intermediate_size_mlp lru_width dim_ff "
        "hidden_size_per_layer_input decoder_hidden_size feed_forward_size attention_hidden_size d_inner "
        "mamba_d_ssm",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_key_heads "
        "mamba_n_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads n_head_kv num_experts_per_tok num_experts_per_token moe_topk moe_k "
        "top_k_experts moe_num_active_primary_experts num_selected_experts",
    ),
    (
        HEAD,
        "head_dim attention_head_dim kv_channels d_kv v_head_dim qk_head_dim q_lora_rank kv_lora_rank "
        "linear_key_head_dim linear_value_head_dim qk_nope_head_dim global_head_dim index_head_dim "
        "mamba_d_state mamba_chunk_size",
    ),
    (8, "qk_rope_head_dim rotary_dim index_topk"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
        "moe_layer_start_index",
    ),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input encoder_vocab_size decoder_vocab_size"),
    (
        POSITIONS,
        "max_position_embeddings n_positions max_seq_len seq_length max_sequence_length n_ctx max_target_positions",
    ),
    (
        0.0,
        "attention_dropout attention_probs_dropout_prob hidden_dropout_prob dropout attn_pdrop "
        "resid_pdrop embd_pdrop activation_dropout hidden_dropout classifier_dropout attn_dropout layerdrop",
    ),
    (2, "eos_token_id bos_token_id decoder_start_token_id sep_token_id cls_token_id"),
]
SIZES = {name: size for size, names in _SIZES for name in names.split()}

ATTENTION_IN_TWO = ["linear_attention", "full_attention"] * (LAYERS // 2)
ZAMBA = {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS, "num_key_value_heads": HEADS}
# Where sizes depend on one another in a family's own way.
OWN: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": HEADS, "new_decoder_architecture": True},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1, 3, 5, 7]},
    "granitemoehybrid": {"layer_types": ATTENTION_IN_TWO},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "mamba2": {"num_heads": 2 * HEADS, "chunk_size": HEAD},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2), "chunk_size": HEAD},
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
}
LATENT = {"num_key_value_heads": HEADS, "head_dim": 8}  # where keys and values come from one latent vector


def tiny_config(config_class: type[PreTrainedConfig], *, is_decoder: bool) -> PreTrainedConfig:
    """Return a configuration of a family with everything small that its constructor lets be small."""
    values = _small(config_class)
    if is_decoder and hasattr(config_class(), "is_decoder"):
        values["is_decoder"] = True
    return config_class(**values)


def _small(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    default = config_class()
    alias = default.attribute_map
    parameters = _parameters(config_class)
    known = {name for name in SIZES if isinstance(_get(default, name), int | float)} | SIZES.keys() & parameters
    known = {name for name in known if alias.get(name) not in known and not _is_computed(config_class, name)}
    values: dict[str, Any] = {name: SIZES[name] for name in known if not isinstance(_get(default, name), list)}
    if "kv_lora_rank" in values:
        values |= {name: size for name, size in LATENT.items() if name in values}
        values.pop("qk_head_dim", None)
    for name in default.sub_configs:
        part = _get(default, name)
        if isinstance(part, PreTrainedConfig):
            values[name] = {"model_type": part.model_type, **_small(type(part))}
    return values | _rotary(default) | OWN.get(config_class.model_type, {})


def _get(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # differs between layers
        return None


def _is_computed(config_class: type[PreTrainedConfig], name: str) -> bool:
    found = getattr(config_class, name, None)
    return isinstance(found, property) and found.fset is None


def _parameters(config_class: type[PreTrainedConfig]) -> set[str]:
    return set(inspect.signature(config_class.__init__).parameters)


def _rotary(default: PreTrainedConfig) -> dict[str, Any]:
    """Sections of rotary dimensions, scaled to the small head."""
    parameters = getattr(default, "rope_parameters", None)
    if not isinstance(parameters, dict) or "mrope_section" not in parameters:
        return {}
    return {"rope_parameters": parameters | {"mrope_section": [2, 3, 3]}}


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Give the weights sizes at which attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2 and weight.is_floating_point():
                weight.normal_(0, 1.5 / max(1, weight.shape[-1]) ** 0.5, generator=generator)
