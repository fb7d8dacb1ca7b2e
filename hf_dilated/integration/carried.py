"""The code that a checkpoint carries, so that ``trust_remote_code=True`` needs neither import nor installation.

``modeling_hf_dilated.py`` has the classes that ``auto_map`` names, ``hf_dilated_code.py`` has this package.
"""

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from hf_dilated.integration.hf_dilated_code import MARK, PACKAGE

MODULE = "modeling_hf_dilated"
FILE = f"{MODULE}.py"
CODE = "hf_dilated_code.py"
FILES = (FILE, CODE)
LOADER = f"{PACKAGE}.integration.{CODE.removesuffix('.py')}"
HEADER = '''"""Loads this checkpoint under trust_remote_code=True."""

import transformers

from .hf_dilated_code import hf_dilated  # noqa: F401  (registers the attention backend that config.json names)
'''
CLASS = '''

class {name}(transformers.{name}):
    """As in Transformers; a class of its own, because a checkpoint can only bring its own classes."""
'''


def module_source(names: Iterable[str]) -> str:
    """The text of the module for classes of Transformers.

    Example:
        >>> print(module_source(["LlamaModel"]).splitlines()[-2])
        class LlamaModel(transformers.LlamaModel):
    """
    return HEADER + "".join(CLASS.format(name=name) for name in sorted(set(names)))


@functools.cache
def package_source() -> str:
    """The text of ``hf_dilated_code.py``: what loads the package, its version, and every module of it.

    Modules that only the command needs are left out.
    """
    modules = dict(_modules())
    parts = [_encoded(path, text) for path, text in sorted(modules.values())]
    digest = hashlib.sha256(MARK.join(parts).encode()).hexdigest()
    return MARK.join([modules[LOADER][1], f"{sys.modules[PACKAGE].__version__} {digest}", *parts]) + "\n"


def own_classes(auto_map: Any) -> dict[str, str]:
    """The entries of ``config.auto_map`` that lead to our module: the class of each AutoClass.

    Example:
        >>> own_classes({"AutoModel": "modeling_hf_dilated.LlamaModel", "AutoConfig": "theirs.TheirConfig"})
        {'AutoModel': 'LlamaModel'}
    """
    references = {name: str(reference).partition(".") for name, reference in (auto_map or {}).items()}
    return {name: found for name, (module, _, found) in references.items() if module == MODULE}


def brings_package(folder: Path) -> bool:
    """Whether a checkpoint carries this package."""
    return (folder / CODE).is_file()


def carry(config: Any, folder: Path) -> None:
    """Put the code beside a configuration that was saved, if it names it or its own code imports it."""
    classes = own_classes(getattr(config, "auto_map", None))
    if classes:
        (folder / FILE).write_text(module_source(classes.values()), "utf-8")
    if classes or brings_package(folder):
        (folder / CODE).write_text(package_source(), "utf-8")


def _modules() -> Iterator[tuple[str, tuple[str, str]]]:
    """Every module that importing the package needs, now or later: its name, path and text."""
    waiting, seen = [PACKAGE, LOADER], {PACKAGE, LOADER}
    while waiting:
        module = waiting.pop()
        if (found := _file(module)) is None:
            continue  # the name of something else
        path, file = found
        text = file.read_text("utf-8")
        yield module, (path, text)
        new = {name for name in _imported(text) if name.partition(".")[0] == PACKAGE} - seen
        seen |= new
        waiting += new


def _imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _file(module: str) -> tuple[str, Traversable] | None:
    path = module.replace(".", "/")
    root = resources.files(PACKAGE)
    for candidate in (f"{path}/__init__.py", f"{path}.py"):
        file = root.joinpath(*candidate.split("/")[1:])
        if file.is_file():
            return candidate, file
    return None


def _encoded(path: str, text: str) -> str:
    return "\n".join([path, *(f"# {line}" if line else "#" for line in text.splitlines())])
