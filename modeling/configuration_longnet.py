"""Configuration of LongNet."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .hf_dilated_code import hf_dilated

POSITIONS = ("xpos", "rope")
SHORTEST_SEGMENT = 2048
XPOS_REACH = 64  # lengths of xpos_scale_base that float32 and bfloat16 bear


@strict
class LongNetConfig(PreTrainedConfig):
    """LongNet (arXiv:2307.02486): a transformer with dilated attention and sub-layer norm (arXiv:2210.06423).

    Args:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Features of a token.
        intermediate_size: Features inside the feed-forward network.
        num_hidden_layers: Layers.
        num_attention_heads: Heads; each has ``hidden_size / num_attention_heads`` features.
        hidden_act: Activation of the feed-forward network.
        max_position_embeddings: Longest input in tokens.
        position_encoding: ``"xpos"`` (arXiv:2212.10554, causal models only gain from its decay) or ``"rope"``.
        xpos_scale_base: Tokens over which xPos decays; inputs are limited to 64 times as many.
        rope_parameters: As in Transformers; its types of scaling work with both encodings.
        is_causal: Whether a token sees only those before it. False for masked language models.
        scale_embeddings: Multiply embeddings by ``sqrt(hidden_size)``.
        hidden_dropout: Of embeddings and of what each sub-layer adds.
        layer_norm_eps: Of every norm.
        hf_dilated: The pattern (a keyword); by default the paper's, with segments that double from 2048 tokens to
            ``max_position_embeddings`` and rates that double from 1.

    Raises:
        ValueError: If sizes do not fit, or xPos would leave the range of float32.

    Example:
        >>> config = LongNetConfig(max_position_embeddings=8192)
        >>> config.hf_dilated["dilated"]["segment_lengths"], config.hf_dilated["dilated"]["overlap"]
        ([2048, 4096, 8192], 'count')
    """

    model_type = "longnet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    max_position_embeddings: int = 32768
    position_encoding: str = "xpos"
    xpos_scale_base: int = 512
    rope_parameters: dict | None = None
    is_causal: bool = True
    scale_embeddings: bool = True
    hidden_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        if self.hf_dilated is None:
            segments = [min(SHORTEST_SEGMENT, self.max_position_embeddings)]
            while segments[-1] < self.max_position_embeddings:
                segments.append(2 * segments[-1])
            self.hf_dilated = hf_dilated.DilatedConfig.longnet(
                segments, [1 << branch for branch in range(len(segments))]
            )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def initializer_range(self) -> float:
        """Standard deviation of embeddings: with ``scale_embeddings`` their features have a variance of 1."""
        return self.hidden_size**-0.5

    def validate_architecture(self) -> None:
        """Check what the fields say together; called by Transformers."""
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size: {self.hidden_size} features do not give {self.num_attention_heads} heads of an even size"
            )
        if self.position_encoding not in POSITIONS:
            raise ValueError(f"position_encoding: expected one of {POSITIONS}, got {self.position_encoding!r}")
        longest = XPOS_REACH * self.xpos_scale_base
        if self.position_encoding == "xpos" and self.max_position_embeddings > longest:
            raise ValueError(
                f"max_position_embeddings: xPos with xpos_scale_base={self.xpos_scale_base} leaves the range of "
                f'float32 beyond {longest:,} tokens; raise xpos_scale_base, or choose position_encoding="rope"'
            )
