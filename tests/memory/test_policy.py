"""Which mode a model gets: thresholds, backends that are always pooled, and a user who always wins."""

import pytest

from hf_dilated.config import ConfigError, MemoryConfig, StoredConfig
from hf_dilated.memory import MemoryPolicy, auto_configure_memory_pool
from hf_dilated.memory.thresholds import Thresholds


@pytest.mark.parametrize(
    ("length", "kind", "mode"),
    [
        (1, "dilated", "disabled"),
        (4095, "dilated", "disabled"),
        (4096, "dilated", "lightweight"),
        (8191, "dilated", "lightweight"),
        (8192, "dilated", "full"),
        (1 << 20, "dilated", "full"),
        (16, "ring", "lightweight"),
        (16, "ring_dilated", "lightweight"),
        (16, "block_sparse", "lightweight"),
        (16, "ring_block_sparse", "lightweight"),
        (16, "distributed", "lightweight"),
        (8192, "ring", "full"),
    ],
)
def test_thresholds(length: int, kind: str, mode: str) -> None:
    policy = auto_configure_memory_pool(length, kind)
    assert policy.mode == mode
    assert policy.reason
    assert policy.attention_type == kind


@pytest.mark.parametrize("length", [16, 4096, 8192])
@pytest.mark.parametrize("kind", ["dilated", "ring"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "disabled"),
        ("mode", "lightweight"),
        ("mode", "full"),
        ("smallest", 7),
        ("budget", 0),
        ("huge_pages", False),
        ("numa", False),
        ("numa", True),
        ("cuda", True),
    ],
)
def test_each_setting_wins_alone(length: int, kind: str, name: str, value: object) -> None:
    automatic, policy = (auto_configure_memory_pool(length, kind, **given) for given in ({}, {name: value}))
    assert getattr(policy, name) == value
    others = {field for field in MemoryConfig.__dataclass_fields__ if field != name}
    if name == "mode":
        others -= {"numa"}  # follows the mode
        assert policy.reason == "set by the user"
    assert {x: getattr(policy, x) for x in others} == {x: getattr(automatic, x) for x in others}


def test_measured_thresholds_replace_the_defaults() -> None:
    measured = Thresholds(lightweight=100, full=200, origin="profile of this machine")
    assert [auto_configure_memory_pool(n, thresholds=measured).mode for n in (99, 100, 199, 200)] == [
        "disabled",
        "lightweight",
        "lightweight",
        "full",
    ]
    assert "profile of this machine" in auto_configure_memory_pool(150, thresholds=measured).reason


def test_policies_travel_as_text() -> None:
    for length in (16, 4096, 8192):
        policy = auto_configure_memory_pool(length, budget=12345)
        parsed = MemoryPolicy.parse(policy.spec)
        assert parsed.mode == policy.mode
        assert parsed == policy or policy.mode == "disabled"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "fast"}, "mode: expected one of 'disabled', 'lightweight', 'full', got 'fast'"),
        ({"budget": -1}, "budget: expected at least 0"),
        ({"smallest": 1.5}, "smallest: expected a whole number"),
        ({"cuda": 1}, "cuda: expected True or False"),
        ({"pool": "full"}, "unknown 'pool'"),
    ],
)
def test_malformed_settings(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        auto_configure_memory_pool(4096, **settings)


def test_stored_settings_are_those_that_were_made() -> None:
    stored = StoredConfig(attn_implementation="dilated", memory=MemoryConfig(budget=5))
    assert stored.to_dict()["memory"] == {"budget": 5}
    assert StoredConfig.from_dict(stored.to_dict()) == stored
    assert "memory" not in StoredConfig(attn_implementation="dilated").to_dict()
