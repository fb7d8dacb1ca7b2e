"""Attention modules for models that do not come from Transformers: same engine, same memory policy."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from hf_dilated.config import ConfigError, MemoryConfig, RingConfig
from hf_dilated.config.checks import at_least, integer
from hf_dilated.functional import known_positions
from hf_dilated.integration.backends import BACKENDS, Backend
from hf_dilated.memory import MemoryPolicy
from hf_dilated.memory.policy import resolve
from hf_dilated.memory.profile import measured_thresholds

TYPES: dict[str, Backend] = dict(BACKENDS)


def register_attention_type(backend: Backend) -> None:
    """Let the factories make another type of attention.

    Example:
        >>> import dataclasses
        >>> register_attention_type(dataclasses.replace(TYPES["dilated"], name="mine"))
        >>> create_dilated_attention("mine", segment_lengths=(16, 32), dilation_rates=(1, 2)).backend.name
        'mine'
        >>> del TYPES["mine"]
    """
    TYPES[backend.name] = backend


class Attention(nn.Module):
    """Attention along a pattern, without weights; made by the factories.

    Attributes:
        backend: What runs.
        config: The pattern.
        memory: Where its large tensors come from, and why.
    """

    def __init__(
        self,
        backend: Backend,
        config: Any,
        memory: MemoryPolicy,
        *,
        is_causal: bool = True,
        scale: float | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.config = config
        self.memory = memory
        self.is_causal = is_causal
        self.scale = scale
        self._pattern = backend.pattern(config, layer)
        self._memory = memory.spec

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, H, N, D); the queries are the last N of the M tokens.
            key: (B, G, M, D), G a divisor of H.
            value: (B, G, M, Dv).
            attention_mask: (B, M) bool, True for real tokens.
            position_ids: (B, N) or (B, M); a document starts where an entry is not its predecessor's plus one.

        Returns:
            (B, H, N, Dv).
        """
        output = self.backend.attend(
            query, key, value, self._pattern,
            is_causal=self.is_causal, scale=self.scale, memory=self._memory,
            key_positions=known_positions(query, key, attention_mask, position_ids),
        )  # fmt: skip
        assert isinstance(output, Tensor)  # the log-sum-exp was not asked for
        return output

    def extra_repr(self) -> str:
        """Say what it runs."""
        return f"{self.backend.name}, memory={self.memory.mode} ({self.memory.reason})"


class MultiheadAttention(nn.Module):
    """Multi-head attention with projections, batch first; made by :func:`create_multihead_dilated_attention`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention: Attention,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_counts(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=kv_heads)
        if embed_dim % num_heads or num_heads % kv_heads:
            raise ConfigError(
                f"num_heads: {num_heads} heads have to divide embed_dim={embed_dim}, and be a multiple of the "
                f"{kv_heads} num_kv_heads"
            )
        self.head_dim = embed_dim // num_heads
        self.attention = attention
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, N, E).
            key: (B, M, E), of which the queries are the last N tokens; the query by default.
            value: (B, M, E); the key by default.
            attention_mask: (B, M) bool, True for real tokens.
            position_ids: (B, N) or (B, M); see :meth:`Attention.forward`.

        Returns:
            (B, N, E).
        """
        key = query if key is None else key
        value = key if value is None else value
        projected = ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        heads = [proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for proj, x in projected]
        output = self.attention(*heads, attention_mask, position_ids)
        return self.out_proj(output.transpose(1, 2).flatten(2))


def create_dilated_attention(
    attention_type: str = "auto",
    *,
    max_seq_len: int | None = None,
    num_heads: int = 32,
    config: Any = None,
    is_causal: bool = True,
    scale: float | None = None,
    layer: int = 0,
    memory: MemoryConfig | None = None,
    **pattern: Any,
) -> Attention:
    """Make a module that attends along a pattern.

    Args:
        attention_type: A registered type. ``"auto"`` is ``"dilated"``: it never changes who attends to whom.
        max_seq_len: Longest input, in tokens. Decides about the pattern, if none is given, and about memory.
        num_heads: Query heads; the pattern that is chosen for ``max_seq_len`` depends on them.
        config: The pattern, for instance a :class:`hf_dilated.DilatedConfig`. How ranks share sequences
            (:class:`hf_dilated.RingConfig`) is said to ``sequence_parallel``.
        is_causal: Whether tokens see only earlier ones.
        scale: Factor of the scores; ``1 / sqrt(D)`` by default.
        layer: Ordinal of the layer, where the pattern depends on it.
        memory: Explicit settings of the memory pool; everything else is chosen by the longest input.
        pattern: Instead of ``config``, its fields.

    Raises:
        ConfigError: If the type is unknown, a number is below 1, nothing says what the pattern is, or a setting belongs
            to ``sequence_parallel``.

    Example:
        >>> import torch
        >>> attention = create_dilated_attention(segment_lengths=(2048, 4096, 8192), dilation_rates=(1, 2, 4))
        >>> attention.memory.mode, attention.memory.reason
        ('full', '8,192 tokens, full from 8,192')
        >>> query, key, value = (torch.randn(1, 8, 256, 64) for _ in range(3))
        >>> attention(query, key, value).shape
        torch.Size([1, 8, 256, 64])
        >>> create_dilated_attention("sparse", max_seq_len=8192)
        Traceback (most recent call last):
        ...
        hf_dilated.config.checks.ConfigError: attention_type: expected one of 'auto', 'dilated', ..., got 'sparse'
    """
    backend = _backend(attention_type, automatic="dilated")
    _check_counts(num_heads=num_heads, max_seq_len=max_seq_len)
    config = _config(backend, config, pattern, max_seq_len, num_heads)
    policy = _policy(backend, config, max_seq_len, memory or MemoryConfig())
    return Attention(backend, config, policy, is_causal=is_causal, scale=scale, layer=layer)


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    *,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    bias: bool = True,
    **options: Any,
) -> MultiheadAttention:
    """Make a module with projections around the attention of :func:`create_dilated_attention`.

    Args:
        attention_type: A registered type; ``"auto"`` is ``"dilated"``.
        embed_dim: Size of a token, E.
        num_heads: Query heads H.
        num_kv_heads: Key-value heads G; as many as query heads by default.
        bias: Whether the projections have biases.
        options: Arguments of :func:`create_dilated_attention`.

    Example:
        >>> import torch
        >>> attention = create_multihead_dilated_attention(embed_dim=256, num_heads=8, max_seq_len=4096)
        >>> attention(torch.randn(2, 100, 256)).shape
        torch.Size([2, 100, 256])
        >>> attention.attention.memory.mode
        'lightweight'
    """
    attention = create_dilated_attention(attention_type, num_heads=num_heads, **options)
    return MultiheadAttention(embed_dim, num_heads, attention, num_kv_heads=num_kv_heads, bias=bias)


def create_block_sparse_attention(attention_type: str = "auto", **options: Any) -> Attention:
    """Make a module that attends to blocks.

    Args:
        attention_type: A registered type; ``"auto"`` is ``"block_sparse"``.
        options: Arguments of :func:`create_dilated_attention`; fields of :class:`hf_dilated.BlockSparseConfig`.

    Example:
        >>> import torch
        >>> attention = create_block_sparse_attention(block_size=64, local_blocks=2, global_blocks=1)
        >>> query, key, value = (torch.randn(1, 8, 300, 32) for _ in range(3))
        >>> attention(query, key, value).shape
        torch.Size([1, 8, 300, 32])
        >>> attention.memory.reason
        'block_sparse is always pooled'
    """
    return create_dilated_attention("block_sparse" if attention_type == "auto" else attention_type, **options)


def _backend(attention_type: str, automatic: str) -> Backend:
    name = automatic if attention_type == "auto" else attention_type
    if name not in TYPES:
        known = ", ".join(map(repr, ["auto", *TYPES]))
        raise ConfigError(f"attention_type: expected one of {known}, got {attention_type!r}")
    return TYPES[name]


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None:
            at_least(name, (integer(name, count),), 1)


def _config(backend: Backend, config: Any, pattern: dict[str, Any], max_seq_len: int | None, num_heads: int) -> Any:
    if config is not None and pattern:
        raise ConfigError(f"config: already says what {', '.join(pattern)} would; pass one or the others")
    if config is not None:
        if not isinstance(config, backend.config_class):
            raise ConfigError(
                f"config: {backend.name!r} needs a {backend.config_class.__name__}, got {type(config).__name__}"
            )
        return _of_module(config)
    if pattern:
        return _of_module(backend.config_class.from_dict(pattern))
    if max_seq_len is None:
        raise ConfigError(f"config: pass {backend.example}, its fields, or max_seq_len=… to have one chosen")
    model = SimpleNamespace(max_position_embeddings=max_seq_len, num_attention_heads=num_heads)
    return backend.config_class.from_model_config(model)


def _of_module(config: Any) -> Any:
    """Refuse settings that belong to the ranks, not to one module."""
    if isinstance(config, RingConfig) and config != (default := RingConfig()):
        ours, theirs = config.to_dict(), default.to_dict()
        given = ", ".join(f"{name}={value!r}" for name, value in ours.items() if value != theirs[name])
        raise ConfigError(
            f"{given}: holds for all attention of a group; pass sequence_parallel(config=RingConfig({given})) instead"
        )
    return config


def _policy(backend: Backend, config: Any, max_seq_len: int | None, memory: MemoryConfig) -> MemoryPolicy:
    longest = max((max_seq_len or 0, *getattr(config, "segment_lengths", ())))
    return resolve(memory, longest, backend.name, measured_thresholds())
