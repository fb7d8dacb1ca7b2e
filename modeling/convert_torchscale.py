"""Weights of torchscale's LongNet, there and back.

torchscale rotates neighbouring features of a query or key, Transformers the features d and d + D / 2: the rows of
those two projections change places. Everything else has another name only.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_dilated import DilatedConfig
from modeling.configuration_longnet import LongNetConfig

OUTER = {"embed_tokens": "model.embed_tokens", "layer_norm": "model.norm", "output_projection": "lm_head"}
LAYER = {
    "self_attn_layer_norm": "attention_norm",
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.inner_attn_ln": "self_attn.inner_norm",
    "self_attn.out_proj": "self_attn.o_proj",
    "final_layer_norm": "mlp_norm",
    "ffn.fc1": "mlp.up_proj",
    "ffn.ffn_layernorm": "mlp.inner_norm",
    "ffn.fc2": "mlp.down_proj",
}
THEIRS, OURS = "layers.", "model.layers."
# What a model of torchscale must, or must not, have been built with.
REQUIRED = ("subln", "xpos_rel_pos", "{side}_normalize_before")
REFUSED = ("deepnorm", "layernorm_embedding", "moe_freq", "multiway", "rel_pos_buckets")


def config_from_torchscale(arguments: Mapping[str, Any], **options: Any) -> LongNetConfig:
    """Read the arguments of a torchscale LongNet decoder or encoder.

    Args:
        arguments: torchscale's ``DecoderConfig`` or ``EncoderConfig`` as a dictionary.
        options: Further fields of :class:`LongNetConfig`, such as ``max_position_embeddings``.

    Raises:
        ValueError: If the model has parts that LongNet here has not.
    """
    side = "decoder" if "decoder_embed_dim" in arguments else "encoder"
    for name in (option.format(side=side) for option in REQUIRED):
        if not arguments.get(name):
            raise ValueError(f"{name}: only models with {name}=True can be converted")
    for name in REFUSED:
        if arguments.get(name):
            raise ValueError(f"{name}={arguments[name]!r}: models with this option cannot be converted")
    pattern = DilatedConfig(
        segment_lengths=arguments["segment_length"],
        dilation_rates=arguments["dilated_ratio"],
        overlap="count",
        offset="grouped",
    )
    fields: dict[str, Any] = {
        "vocab_size": arguments["vocab_size"],
        "hidden_size": arguments[f"{side}_embed_dim"],
        "intermediate_size": arguments[f"{side}_ffn_embed_dim"],
        "num_hidden_layers": arguments[f"{side}_layers"],
        "num_attention_heads": arguments[f"{side}_attention_heads"],
        "hidden_act": arguments.get("activation_fn", "gelu"),
        "layer_norm_eps": arguments.get("layernorm_eps", 1e-5),
        "xpos_scale_base": arguments.get("xpos_scale_base", 512),
        "scale_embeddings": not arguments.get("no_scale_embedding", True),
        "tie_word_embeddings": bool(arguments.get(f"share_{side}_input_output_embed", False)),
        "is_causal": side == "decoder",
        "hf_dilated": pattern,
    }
    return LongNetConfig(**fields | options)


def from_torchscale(weights: Mapping[str, Tensor], config: LongNetConfig) -> dict[str, Tensor]:
    """Rename and reorder torchscale's weights for ``LongNetForCausalLM`` or ``LongNetForMaskedLM``.

    Args:
        weights: The state of the decoder or encoder.
        config: Of the model that they are for.

    Raises:
        ValueError: If there is a weight that LongNet here has no place for.
    """
    converted = {
        _renamed(name, OUTER, LAYER, THEIRS, OURS): _reordered(name, weight, config, to_halves=True)
        for name, weight in weights.items()
        if not name.endswith("self_attn.xpos.scale")
    }
    if config.tie_word_embeddings:
        converted["lm_head.weight"] = converted["model.embed_tokens.weight"]
    return converted


def to_torchscale(weights: Mapping[str, Tensor], config: LongNetConfig) -> dict[str, Tensor]:
    """Undo :func:`from_torchscale`, the buffers of xPos included.

    Raises:
        ValueError: If the model does not use xPos, which torchscale's LongNet needs.
    """
    if config.position_encoding != "xpos":
        raise ValueError(f"position_encoding: torchscale's LongNet needs xpos, not {config.position_encoding!r}")
    outer, layer = ({ours: theirs for theirs, ours in names.items()} for names in (OUTER, LAYER))
    converted = {
        _renamed(name, outer, layer, OURS, THEIRS): _reordered(name, weight, config, to_halves=False)
        for name, weight in weights.items()
    }
    feature = torch.arange(0, config.head_dim, 2)
    scale = (feature + 0.4 * config.head_dim) / (1.4 * config.head_dim)
    return converted | {f"layers.{n}.self_attn.xpos.scale": scale.clone() for n in range(config.num_hidden_layers)}


def _renamed(name: str, outer: Mapping[str, str], layer: Mapping[str, str], before: str, after: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    number, _, inner = module.removeprefix(before).partition(".")
    if module.startswith(before) and number.isdigit() and inner in layer:
        return f"{after}{number}.{layer[inner]}.{kind}"
    raise ValueError(f"{name}: the other layout has no place for this weight")


def _reordered(name: str, weight: Tensor, config: LongNetConfig, *, to_halves: bool) -> Tensor:
    if not re.search(r"\.[qk]_proj\.", name):
        return weight
    pairs = (config.num_attention_heads, config.head_dim // 2, 2)
    shape = pairs if to_halves else (pairs[0], pairs[2], pairs[1])
    return weight.unflatten(0, shape).transpose(1, 2).reshape(weight.shape)
