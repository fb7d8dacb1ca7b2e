"""Full disks, crashes and several processes: complete, or not at all."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_dilated import PatchError, patch_checkpoint
from hf_dilated.patching import plan_patch, staging
from tests.patching.folders import contents, tensors


def test_no_space(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(PatchError, match="GB free; make room"):
        patch_checkpoint(checkpoint, tmp_path / "long", link=False)
    assert set(tmp_path.iterdir()) == {checkpoint}
    patch_checkpoint(checkpoint, tmp_path / "long", link=True)


def test_space_for_the_rest(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished needs no room again, and what was half written gives its room back."""
    plan = plan_patch(checkpoint, tmp_path / "long", link=False)
    first, *rest = plan.weights.files
    unfinished = staging.staging_folder(plan.destination)

    def interrupted(name: str, size: int) -> None:
        if name != first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.execute(interrupted)
    half = unfinished / f"{rest[0]}.partial"
    half.write_bytes(b"half")
    missing = sum(plan.weights.files[name] for name in rest)

    def disk(free: int) -> None:
        monkeypatch.setattr(
            staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0 if half.exists() else free)
        )

    disk(missing - 1)
    with pytest.raises(PatchError, match="GB free; make room"):
        plan.execute()
    assert (unfinished / first).exists()
    half.write_bytes(b"half")
    disk(missing)
    plan.execute()
    assert tensors(tmp_path / "long").keys() == tensors(checkpoint).keys()


def test_copies_do_not_go_on_behind_links(checkpoint: Path, tmp_path: Path) -> None:
    def interrupted(name: str, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_patch(checkpoint, tmp_path / "long").execute(interrupted)
    with pytest.raises(PatchError, match="was left unfinished by a call with other options"):
        patch_checkpoint(checkpoint, tmp_path / "long", link=False)


def test_a_folder_that_cannot_be_made(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PatchError, match="cannot be made: .*; choose another folder"):
        patch_checkpoint(checkpoint, tmp_path / "file" / "long")
    assert set(tmp_path.iterdir()) == {checkpoint, tmp_path / "file"}


def test_a_disk_that_fills_up(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, done = staging._copy, []

    def fills_up(source: Path, target: Path, progress: Any) -> None:
        done.append(source.name)
        if len(done) == 2:
            target.with_name(f"{target.name}.partial").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target, progress)

    monkeypatch.setattr(staging, "_copy", fills_up)
    before = contents(checkpoint)
    with pytest.raises(PatchError, match="No space left on device.*The source is untouched; repeat the call"):
        patch_checkpoint(checkpoint, tmp_path / "long", link=False)
    assert not (tmp_path / "long").exists()
    patch_checkpoint(checkpoint, tmp_path / "long", link=False)
    assert done.count(done[0]) == 1, "what was finished is copied again"
    assert not list((tmp_path / "long").rglob("*.partial"))
    assert contents(checkpoint) == before
    assert set(tmp_path.iterdir()) == {checkpoint, tmp_path / "long"}


def test_only_one_process_at_a_time(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_patch(checkpoint, tmp_path / "long")
    with staging.staged(tmp_path / "long", plan._job()), pytest.raises(PatchError, match="another process is writing"):
        plan.execute()


def test_nobody_interferes_before_the_folder_is_in_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its journal the folder looks like one that nothing was written into."""
    flush, refusals = staging._flush_folder, []

    def another_process_comes(folder: Path) -> None:
        with monkeypatch.context() as alone:
            alone.setattr(staging, "_flush_folder", flush)
            with pytest.raises(PatchError) as refusal:
                plan.execute()
        refusals.append(str(refusal.value).partition(": ")[2].partition(";")[0])
        flush(folder)

    plan = plan_patch(checkpoint, tmp_path / "long")
    monkeypatch.setattr(staging, "_flush_folder", another_process_comes)
    plan.execute()
    assert refusals == ["another process is writing it", "exists already"]
    assert tensors(tmp_path / "long").keys() == tensors(checkpoint).keys()
    assert set(tmp_path.iterdir()) == {checkpoint, tmp_path / "long"}


def test_another_process_finishes_just_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, acquire = plan_patch(checkpoint, tmp_path / "long"), staging.FileLock.acquire

    def late(lock: Any, *args: Any, **options: Any) -> Any:
        monkeypatch.setattr(staging.FileLock, "acquire", acquire)
        plan.execute()
        return lock.acquire(*args, **options)

    monkeypatch.setattr(staging.FileLock, "acquire", late)
    with pytest.raises(PatchError, match="exists already"):
        plan.execute()
    assert set(tmp_path.iterdir()) == {checkpoint, tmp_path / "long"}
