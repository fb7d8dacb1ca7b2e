"""hf_dilated, for the code of a checkpoint where it is not installed.

A checkpoint carries this file with the package behind it, one comment line for every line. An installed hf_dilated is
taken if it is at least as new. Otherwise the files are checked, written to the folder in which Transformers keeps the
code of checkpoints, and imported from there.

Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""

import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from packaging.version import Version
from transformers.utils import HF_MODULES_CACHE

PACKAGE = "hf_dilated"
MARK = "\n#@ "  # in front of the version, and of the name of every file


def _provided(path: Path) -> ModuleType:
    """Import the package, the installed one or else that of a file."""
    _, *parts = path.read_text("utf-8").rstrip("\n").split(MARK)
    if not parts:
        return importlib.import_module(PACKAGE)
    stamp, *files = parts
    version, digest = stamp.split()
    if hashlib.sha256(MARK.join(files).encode()).hexdigest() != digest:
        raise ImportError(f"{path}: was changed or damaged on its way; download the checkpoint again")
    if not _is_installed():
        sys.path.append(str(_unpacked(f"{version}-{digest[:16]}", dict(map(_decoded, files)))))
        importlib.invalidate_caches()
    package = importlib.import_module(PACKAGE)
    if Version(package.__version__) < Version(version):
        raise ImportError(
            f"this checkpoint needs {PACKAGE} {version}, but {package.__version__} is in use, from {package.__file__}. "
            f"`pip install -U {PACKAGE}`; if another checkpoint brought it, load this one first, or in its own process"
        )
    return package


def _is_installed() -> bool:
    spec = importlib.util.find_spec(PACKAGE)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def _decoded(part: str) -> tuple[str, str]:
    name, *lines = part.split("\n")
    return name, "".join(f"{line[2:]}\n" for line in lines)


def _unpacked(name: str, files: dict[str, str]) -> Path:
    """Write the files where they are not there yet, all or none, and return their folder."""
    folder = Path(HF_MODULES_CACHE) / "hf_dilated_code" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        for path, text in files.items() if not folder.is_dir() else ():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_text(text, "utf-8")
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():  # otherwise it was there, or another process was faster
                raise
    for path, text in files.items():
        if not (folder / path).is_file() or (folder / path).read_text("utf-8") != text:
            raise ImportError(f"{folder / path}: is not what the checkpoint carries; remove {folder}")
    return folder


hf_dilated = _provided(Path(__file__))
