"""LongNet as a model of Transformers.

Sub-layers follow MAGNETO: a norm in front of each, and a second one before its last projection. Attention runs on the
backend that the configuration names, ``"dilated"`` unless told otherwise.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_longnet import LongNetConfig
from .hf_dilated_code import hf_dilated  # noqa: F401  (registers the backends)

Rotation = tuple[Tensor, Tensor, Tensor | None]


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with the whole matrix of weights, which it returns: ``attn_implementation="eager"``."""
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LongNetPositions(nn.Module):
    """Rotations of queries and keys; for xPos with a scale that decays with their distance."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Rotation:
        """Return cosine, sine and scale, (B, N, D) each; the scale is None for RoPE."""
        cos, sin = self.rotary(hidden, position_ids)
        return cos, sin, self._scale(position_ids) if self.config.position_encoding == "xpos" else None

    def _scale(self, position_ids: Tensor) -> Tensor:
        D = self.config.head_dim
        feature = torch.arange(0, D, 2, device=position_ids.device)
        decay = (feature + 0.4 * D) / (1.4 * D)
        # Only distances count. Counting from the middle keeps the powers, whose inverses scale the keys, in range.
        from_middle = (position_ids - self.config.max_position_embeddings // 2) / self.config.xpos_scale_base
        return (decay ** from_middle[..., None]).repeat(1, 1, 2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None) -> Tensor:
    """Rotate (B, H, N, D) in pairs of features (d, d + D / 2), and scale."""
    rotated = states * cos[:, None] + rotate_half(states) * sin[:, None]
    return rotated if scale is None else (rotated * scale[:, None]).to(states.dtype)


class Projection(nn.Linear):
    """A linear layer that knows whether MAGNETO lets it grow with the depth of the model."""

    def __init__(self, features: int, out_features: int, *, grows: bool = True) -> None:
        super().__init__(features, out_features)
        self.grows = grows


class LongNetAttention(nn.Module):
    """Attention of several heads, with a norm over all of them before the output projection."""

    def __init__(self, config: LongNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        self.scaling = config.head_dim**-0.5
        self.q_proj = Projection(config.hidden_size, config.hidden_size, grows=False)
        self.k_proj = Projection(config.hidden_size, config.hidden_size, grows=False)
        self.v_proj = Projection(config.hidden_size, config.hidden_size)
        self.inner_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.o_proj = Projection(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, N, hidden_size), and the weights where the backend has them."""
        B, N, _ = hidden.shape
        query, key, value = (
            projection(hidden).view(B, N, -1, self.config.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin, scale = rotation
        query = rotate(query, cos, sin, scale)
        key = rotate(key, cos, sin, None if scale is None else 1 / scale)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, dense_attention
        )
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)
        return self.o_proj(self.inner_norm(output.reshape(B, N, -1))), weights


class LongNetMLP(nn.Module):
    """Feed-forward network, with a norm between activation and second projection."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.inner_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, N, hidden_size)."""
        return self.down_proj(self.inner_norm(self.activation(self.up_proj(hidden))))


class LongNetLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each added to its input."""

    def __init__(self, config: LongNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = LongNetAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LongNetMLP(config)

    def forward(self, hidden: Tensor, **options: Any) -> Tensor:
        """Return (B, N, hidden_size); options as for :class:`LongNetAttention`."""
        attended, _ = self.self_attn(self.attention_norm(hidden), **options)
        hidden = hidden + dropout(attended, self.dropout, self.training)
        return hidden + dropout(self.mlp(self.mlp_norm(hidden)), self.dropout, self.training)


class LongNetPreTrainedModel(PreTrainedModel):
    """What all LongNet models share: initialisation, and what Transformers may do with them."""

    config: LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LongNetLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": LongNetLayer, "attentions": LongNetAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As MAGNETO: Xavier, and some projections grow with the logarithm of the depth."""
        super()._init_weights(module)
        if isinstance(module, Projection):
            gain = math.sqrt(math.log(2 * self.config.num_hidden_layers)) if module.grows else 1.0
            init.normal_(module.weight, std=gain * math.sqrt(2 / (module.in_features + module.out_features)))


class LongNetModel(LongNetPreTrainedModel):
    """Tokens to features."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LongNetLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.positions = LongNetPositions(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states (B, N, hidden_size); arguments as for every model of Transformers.

        Raises:
            ValueError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: pass exactly one of them")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden * math.sqrt(self.config.hidden_size) if self.config.scale_embeddings else hidden
        hidden = dropout(hidden, self.config.hidden_dropout, self.training)
        if not self.config.is_causal:
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None] + start
        rotation = self.positions(hidden, position_ids)
        mask = self._mask(hidden, attention_mask, past_key_values, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                rotation=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **options,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _mask(self, hidden: Tensor, mask: Tensor | None, cache: Cache | None, position_ids: Tensor) -> Tensor | None:
        given = {"config": self.config, "inputs_embeds": hidden, "attention_mask": mask}
        if self.config.is_causal:
            return create_causal_mask(**given, past_key_values=cache, position_ids=position_ids)
        return create_bidirectional_mask(**given)


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """The next token."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "is_causal: a causal language model needs is_causal=True; for False take LongNetForMaskedLM"
            )
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits (B, N, vocab_size), and the loss where there are labels."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LongNetForMaskedLM(LongNetPreTrainedModel):
    """The tokens behind the masks."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if config.is_causal:
            raise ValueError("is_causal: a masked language model needs is_causal=False in its configuration")
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> MaskedLMOutput:
        """Return the logits (B, N, vocab_size), and the loss of the tokens whose label is not -100."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **options,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LongNetForSequenceClassification(LongNetPreTrainedModel):
    """A class for the whole input: from its last token if the model is causal, else from the mean of its tokens."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits (B, num_labels), and the loss where there are labels (B,).

        Padding is known by ``attention_mask``, or else by the padding token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **options,
        )
        hidden = outputs.last_hidden_state
        logits = self.score(self._pool(hidden, self._real(hidden, input_ids, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _real(self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None:
            return attention_mask.bool()
        if input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)

    def _pool(self, hidden: Tensor, real: Tensor) -> Tensor:
        if self.config.is_causal:
            last = torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        return hidden.where(real[..., None], 0).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
