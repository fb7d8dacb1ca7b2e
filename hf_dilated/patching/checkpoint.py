"""Patching checkpoints on disk: weights are linked or streamed, never loaded."""

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from hf_dilated.integration.carried import FILE, FILES
from hf_dilated.integration.loading import load_statement
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.reach import reach_of
from hf_dilated.integration.report import ModelReport
from hf_dilated.patching import remote_code as code
from hf_dilated.patching import source as sources
from hf_dilated.patching.configuration import (
    Attention,
    build_empty,
    edited,
    load_config,
    patch_config,
    text_config,
    to_json,
    unpatch_config,
)
from hf_dilated.patching.errors import PatchError
from hf_dilated.patching.rope import RopeScaling
from hf_dilated.patching.staging import Progress, Staging, can_link, check_is_new, staged
from hf_dilated.patching.weights import Weights, check_shapes, read_weights

TOKENIZER = "tokenizer_config.json"
LIMIT = "model_max_length"


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """What is going to be written, before anything is.

    Args:
        source: Folder of the checkpoint that stays as it is.
        destination: Folder that is made.
        weights: Files and tensors of the source.
        copied: Small files that are copied.
        written: Small files that are written anew, and their text.
        is_linked: Whether weights become hard links; otherwise they are copied piece by piece.
        load_statement: The lines that load the checkpoint.
        longest_input: How far it reads, in tokens; None if its configuration does not tell.
        report: What every layer of the patched model runs; None when a patch is taken back.
    """

    source: Path
    destination: Path
    weights: Weights
    copied: tuple[str, ...]
    written: Mapping[str, str]
    is_linked: bool
    load_statement: str
    longest_input: int | None
    report: ModelReport | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The new ``config.json``."""
        return json.loads(self.written[sources.CONFIG])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        text = self.config.get("text_config", self.config)
        weights = f"{len(self.weights.files)} files, {self.weights.total_bytes / 1e9:.2f} GB"
        values = {
            "source": str(self.source),
            "destination": str(self.destination),
            "weights": f"{weights}, {'hard links' if self.is_linked else 'copied'}",
            "max_position_embeddings": text.get("max_position_embeddings"),
            "longest_input": self.longest_input,
            "rope_parameters": text.get("rope_parameters"),
            "copied": list(self.copied),
            "written": list(self.written),
        }
        if self.report is not None:
            layers = Counter(layer.kind for layer in self.report.layers)
            values["hf_dilated"] = text.get("hf_dilated")
            values["layers"] = dict(layers)
            values["exactly_dense_up_to"] = None if self.report.is_dense else self.report.dense_length
        return values

    def execute(self, progress: Progress | None = None) -> None:
        """Write the checkpoint: complete, or not at all.

        Args:
            progress: Called with the name of a file and the bytes of it that are done.

        Raises:
            PatchError: If it cannot be written, with the way to go on.
        """
        with staged(self.destination, self._job()) as staging:
            if not self.is_linked:
                staging.check_space(self.weights.files)
            for name in self.weights.files:
                staging.link_or_copy(self.source / name, name, link=self.is_linked, progress=progress)
            for name in self.copied:
                staging.link_or_copy(self.source / name, name, link=False)
            for name, text in self.written.items():
                staging.write(name, text)
            self._verify(staging)

    def _job(self) -> dict[str, Any]:
        files = {name: (self.source / name).stat() for name in (*self.weights.files, *self.copied)}
        return {
            "source": str(self.source.resolve()),
            "is_linked": self.is_linked,
            "files": {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()},
            "written": {name: sha256(text.encode()).hexdigest() for name, text in self.written.items()},
        }

    def _verify(self, staging: Staging) -> None:
        if read_weights(staging.folder).tensors != self.weights.tensors:
            raise PatchError(f"{staging.folder}: holds other tensors than {self.source}; remove it and begin again")


def plan_patch(
    source: str | Path,
    destination: str | Path,
    *,
    backend: str | None = None,
    attention: Attention = None,
    max_position_embeddings: int | None = None,
    rope_scaling: RopeScaling = None,
    remote_code: bool = False,
    link: bool = True,
    revision: str | None = None,
    local_files_only: bool = False,
) -> CheckpointPlan:
    """Verify a checkpoint and decide what :func:`patch_checkpoint` writes; arguments and errors as there.

    Nothing is written. A checkpoint on the Hub is downloaded into the cache.
    """
    destination = Path(destination).expanduser().absolute()
    check_is_new(destination)
    folder = sources.resolve(source, revision=revision, local_files_only=local_files_only)
    config = load_config(folder)
    before = copy.deepcopy(config)
    report = patch_config(
        config,
        backend=backend,
        attention=attention,
        max_position_embeddings=max_position_embeddings,
        rope_scaling=rope_scaling,
    )
    written = _tokenizer_limit(folder, config, max_position_embeddings)
    if remote_code:
        written |= code.add(config)
    weights = read_weights(folder)
    _check_fits(weights, before)
    return _plan(folder, destination, config, weights, written | _config_file(folder, before, config), link, report)


def patch_checkpoint(source: str | Path, destination: str | Path, **options: Any) -> CheckpointPlan:
    """Write a copy of a checkpoint that selects its backend by itself.

    Weights are never loaded: they become hard links where the file system allows, and are copied piece by piece
    otherwise. The destination appears complete or not at all, and the source is only read. After a crash the same call
    goes on where it stopped.

    Args:
        source: Folder of a checkpoint, or its name on the Hub.
        destination: Folder that does not exist yet.
        backend: Name of the backend; by default the pattern's own, or ``"dilated"``.
        attention: The backend's pattern: its configuration, a ``StoredConfig``, or the dictionary of either. By
            default the one that suits the length.
        max_position_embeddings: Longest input, in tokens, if it is to grow.
        rope_scaling: How rotary positions reach further: ``"yarn"`` (default), ``"linear"``, ``"dynamic"``, or the
            parameters of Transformers as a dictionary. A model that is scaled already enlarges its own scaling.
        remote_code: Also write the code that lets ``trust_remote_code=True`` replace import and installation.
        link: Whether weights may be hard links.
        revision: Branch, tag or commit on the Hub.
        local_files_only: Whether to do without the network.

    Returns:
        What was done.

    Raises:
        PatchError: If the checkpoint is broken, its architecture or rotary positions are not supported, the
            destination exists or has no room.
        ConfigError: If the pattern is malformed.
    """
    plan = plan_patch(source, destination, **options)
    plan.execute()
    return plan


def plan_unpatch(
    source: str | Path, destination: str | Path, *, keep_rope: bool = False, link: bool = True
) -> CheckpointPlan:
    """Decide what :func:`unpatch_checkpoint` writes; arguments and errors as there."""
    destination = Path(destination).expanduser().absolute()
    check_is_new(destination)
    folder = sources.resolve(source)
    config = load_config(folder)
    before = copy.deepcopy(config)
    original = stored_config(config).original or {}
    unpatch_config(config, keep_rope=keep_rope)
    code.forget(config)
    written = _config_file(folder, before, config)
    if LIMIT in original and not keep_rope and (folder / TOKENIZER).is_file():
        written |= _tokenizer_file(folder, original[LIMIT])
    return _plan(folder, destination, config, read_weights(folder), written, link, None)


def unpatch_checkpoint(source: str | Path, destination: str | Path, **options: Any) -> CheckpointPlan:
    """Write a copy of a patched checkpoint that is the dense model again.

    Args:
        source: Folder of a patched checkpoint; it may have been trained and saved since.
        destination: Folder that does not exist yet.
        keep_rope: Take out backend and pattern only. Weights that were trained at the longer reach need its rotary
            positions also as a dense model.
        link: Whether weights may be hard links.

    Returns:
        What was done.

    Raises:
        PatchError: If the checkpoint was not patched or is broken, or the destination exists or has no room.
    """
    plan = plan_unpatch(source, destination, **options)
    plan.execute()
    return plan


def _plan(
    folder: Path,
    destination: Path,
    config: Any,
    weights: Weights,
    written: dict[str, str],
    link: bool,
    report: ModelReport | None,
) -> CheckpointPlan:
    index = () if weights.index is None else (weights.index,)
    own_code = FILES if (folder / FILE).is_file() else ()
    copied = [name for name in sources.companions(folder) if name not in (*written, *own_code)]
    return CheckpointPlan(
        source=folder,
        destination=destination,
        weights=weights,
        copied=(*copied, *index),
        written=written,
        is_linked=link and can_link(folder / next(iter(weights.files)), destination),
        load_statement=load_statement(config, str(destination)),
        longest_input=reach_of(config),
        report=report,
    )


def _config_file(folder: Path, before: Any, after: Any) -> dict[str, str]:
    text = (folder / sources.CONFIG).read_text(encoding="utf-8")
    return {sources.CONFIG: edited(text, before, after)}


def _tokenizer_limit(folder: Path, config: Any, length: int | None) -> dict[str, str]:
    """Raise the tokenizer's limit, so that it cuts no long input; the old one is kept in the configuration."""
    path = folder / TOKENIZER
    if length is None or not path.is_file():
        return {}
    limit = _tokenizer(path)[1].get(LIMIT)
    if not isinstance(limit, int) or limit >= length:
        return {}
    stored = config.hf_dilated
    config.hf_dilated = stored | {"original": stored["original"] | {LIMIT: limit}}
    return _tokenizer_file(folder, length)


def _tokenizer_file(folder: Path, limit: int) -> dict[str, str]:
    text, values = _tokenizer(folder / TOKENIZER)
    return {TOKENIZER: to_json(values | {LIMIT: limit}, like=text)}


def _tokenizer(path: Path) -> tuple[str, dict[str, Any]]:
    """A tokenizer's configuration, as text and as values."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, {} | json.loads(text)
    except (OSError, TypeError, ValueError) as error:
        raise PatchError(f"{path}: is no JSON object: {error}; repair it or download it again") from error


def _check_fits(weights: Weights, config: Any) -> None:
    """Compare shapes with the model's, unless Transformers converts or unpacks the weights while it loads them."""
    if getattr(config, "quantization_config", None) is not None:
        return
    model = build_empty(config)
    if any(isinstance(conversion, WeightConverter) for conversion in get_model_conversion_mapping(model)):
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(weights, expected, type(text_config(config)).__name__)
