"""Weights of torchscale's layout against a small reading of their arithmetic, written down here on its own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from modeling import LongNetConfig, LongNetForCausalLM, LongNetForMaskedLM
from modeling.convert_torchscale import config_from_torchscale, from_torchscale, to_torchscale

HEADS, LAYERS, WIDTH, INNER, VOCABULARY = 4, 2, 32, 48, 40
SEGMENTS, RATES = (8, 16, 64), (1, 2, 4)
SCALE_BASE = 32


def arguments(side: str, **options: Any) -> dict[str, Any]:
    own = {"embed_dim": WIDTH, "ffn_embed_dim": INNER, "layers": LAYERS, "attention_heads": HEADS}
    own |= {"normalize_before": True}
    return {
        **{f"{side}_{name}": value for name, value in own.items()},
        "segment_length": list(SEGMENTS), "dilated_ratio": list(RATES), "vocab_size": VOCABULARY, "subln": True,
        "xpos_rel_pos": True, "xpos_scale_base": SCALE_BASE, "layernorm_eps": 1e-5, "no_scale_embedding": False,
        "activation_fn": "gelu", "deepnorm": False, "moe_freq": 0, "multiway": False, "rel_pos_buckets": 0,
        **options,
    }  # fmt: skip


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    weights = {"embed_tokens.weight": draw(VOCABULARY, WIDTH), "output_projection.weight": draw(VOCABULARY, WIDTH)}
    sizes = {f"self_attn.{name}": (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    sizes |= {"ffn.fc1": (INNER, WIDTH), "ffn.fc2": (WIDTH, INNER)}
    norms = {"self_attn_layer_norm": WIDTH, "self_attn.inner_attn_ln": WIDTH, "final_layer_norm": WIDTH}
    norms |= {"ffn.ffn_layernorm": INNER}
    for layer in range(LAYERS):
        for name, shape in sizes.items():
            weights[f"layers.{layer}.{name}.weight"] = 2 * draw(*shape)
            weights[f"layers.{layer}.{name}.bias"] = draw(shape[0])
        for name, size in norms.items():
            weights[f"layers.{layer}.{name}.weight"] = 1 + draw(size)
            weights[f"layers.{layer}.{name}.bias"] = draw(size)
        scale = (torch.arange(0, WIDTH // HEADS, 2) + 0.4 * WIDTH / HEADS) / (1.4 * WIDTH / HEADS)
        weights[f"layers.{layer}.self_attn.xpos.scale"] = scale
    return weights | {"layer_norm.weight": 1 + draw(WIDTH), "layer_norm.bias": draw(WIDTH)}


def xpos(x: Tensor, *, is_key: bool) -> Tensor:
    """(N, D): neighbouring features are one complex number, turned and scaled by its token's place."""
    N, D = x.shape
    angle = torch.arange(N)[:, None] / 10000 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    decay = (torch.arange(0, D, 2, dtype=torch.float64) + 0.4 * D) / (1.4 * D)
    size = decay ** ((torch.arange(N)[:, None] - N // 2) / SCALE_BASE)
    turned = torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous()) * torch.polar(
        1 / size if is_key else size, angle
    )
    return torch.view_as_real(turned).flatten(1)


def meetings(head: int, N: int, *, is_causal: bool) -> Tensor:
    """In how many branches every two tokens meet, (N, N)."""
    count = torch.zeros(N, N, dtype=torch.float64)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    for segment, rate in zip(SEGMENTS, RATES, strict=True):
        residue = head // math.ceil(HEADS / rate)
        kept = (i % segment % rate == residue) & (j % segment % rate == residue)
        count += (i // segment == j // segment) & kept
    return count.tril() if is_causal else count


def longnet(weights: dict[str, Tensor], tokens: Tensor, *, is_causal: bool) -> Tensor:
    """The logits (N, VOCABULARY) of one text."""

    def project(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["embed_tokens.weight"][tokens] * WIDTH**0.5
    D = WIDTH // HEADS
    for layer in (f"layers.{n}" for n in range(LAYERS)):
        normed = norm(f"{layer}.self_attn_layer_norm", x)
        query, key, value = (project(f"{layer}.self_attn.{kind}_proj", normed) for kind in "qkv")
        heads = []
        for head in range(HEADS):
            own = slice(head * D, (head + 1) * D)
            logits = xpos(query[:, own], is_key=False) @ xpos(key[:, own], is_key=True).T / D**0.5
            weight = meetings(head, len(tokens), is_causal=is_causal) * (logits - logits.amax()).exp()
            heads.append(weight @ value[:, own] / weight.sum(1, keepdim=True))
        x = x + project(f"{layer}.self_attn.out_proj", norm(f"{layer}.self_attn.inner_attn_ln", torch.cat(heads, 1)))
        inner = gelu(project(f"{layer}.ffn.fc1", norm(f"{layer}.final_layer_norm", x)))
        x = x + project(f"{layer}.ffn.fc2", norm(f"{layer}.ffn.ffn_layernorm", inner))
    return norm("layer_norm", x) @ weights["output_projection.weight"].T


@pytest.mark.parametrize("side", ["decoder", "encoder"])
@pytest.mark.parametrize("length", [21, 64])
def test_converted_weights_compute_the_same(side: str, length: int) -> None:
    weights = random_weights()
    config = config_from_torchscale(arguments(side), max_position_embeddings=64)
    model_class = LongNetForCausalLM if side == "decoder" else LongNetForMaskedLM
    model = model_class(config).double().eval()
    model.load_state_dict(from_torchscale(weights, config))
    tokens = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(tokens).logits
    expected = torch.stack([longnet(weights, row, is_causal=side == "decoder") for row in tokens])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # angles are rounded to float32
    assert expected.std() > 0.1
    other = torch.stack([longnet(weights, row, is_causal=side != "decoder") for row in tokens])
    assert (found - other).abs().max() > 0.01


def test_there_and_back() -> None:
    weights = random_weights()
    config = config_from_torchscale(arguments("decoder"), max_position_embeddings=64)
    back = to_torchscale(from_torchscale(weights, config), config)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(back[name], weight, rtol=0, atol=0)


def test_shared_embeddings() -> None:
    weights = random_weights()
    del weights["output_projection.weight"]
    config = config_from_torchscale(
        arguments("decoder", share_decoder_input_output_embed=True), max_position_embeddings=64
    )
    model = LongNetForCausalLM(config).double()
    model.load_state_dict(from_torchscale(weights, config))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subln": False}, "subln: only models with subln=True"),
        ({"xpos_rel_pos": False}, "xpos_rel_pos: only"),
        ({"decoder_normalize_before": False}, "decoder_normalize_before: only"),
        ({"deepnorm": True}, "deepnorm=True: models with this option"),
        ({"moe_freq": 2}, "moe_freq=2"),
    ],
)
def test_other_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_torchscale(arguments("decoder", **options))


def test_unknown_weights_are_refused() -> None:
    config = config_from_torchscale(arguments("decoder"), max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"embed_positions\.weight: the other layout has no place"):
        from_torchscale({"embed_positions.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="torchscale's LongNet needs xpos"):
        to_torchscale({}, LongNetConfig(position_encoding="rope"))
