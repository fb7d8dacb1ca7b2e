"""The backends: a name, the configuration that belongs to it, and the pattern that a layer runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_dilated.config import BlockSparseConfig, DilatedConfig, RingConfig
from hf_dilated.functional import attend
from hf_dilated.integration import ring
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern, Pattern


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What ``attn_implementation=name`` runs.

    Args:
        name: As Transformers knows it.
        part: Field of :class:`hf_dilated.config.StoredConfig` that holds its configuration.
        config_class: Class of that field. Has ``dense_layers``, ``depends_on_layer``, ``dense_length(layer)``,
            ``to_dict``, ``from_dict`` and ``from_model_config``.
        example: How one is written, for messages.
        layer_options: Its options that make layers differ, for messages.
        pattern: Builds the pattern of a layer from its configuration and its ordinal among those that run the pattern.
        attend: Runs a pattern; arguments as in :func:`hf_dilated.functional.attend`. As ``pattern``, a function of a
            module, which modules that are saved or sent to another process name.
    """

    name: str
    part: str
    config_class: Any
    example: str
    layer_options: str
    pattern: Callable[[Any, int], Pattern]
    attend: Callable[..., Tensor | tuple[Tensor, Tensor]] = attend


def _dilated(config: DilatedConfig, layer: int) -> DilatedPattern:
    return DilatedPattern(config=config, layer=layer)


def _block_sparse(config: BlockSparseConfig, layer: int) -> BlockSparsePattern:
    return BlockSparsePattern(config=config, layer=layer)


def _dense(config: RingConfig, layer: int) -> DensePattern:
    return DensePattern()


def _across_ranks(backend: Backend) -> Backend:
    """The same pattern over sequences that are spread over ranks."""
    return replace(backend, name=f"ring_{backend.name}", attend=ring.attend)


ALONE = (
    Backend(
        name="dilated",
        part="dilated",
        config_class=DilatedConfig,
        example="DilatedConfig(segment_lengths=…, …)",
        layer_options="phase, rotate",
        pattern=_dilated,
    ),
    Backend(
        name="block_sparse",
        part="block_sparse",
        config_class=BlockSparseConfig,
        example="BlockSparseConfig(local_blocks=…, …)",
        layer_options="several layers",
        pattern=_block_sparse,
    ),
)
DENSE = Backend(
    name="ring",
    part="ring",
    config_class=RingConfig,
    example="RingConfig()",
    layer_options="none",
    pattern=_dense,
    attend=ring.attend,
)
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (*ALONE, DENSE, *(_across_ranks(backend) for backend in ALONE))
}
