"""Tiny random models, one of every family that the tests run: two to four layers, a few thousand weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 64
IMAGE = 32  # pixels along one side of the images that the vision models read

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
HEAD: dict[str, Any] = GROUPED | {"head_dim": 8}
WINDOW = 6


def _llama() -> tf.PreTrainedConfig:
    return tf.LlamaConfig(**GROUPED)


def _mistral() -> tf.PreTrainedConfig:
    return tf.MistralConfig(**HEAD, sliding_window=None)


def _mistral_windowed() -> tf.PreTrainedConfig:
    return tf.MistralConfig(**HEAD, sliding_window=WINDOW)


def _qwen2() -> tf.PreTrainedConfig:
    return tf.Qwen2Config(**GROUPED)


def _qwen2_windowed() -> tf.PreTrainedConfig:
    sizes = GROUPED | {"num_hidden_layers": 4}
    return tf.Qwen2Config(**sizes, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)


def _qwen3() -> tf.PreTrainedConfig:
    return tf.Qwen3Config(**HEAD)


def _gemma2() -> tf.PreTrainedConfig:
    return tf.Gemma2Config(**HEAD, sliding_window=WINDOW, query_pre_attn_scalar=8)


def _gemma2_without_softcap() -> tf.PreTrainedConfig:
    return tf.Gemma2Config(**HEAD, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=None)


def _gemma3() -> tf.PreTrainedConfig:
    layer_types = ["sliding_attention", "full_attention"] * 2
    sizes = HEAD | {"num_hidden_layers": 4}
    return tf.Gemma3TextConfig(**sizes, sliding_window=WINDOW, layer_types=layer_types, query_pre_attn_scalar=8)


def _phi3() -> tf.PreTrainedConfig:
    return tf.Phi3Config(**GROUPED, sliding_window=None)


def _gpt_neox() -> tf.PreTrainedConfig:
    return tf.GPTNeoXConfig(**SIZES)


def _gpt2() -> tf.PreTrainedConfig:
    return tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=1
    )


def _olmo2() -> tf.PreTrainedConfig:
    return tf.Olmo2Config(**GROUPED)


def _granite() -> tf.PreTrainedConfig:
    return tf.GraniteConfig(**GROUPED, attention_multiplier=0.3)


def _smollm3() -> tf.PreTrainedConfig:
    return tf.SmolLM3Config(**GROUPED)


def _mixtral() -> tf.PreTrainedConfig:
    return tf.MixtralConfig(**HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)


def _qwen3_moe() -> tf.PreTrainedConfig:
    return tf.Qwen3MoeConfig(**HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def _gpt_oss() -> tf.PreTrainedConfig:
    layer_types = ["sliding_attention", "full_attention"] * 2
    sizes = HEAD | {"num_hidden_layers": 4}
    return tf.GptOssConfig(
        **sizes, sliding_window=WINDOW, layer_types=layer_types, num_local_experts=4, num_experts_per_tok=2
    )


def _qwen3_next() -> tf.PreTrainedConfig:
    """A hybrid model whose attention layers are all odd."""
    sizes = HEAD | {"num_hidden_layers": 4}
    return tf.Qwen3NextConfig(
        **sizes,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def _bert() -> tf.PreTrainedConfig:
    return tf.BertConfig(**_without_dropout(SIZES))


def _roberta() -> tf.PreTrainedConfig:
    return tf.RobertaConfig(**_without_dropout(SIZES))


def _modernbert() -> tf.PreTrainedConfig:
    sizes = SIZES | {"num_hidden_layers": 4}
    return tf.ModernBertConfig(
        **sizes, global_attn_every_n_layers=2, local_attention=2 * WINDOW, cls_token_id=1, sep_token_id=2
    )


def _vit() -> tf.PreTrainedConfig:
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    return tf.ViTConfig(**sizes, num_attention_heads=4, image_size=IMAGE, patch_size=4, num_labels=8)


def _llava() -> tf.PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.LlavaConfig(
        text_config=tf.LlamaConfig(**GROUPED),
        vision_config=tf.CLIPVisionConfig(**vision, image_size=IMAGE, patch_size=8, projection_dim=32),
        image_token_index=VOCABULARY - 1,
        vision_feature_layer=-1,
    )


def _without_dropout(sizes: dict[str, Any]) -> dict[str, Any]:
    return sizes | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mistral_windowed": _mistral_windowed,
    "qwen2": _qwen2,
    "qwen2_windowed": _qwen2_windowed,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma2_without_softcap": _gemma2_without_softcap,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": _smollm3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "qwen3_next": _qwen3_next,
    "bert": _bert,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "vit": _vit,
    "llava": _llava,
}
WITHOUT_SDPA = ("gemma2", "gemma2_without_softcap", "gpt_oss")
REFUSED = ("mistral_windowed", "gemma2")
ENCODERS = ("bert", "roberta", "modernbert")
VISION = ("vit", "llava")
DECODERS = tuple(name for name in CONFIGS if name not in REFUSED + ENCODERS + VISION)


def tiny_config(family: str) -> tf.PreTrainedConfig:
    """Return a fresh configuration of ``family``, a key of ``CONFIGS``."""
    return CONFIGS[family]()


def model_class(family: str) -> Any:
    """Return the Auto class that builds ``family``."""
    if family in ENCODERS:
        return tf.AutoModelForMaskedLM
    return {"vit": tf.AutoModelForImageClassification, "llava": tf.AutoModelForImageTextToText}.get(
        family, tf.AutoModelForCausalLM
    )


def tiny_model(
    family: str,
    attn_implementation: str | dict[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tf.PreTrainedModel:
    """Build a random model in evaluation mode: the same weights for every backend.

    Args:
        family: A key of ``CONFIGS``.
        attn_implementation: As ``from_config`` takes it; None is the family's own dense attention.
        options: Set on the configuration (of a multimodal model: on its text part) before the model is built.
    """
    config = tiny_config(family)
    for name, value in options.items():
        setattr(config.get_text_config(), name, value)
    if attn_implementation is None:
        attn_implementation = "eager" if family in WITHOUT_SDPA else "sdpa"
    torch.manual_seed(0)
    model = model_class(family).from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    model.set_experts_implementation("eager")  # the grouped product has no float64
    sharpen(model)
    return model.eval()


def sharpen(model: nn.Module) -> None:
    """Enlarge the random weights so that attention is far from uniform and differences show in the output."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
            elif "sink" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Return random token ids (batch, length) without special tokens."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randint(3, VOCABULARY - 1, (batch, length), generator=generator)


def inputs(family: str, batch: int, length: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return what the forward of ``family`` takes; the vision transformer reads a fixed number of patches."""
    if family != "vit" and family != "llava":
        return {"input_ids": tokens(batch, length, seed=seed)}
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    pixels = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
    if family == "vit":
        return {"pixel_values": pixels}
    ids = tokens(batch, length, seed=seed)
    ids[:, 1:17] = VOCABULARY - 1  # 4 x 4 patches
    return {"input_ids": ids, "pixel_values": pixels}
