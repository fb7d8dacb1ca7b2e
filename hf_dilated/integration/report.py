"""What every layer of a model really runs, found by running the model without weights."""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from hf_dilated.config import ConfigError
from hf_dilated.integration.attention import attention_function, causality
from hf_dilated.integration.backends import BACKENDS, DENSE
from hf_dilated.integration.layers import backend_config, layer_pattern
from hf_dilated.integration.loading import brings_model
from hf_dilated.integration.memory import module_policy
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.support import UnsupportedError, check_model
from hf_dilated.memory import MemoryPolicy
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern, Pattern

Kind = Literal["pattern", "dense", "windowed", "own attention", "refused"]
TOKENS = 8


class ReportError(RuntimeError):
    """A model of which nothing can be said: it cannot be built or run without its weights."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one attention layer runs, and why.

    Args:
        name: The module's name in the base model.
        kind: ``"pattern"``, ``"dense"`` or ``"windowed"`` by this package; ``"own attention"`` by the model itself;
            ``"refused"`` raises when the model runs.
        why: The reason, in words.
        ordinal: Place among the layers that run the pattern, where phase or rotation make that matter.
        memory: Where its large tensors come from, and why; None if this package does not allocate them.
    """

    name: str
    kind: Kind
    why: str
    ordinal: int = 0
    memory: MemoryPolicy | None = None

    @property
    def index(self) -> int:
        """Place in its stack: the first number in its name; 0 if there is none."""
        number = re.search(r"\d+", self.name)
        return int(number[0]) if number else 0


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """The layers of a model, and the pattern that those of kind ``"pattern"`` run.

    Args:
        backend: Name of the backend.
        pattern: Its configuration.
        heads: Query heads H.
        kv_heads: Key-value heads G.
        is_stored: Whether the configuration holds the pattern; otherwise it suits the model's length.
        unseen: Submodels that a forward pass of plain text or plain images does not reach.
    """

    model: str
    backend: str
    pattern: Any
    layers: tuple[LayerReport, ...]
    is_causal: bool
    heads: int
    kv_heads: int
    is_stored: bool
    unseen: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether the model runs, and at least one layer runs the pattern."""
        kinds = {layer.kind for layer in self.layers}
        return "pattern" in kinds and "refused" not in kinds

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a ``dense_length`` of None means any length."""
        layers = [
            {"name": layer.name, "runs": layer.kind, "why": layer.why, "memory": layer.memory and layer.memory.mode}
            for layer in self.layers
        ]
        names = ("model", "backend", "is_causal", "heads", "kv_heads", "is_stored", "runs")
        values = {name: getattr(self, name) for name in names}
        values["dense_length"] = None if self.is_dense else self.dense_length
        return values | {"pattern": self.pattern.to_dict(), "layers": layers, "unseen": list(self.unseen)}

    @property
    def dense_length(self) -> int:
        """Longest document, in tokens, for which every layer is exactly the dense model's."""
        ordinals = [layer.ordinal for layer in self.layers if layer.kind == "pattern"]
        return min((self.pattern.dense_length(ordinal) for ordinal in ordinals), default=0)

    @property
    def is_dense(self) -> bool:
        """Whether that is any length: the pattern is dense attention, shared among ranks."""
        return self.dense_length == sys.maxsize


def report(config: PreTrainedConfig, backend: str | None = None) -> ModelReport:
    """Report what a backend does to every layer of a model.

    The model is built on the meta device: neither weights nor memory are needed, only the configuration.

    Args:
        config: The model's configuration.
        backend: The value of ``attn_implementation``; by default the stored one, else ``"dilated"``.

    Raises:
        UnsupportedError: If the model as a whole cannot run the pattern, with the reason.
        ReportError: If the model cannot be run without weights.
        ConfigError: If no pattern is stored and none can be chosen.

    Example:
        >>> from transformers import Qwen2Config
        >>> windows = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
        >>> [layer.kind for layer in report(Qwen2Config(num_hidden_layers=2, **windows)).layers]
        ['pattern', 'windowed']
    """
    config = copy.deepcopy(config)
    config._attn_implementation = None
    model = _build(config)
    text_config = model.config.get_text_config()
    check_model(text_config)
    stored = stored_config(text_config)
    backend = backend or stored.attn_implementation or "dilated"
    if backend not in BACKENDS:
        raise ConfigError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    text_config._attn_implementation = backend
    calls = _record(model, backend)
    if not calls:
        raise UnsupportedError(
            f"{type(model).__name__} never asks for an attention function: it has no attention, or computes it itself "
            "and would ignore this backend"
        )
    layers = [_classify(call, backend) for call in calls]
    return ModelReport(
        model=type(model).__name__,
        backend=backend,
        pattern=backend_config(text_config, backend),
        layers=tuple(sorted([*layers, *_own_attention(model, calls)], key=_natural)),
        is_causal=calls[0].is_causal,
        heads=calls[0].heads,
        kv_heads=calls[0].kv_heads,
        is_stored=getattr(stored, BACKENDS[backend].part) is not None,
        unseen=tuple(_unseen(model, calls)),
    )


def keys_per_query(
    pattern: DilatedPattern, length: int, *, heads: int, kv_heads: int, is_causal: bool = True
) -> list[float]:
    """Count the keys that a query of a document sees, on average over queries and heads.

    Returns:
        The sinks' share, then what every branch adds: with ``overlap="once"`` only keys that no smaller branch sees.

    Example:
        >>> from hf_dilated import DilatedConfig
        >>> config = DilatedConfig(segment_lengths=(2048, 4096), dilation_rates=(1, 2))
        >>> keys_per_query(DilatedPattern(config=config), 4096, heads=8, kv_heads=8)
        [0.0, 1024.5, 256.0]
    """
    config = pattern.config
    sinks = min(config.sink_tokens, length)
    start = config.phase_of(pattern.layer)
    stop = start + length - sinks
    to_sinks = sinks * (sinks + 1) // 2 + sinks * (length - sinks) if is_causal else length**2 - (length - sinks) ** 2
    shares = [to_sinks / length]
    inner = None
    for segment, rate in zip(config.segment_lengths, config.dilation_rates, strict=True):
        pairs = 0
        for head in range(heads):
            residue = pattern.residue(head, rate, heads, kv_heads)
            pairs += _pairs(start, stop, segment, rate, residue, is_causal)
            if inner is not None and config.overlap == "once":
                pairs -= _pairs(start, stop, inner, rate, residue, is_causal)
        shares.append(pairs / heads / length)
        inner = segment
    return shares


def _pairs(start: int, stop: int, segment: int, rate: int, residue: int, is_causal: bool) -> int:
    """Pairs of grid tokens in [start, stop) that share a segment and have the residue in it."""
    total = 0
    for first in range(start // segment * segment, stop, segment):
        before = max(0, -(-(max(start, first) - first - residue) // rate))
        kept = max(0, -(-(min(stop, first + segment) - first - residue) // rate)) - before
        total += kept * (kept + 1) // 2 if is_causal else kept**2
    return total


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the attention function."""

    name: str
    module: nn.Module
    heads: int
    kv_heads: int
    is_causal: bool
    sliding_window: int | None
    error: UnsupportedError | None


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    make = _own_code(config) or _model_class(config)
    if make is None:
        raise ReportError(f"Transformers has no single model class for {type(config).__name__}")
    try:
        with torch.device("meta"):
            return make(config).eval()
    except Exception as error:
        raise ReportError(
            f"the model of {type(config).__name__} cannot be built from this configuration: {error}"
        ) from error


def _own_code(config: PreTrainedConfig) -> Callable[..., PreTrainedModel] | None:
    """The code that a checkpoint brings, if its configuration runs it already: then the caller has trusted it."""
    if not brings_model(config):
        return None
    names = sorted(name for name in getattr(config, "auto_map", None) or () if name.startswith("AutoModel"))
    return partial(getattr(transformers, names[0]).from_config, trust_remote_code=True) if names else None


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    model_class = AutoModel._model_mapping.get(type(config), None)
    if model_class is None:
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        model_class = next((found for found in named if found is not None), None)
    return model_class if isinstance(model_class, type) else None


def _record(model: PreTrainedModel, backend: str) -> list[_Call]:
    """Run a few tokens through the model and note how it asks for attention."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[_Call] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        error = None
        try:
            mask = None if attention_mask is None else _real(attention_mask)
            known: dict[str, Any] = {
                name: _real(value) if isinstance(value, Tensor) else value for name, value in options.items()
            }
            attention_function(backend)(module, _real(query), _real(key), _real(value), mask, **known)
        except UnsupportedError as refusal:
            error = refusal
        calls.append(
            _Call(
                name=names.get(module, type(module).__name__),
                module=module,
                heads=query.shape[1],
                kv_heads=key.shape[1],
                is_causal=causality(module, None if error else attention_mask, options.get("is_causal")),
                sliding_window=options.get("sliding_window"),
                error=error,
            )
        )
        return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3]), None

    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the others look at the values of the routing
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # the default one alone never looks at the values of the positions
        if isinstance(kinds, str):
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")
    model.config.get_text_config().use_cache = True  # without a cache the mask looks at the values of the positions
    inputs = _inputs(model)
    try:
        with _registered(backend, attend), torch.no_grad():
            model(**inputs)
    except (UnsupportedError, ConfigError):
        raise
    except Exception as error:
        raise ReportError(
            f"{type(model).__name__} does not run without weights on {', '.join(inputs)} alone: {error}. A report on "
            "one of its parts, such as config.text_config, may work"
        ) from error
    return calls


@contextmanager
def _registered(backend: str, function: Any) -> Iterator[None]:
    AttentionInterface.register(backend, function)
    try:
        yield
    finally:
        AttentionInterface.register(backend, attention_function(backend))


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    name = model.main_input_name
    if name == "input_ids" or "text" in model.input_modalities:
        return {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long, device="meta")}
    if name == "pixel_values":
        config = model.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, device="meta")}
    raise ReportError(f"{type(model).__name__} reads {name}; a report needs a model that reads tokens or images")


def _real(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def _classify(call: _Call, backend: str) -> LayerReport:
    if call.error is not None:
        return LayerReport(name=call.name, kind="refused", why=str(call.error))
    pattern = layer_pattern(call.module.config, getattr(call.module, "layer_idx", None), call.sliding_window, backend)
    kind: Kind
    if not isinstance(pattern, DensePattern) or (backend == DENSE.name and pattern.window is None):
        kind, why = "pattern", _why(pattern)
    elif pattern.window is not None:
        kind, why = "windowed", f"the model's own window of {pattern.window} tokens"
    else:
        kind, why = "dense", "in dense_layers"
    memory, ordinal = module_policy(call.module), getattr(pattern, "layer", 0)
    return LayerReport(name=call.name, kind=kind, why=why, ordinal=ordinal, memory=memory)


def _why(pattern: Pattern) -> str:
    words = []
    if isinstance(pattern, DilatedPattern):
        if phase := pattern.config.phase_of(pattern.layer):
            words.append(f"grid shifted by {phase} tokens")
        if pattern.config.rotate and pattern.layer:
            words.append(f"residues shifted by {pattern.layer}")
    elif isinstance(pattern, BlockSparsePattern) and len(pattern.config.layers) > 1:
        words.append(f"parts {pattern.layer % len(pattern.config.layers) + 1} of {len(pattern.config.layers)}")
    return ", ".join(words) or "attends to whole documents"


def _own_attention(model: PreTrainedModel, calls: list[_Call]) -> Iterator[LayerReport]:
    """The layers beside those that called the attention function."""
    called = {call.name for call in calls}
    stacks = {match[1] for name in called if (match := re.match(r"(.*?)\.\d+(\.|$)", name))}
    for stack in sorted(stacks):
        for index, layer in enumerate(model.get_submodule(stack).children()):
            name = f"{stack}.{index}"
            if any(other == name or other.startswith(f"{name}.") for other in called):
                continue
            why = ", ".join(dict.fromkeys(type(part).__name__ for part in layer.children() if _mixes(part)))
            yield LayerReport(name=name, kind="own attention", why=f"{why or type(layer).__name__} of the model")


def _mixes(module: nn.Module) -> bool:
    """Whether a part of a layer mixes tokens, to judge by its name."""
    return bool(re.search(r"Attention|Delta|Mamba|Conv|SSM|Recurrent|Mixer|RWKV", type(module).__name__))


def _unseen(model: PreTrainedModel, calls: list[_Call]) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and not any(c.name.startswith(f"{name}.") for c in calls):
            yield f"{name} ({type(module).__name__})"


def _natural(layer: LayerReport) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.name.split(".")]
