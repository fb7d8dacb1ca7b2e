"""The weights of a checkpoint: found, and verified without reading a single number."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_dilated.patching.errors import PatchError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, as safetensors writes it, and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The files that hold the weights, relative to the folder, and what is in them.

    Args:
        files: Size in bytes of every file with tensors.
        index: Name of the index, if there are several files.
        tensors: Every tensor by its name.
    """

    files: Mapping[str, int]
    index: str | None
    tensors: Mapping[str, TensorInfo]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


def read_weights(folder: Path) -> Weights:
    """Find the weights of a checkpoint and verify headers, sizes and index.

    Raises:
        PatchError: If a file is missing, truncated or corrupt, or lacks tensors that the index names.
    """
    if (folder / SINGLE).is_file():  # the order in which Transformers looks for them
        return Weights(files={SINGLE: _size(folder / SINGLE)}, index=None, tensors=read_header(folder / SINGLE))
    if (folder / INDEX).is_file():
        return _sharded(folder)
    other = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth", "*.h5") for path in folder.glob(pattern))
    way_out = (
        f"it has {', '.join(other[:3])}; load it with Transformers and save it again as safetensors"
        if other
        else "nothing can be patched"
    )
    raise PatchError(f"{folder}: has neither {SINGLE} nor {INDEX}: {way_out}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read what a safetensors file holds; the library checks that header and file fit together to the byte.

    Raises:
        PatchError: If they do not.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
            return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchError(f"{path}: is corrupt or truncated ({error}); download or save it again") from error


def check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Compare the tensors with those of the model that the configuration describes, where both have one name.

    Raises:
        PatchError: If a shape differs.
    """
    for name, shape in expected.items():
        found = weights.tensors.get(name)
        if found is not None and found.shape != shape:
            raise PatchError(f"{name}: has the shape {found.shape}, but the configuration of {model} says {shape}")


def _sharded(folder: Path) -> Weights:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        weight_map = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{path}: is no index of weights ({error!r})") from error
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not _is_beside(path, name)]:
        raise PatchError(f"{folder}: {', '.join(missing)} of the index is missing; finish the download")
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        held = read_header(folder / name)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if absent := sorted(listed - set(held)):
            raise PatchError(f"{folder / name}: lacks {', '.join(absent[:3])}, which the index says it holds")
        tensors |= held
    files = {name: _size(folder / name) for name in names}
    return Weights(files=files, index=INDEX, tensors=tensors)


def _is_beside(index: Path, name: str) -> bool:
    return Path(name).name == name and (index.parent / name).is_file()


def _size(path: Path) -> int:
    return path.stat().st_size
