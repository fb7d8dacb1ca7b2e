"""What `hf-dilated bench` times, not how long it takes."""

from typing import Any

import pytest
import torch

from hf_dilated import DilatedConfig
from hf_dilated.evaluation import bench as module
from hf_dilated.evaluation.bench import MODES, Bench, bench, steps
from hf_dilated.integration.support import UnsupportedError
from tests.tiny_models import tiny_model

PATTERN = DilatedConfig(segment_lengths=(8, 16, 64), dilation_rates=(1, 2, 4))


def model(family: str = "llama") -> Any:
    made = tiny_model(family, "dilated")
    made.config.hf_dilated = PATTERN
    return made


@pytest.mark.parametrize(("family", "modes"), [("llama", tuple(MODES)), ("qwen3_next", ("decode-kept",))])
def test_what_is_measured_and_that_the_model_stays_as_it_is(family: str, modes: tuple[str, ...]) -> None:
    given = model(family)
    done: list[str] = []
    plan = Bench(lengths=(20,), modes=modes, rounds=3)
    rows = bench(given, plan, done.append)
    assert [(row.mode, row.attention) for row in rows] == [
        (mode, name) for mode in modes for name in ("dense", "dense (again)", "dilated")
    ]
    assert all(len(row.seconds) == 3 and row.reason is None for row in rows)
    assert [row.speedup is None for row in rows] == [row.attention == "dense" for row in rows]
    assert len(done) == steps(plan)
    assert given.config._attn_implementation == "dilated"
    assert all(parameter.grad is None for parameter in given.parameters())


def test_copies_share_the_weights() -> None:
    given = model()
    dense, dilated = (module._sharing_weights(given, name) for name in ("dense", "dilated"))
    assert (dense.config._attn_implementation, dilated.config._attn_implementation) == ("sdpa", "dilated")
    for one, other, own in zip(dense.parameters(), dilated.parameters(), given.parameters(), strict=True):
        assert one is other is own


@pytest.mark.parametrize("kept", [False, True])
def test_a_decoded_token_is_taken_back(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call sees the same cache, and computes what the whole input gives."""
    given, ids = model(), torch.arange(1, 41)[None]
    with torch.no_grad():
        expected = given(ids).logits[:, -1]
    seen: list[torch.Tensor] = []
    given.register_forward_hook(lambda *call: seen.append(call[2].logits[:, -1]))
    call = (module._decode_kept if kept else module._decode)(given, ids)
    for _ in range(3):
        call()
    for logits in seen[1:]:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_could_not_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench(model(), Bench(lengths=(20,), modes=("forward",), seconds=0))
    assert [(row.attention, row.reason) for row in rows] == [(n, "the budget is spent") for n in ("dense", "dilated")]

    def hungry(model: Any, ids: torch.Tensor) -> Any:
        if model.config._attn_implementation == "sdpa":
            raise torch.OutOfMemoryError
        return lambda: None

    monkeypatch.setattr(module, "MODES", {**MODES, "forward": hungry})
    rows = bench(model(), Bench(lengths=(20,), modes=("forward",), rounds=3))
    reasons = [(row.attention, row.reason) for row in rows]
    assert reasons == [("dense", "out of memory"), ("dilated", None), ("dilated (again)", None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["sleep"]}, "modes: unknown sleep; known are forward"),
        ({"modes": []}, "modes: name at least one"),
        ({"attentions": ["dense", "dense"]}, "attentions: each may be named once"),
        ({"lengths": [1]}, "lengths: expected at least 2 tokens, got 1"),
        ({"rounds": 2}, "rounds: expected at least 3"),
    ],
)
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bench(**{"lengths": [8], **options})


def test_a_model_that_refuses_is_refused() -> None:
    given = tiny_model("gemma2", "eager")
    with pytest.raises(UnsupportedError, match="softcap"):
        bench(given, Bench(lengths=(8,), attentions=("eager", "dilated"), modes=("forward",), rounds=3))
