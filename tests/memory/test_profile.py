"""A profile is deterministic, belongs to its machine, and can be removed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dilated.memory import auto_configure_memory_pool, measure
from hf_dilated.memory import profile as profiles
from hf_dilated.memory.profile import Measurement, Profile, current_profile, explain, this_machine, thresholds_of
from hf_dilated.memory.thresholds import NEVER, Thresholds


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HF_DILATED_PROFILE", str(tmp_path / "own" / "profile.json"))
    current_profile.cache_clear()
    yield profiles.profile_path()
    current_profile.cache_clear()


def row(length: int, ratio: float, mode: str = "full", kind: str = "step", noise: float = 1.02) -> Measurement:
    return Measurement(
        length=length, kind=kind, mode=mode, ratio=ratio, low=ratio - 0.01, high=ratio + 0.01, noise=noise
    )


@pytest.mark.parametrize(
    ("rows", "lightweight", "full"),
    [
        ([], NEVER, NEVER),
        ([row(4096, 1.0)], NEVER, NEVER),
        ([row(4096, 1.2)], 4096, 4096),
        ([row(4096, 1.2), row(8192, 0.9)], NEVER, NEVER),
        ([row(4096, 1.2), row(4096, 0.9, kind="forward"), row(8192, 1.2)], 8192, 8192),
        ([row(4096, 1.2), row(4096, 1.0, kind="forward")], 4096, 4096),
        ([row(4096, 1.2, "lightweight"), row(8192, 1.2, "lightweight"), row(8192, 1.3)], 4096, 8192),
        ([row(4096, 1.2, noise=1.3)], NEVER, NEVER),
        ([row(4096, 0.985)], NEVER, NEVER),
    ],
)
def test_thresholds_follow_from_the_measurements(rows: list[Measurement], lightweight: int, full: int) -> None:
    for order in (rows, rows[::-1]):
        found = thresholds_of(order)
        assert (found.lightweight, found.full) == (lightweight, full)
        assert explain(found, order).count("\n") == 1


def test_policies_use_it_until_it_is_removed(path: Path) -> None:
    assert auto_configure_memory_pool(4096).mode == "lightweight"
    thresholds = Thresholds(lightweight=100, full=200, origin="profile of this machine")
    profile = Profile(machine=this_machine(), thresholds=thresholds, measurements=(row(100, 1.2),), plans={"a": [5]})
    profile.save(path)
    current_profile.cache_clear()
    assert current_profile() == profile
    policy = auto_configure_memory_pool(150)
    assert (policy.mode, policy.reason) == ("lightweight", "150 tokens, lightweight from 100 (profile of this machine)")
    assert profiles.measured_plan("a") == (5,)
    assert profiles.measured_plan("b") == ()
    path.unlink()
    current_profile.cache_clear()
    assert auto_configure_memory_pool(150).mode == "disabled"


def test_never_is_said_in_words(path: Path) -> None:
    Profile(machine=this_machine(), thresholds=thresholds_of([])).save(path)
    assert (
        auto_configure_memory_pool(1 << 20).reason
        == "1,048,576 tokens, pooled from no length on (profile of this machine)"
    )


@pytest.mark.parametrize("name", ["torch", "hf_dilated", "cores"])
def test_another_machine_is_ignored_with_a_notice(path: Path, name: str) -> None:
    machine = this_machine() | {name: "another"}
    Profile(machine=machine, thresholds=Thresholds(lightweight=1, full=2)).save(path)
    with pytest.warns(UserWarning, match=f"another {name}"):
        assert auto_configure_memory_pool(150).mode == "disabled"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "machine": {}}'])
def test_what_is_no_profile_is_ignored_with_a_notice(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="is no profile"):
        assert current_profile() is None


def test_nothing_half_written(path: Path) -> None:
    profile = Profile(machine=this_machine(), thresholds=Thresholds())
    profile.save(path)
    profile.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]
    assert json.loads(path.read_text())["version"] == 1


def test_comparisons_are_interleaved_and_have_a_control() -> None:
    order: list[str] = []
    seconds, found = measure.compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert list(found) == [measure.CONTROL, "b"]
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 4, "again": 4, "b": 4}
    assert order.count("a") == 2 * order.count("b") == 10
    rounds = [order[3 + 3 * i : 6 + 3 * i] for i in range(4)]
    assert len(set(map(tuple, rounds))) > 1
