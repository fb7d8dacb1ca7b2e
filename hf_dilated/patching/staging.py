"""A folder that comes into being all at once.

Files gather in a hidden folder beside the destination, with a journal of what is finished; the last step renames it.
After a crash the same call goes on behind the last finished file.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from hf_dilated.patching.errors import PatchError

JOURNAL = ".hf_dilated-journal.json"
CHUNK = 16 << 20  # bytes copied at once
Progress = Callable[[str, int], None]  # name of a file, and bytes of it that are done


def staging_folder(destination: Path) -> Path:
    """Where the files of a destination gather."""
    return destination.parent / f".{destination.name}.hf_dilated-unfinished"


@contextmanager
def staged(destination: Path, job: Mapping[str, Any]) -> Iterator["Staging"]:
    """Gather files and put them in place when the block ends without an error.

    Args:
        destination: Folder that does not exist yet.
        job: What is being done, as plain JSON values; only the same job goes on with what it left unfinished.

    Raises:
        PatchError: If the destination exists or cannot be made, another job was left unfinished there, or the same
            one runs now.
    """
    check_is_new(destination)
    folder = staging_folder(destination)
    with _locked(destination), _storage_errors(folder):
        check_is_new(destination)  # it may have been finished meanwhile
        folder.mkdir(exist_ok=True)
        staging = Staging(folder, job)
        try:
            yield staging
            staging.publish(destination)
        except BaseException:
            if not staging.done:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Keep other processes from the staging folder, until after its rename: the lock lies beside it."""
    path = destination.parent / f".{destination.name}.hf_dilated-lock"
    lock = FileLock(path, timeout=0)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise PatchError(f"{destination}: another process is writing it") from error
    except OSError as error:
        raise PatchError(f"{destination}: cannot be made: {error}; choose another folder") from error
    try:
        yield
    finally:
        if os.name != "nt":  # open files cannot be removed there
            path.unlink(missing_ok=True)  # filelock gives nobody a lock on a removed file
        lock.release()


def check_is_new(destination: Path) -> None:
    """Refuse to write over anything.

    Raises:
        PatchError: If the destination exists.
    """
    if os.path.lexists(destination):
        raise PatchError(f"{destination}: exists already; nothing is overwritten. Choose another folder or remove it")


class Staging:
    """The files of an unfinished destination; see :func:`staged`."""

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self.job = json.loads(json.dumps(job))
        self.done: dict[str, int] = {}
        if (folder / JOURNAL).exists():
            self._resume()
        self._remove_unfinished()
        self._save_journal()

    def _resume(self) -> None:
        journal = json.loads((self.folder / JOURNAL).read_text())
        if journal["job"] != self.job:
            raise PatchError(
                f"{self.folder}: was left unfinished by a call with other options or another source; repeat that "
                "call, or remove the folder"
            )
        self.done = {name: size for name, size in journal["done"].items() if self._has(name, size)}

    def _remove_unfinished(self) -> None:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in self.done and name != JOURNAL:
                path.unlink()

    def _has(self, name: str, size: int) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == size

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Refuse to begin what cannot end.

        Args:
            sizes: Bytes of the files that are going to be copied, or were already.

        Raises:
            PatchError: If the file system has no room for those that are missing.
        """
        needed = sum(size for name, size in sizes.items() if self.done.get(name) != size)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise PatchError(
                f"{self.folder}: needs {needed / 1e9:,.1f} GB more, and has {free / 1e9:,.1f} GB free; make room, or "
                "choose a destination on the source's file system, where weights are linked"
            )

    def link_or_copy(self, source: Path, name: str, *, link: bool, progress: Progress | None = None) -> None:
        """Bring a file over: by a hard link where that is possible and wanted, else in pieces of a few megabytes."""
        size = source.stat().st_size
        report = progress or (lambda name, done: None)
        if self.done.get(name) != size:
            target = self.folder / name
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            if not (link and _linked(source, target)):
                _copy(source, target, lambda done: report(name, done))
            self._finish(name)
        report(name, size)

    def write(self, name: str, text: str) -> None:
        """Write a small file."""
        target = self.folder / name
        with target.open("w", encoding="utf-8") as file:
            file.write(text)
            _flush(file)
        self._finish(name)

    def publish(self, destination: Path) -> None:
        """Put the finished folder in place, without what only the way there needed."""
        (self.folder / JOURNAL).unlink()
        _flush_folder(self.folder)
        os.rename(self.folder, destination)
        _flush_folder(destination.parent)

    def _finish(self, name: str) -> None:
        self.done[name] = (self.folder / name).stat().st_size
        self._save_journal()

    def _save_journal(self) -> None:
        new = self.folder / f"{JOURNAL}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump({"job": self.job, "done": self.done}, file)
            _flush(file)
        os.replace(new, self.folder / JOURNAL)


def can_link(source: Path, destination: Path) -> bool:
    """Whether both lie on one file system, so that a file can have a second name there."""
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    return source.stat().st_dev == parent.stat().st_dev


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)  # files in the cache of the Hub are symbolic links
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            return False
        raise
    return True


def _copy(source: Path, target: Path, progress: Callable[[int], None]) -> None:
    partial = target.with_name(f"{target.name}.partial")
    with source.open("rb") as reader, partial.open("wb") as writer:
        done = 0
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            done += len(chunk)
            progress(done)
        _flush(writer)
    os.replace(partial, target)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PatchError(
            f"{folder}: {error}. The source is untouched; repeat the call to go on behind the last finished file, or "
            "remove the folder"
        ) from error
