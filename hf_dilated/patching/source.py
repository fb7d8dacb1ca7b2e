"""Where a checkpoint comes from, and which of its files go along."""

import fnmatch
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hf_dilated.patching.errors import PatchError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
COMPANIONS = (  # tokenizer, processor, chat templates, generation, the model's own code, licence
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.py",
    "*.vocab",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*",
)
OF_TRAINING = ("trainer_state.json", "all_results.json", "*_results.json", "training_args*")
CONFIG = "config.json"


def resolve(source: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Return the folder of a checkpoint; one on the Hub is downloaded into the cache, and only what is needed.

    Raises:
        PatchError: If there is no such checkpoint, or its download was interrupted.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_is_model(folder)
        return folder
    if folder.exists():
        raise PatchError(f"{source}: is a file; pass the folder of a checkpoint or a model's name on the Hub")
    try:
        snapshot = snapshot_download(
            str(source),
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[*WEIGHTS, *COMPANIONS],
        )
    except HFValidationError as error:
        raise PatchError(f"{source}: there is no such folder, and it is no name of a model on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise PatchError(
            f"{source}: there is no such folder, and the download did not complete: {error}. Repeat the command to "
            "go on where it stopped"
        ) from error
    _check_is_model(Path(snapshot))
    return Path(snapshot)


def companions(folder: Path) -> list[str]:
    """Names, relative to a checkpoint's folder, of the files that go along, without configuration and weights."""
    return sorted(name for name in _files(folder) if _goes_along(name))


def _files(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_file():
            yield path.name
        elif path.name == "additional_chat_templates":
            yield from (f"{path.name}/{template.name}" for template in path.iterdir() if template.is_file())


def _goes_along(name: str) -> bool:
    if name == CONFIG or any(fnmatch.fnmatch(name, pattern) for pattern in (*WEIGHTS, *OF_TRAINING)):
        return False
    return not name.endswith(".bin.index.json") and any(fnmatch.fnmatch(name, pattern) for pattern in COMPANIONS)


def _check_is_model(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise PatchError(
            f"{folder}: holds an adapter, not a model; patch its base, or merge the adapter first "
            "(model.merge_and_unload())"
        )
    raise PatchError(f"{folder}: has no {CONFIG}, so it is no checkpoint of Transformers")
