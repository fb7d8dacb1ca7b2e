"""What `hf-dilated bench` times, not how long it takes."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hf_dilated import DilatedConfig
from hf_dilated.evaluation import bench as module
from hf_dilated.evaluation.bench import MODES, Bench, bench
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
    counts: list[int] = []
    rows = bench(given, Bench(lengths=(20,), modes=modes, rounds=3), lambda rows: counts.append(len(rows)))
    assert [(row.mode, row.attention) for row in rows] == [
        (mode, name) for mode in modes for name in ("dense", "dense (again)", "dilated")
    ]
    assert all(len(row.seconds) == 3 and row.reason is None for row in rows)
    assert [row.speedup is None for row in rows] == [row.attention == "dense" for row in rows]
    assert counts == [3 * done for done in range(len(modes) + 1)]
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
    for logits in seen[-3:]:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_the_budget_leaves_out_says_so() -> None:
    rows = bench(model(), Bench(lengths=(20,), modes=("forward",), seconds=0))
    assert [(row.attention, row.reason) for row in rows] == [(n, "the budget is spent") for n in ("dense", "dilated")]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    "fail",
    [out_of_memory, lambda: torch.empty(1 << 55, dtype=torch.uint8), lambda: mmap.mmap(-1, 1 << 55)],
    ids=["GPU", "CPU", "system"],
)
def test_what_does_not_fit_into_memory_says_so(fail: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(model: Any, ids: torch.Tensor) -> Any:
        return fail if model.config._attn_implementation == "sdpa" else lambda: None

    monkeypatch.setattr(module, "MODES", {**MODES, "forward": hungry})
    rows = bench(model(), Bench(lengths=(20,), modes=("forward",), rounds=3))
    reasons = [(row.attention, row.reason) for row in rows]
    assert reasons == [("dense", "out of memory"), ("dilated", None), ("dilated (again)", None)]


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODES", {**MODES, "forward": lambda model, ids: ids.view(3, 3)})
    with pytest.raises(RuntimeError, match="shape"):
        bench(model(), Bench(lengths=(20,), modes=("forward",), rounds=3))


def test_gradients_of_the_caller_are_kept() -> None:
    given = model()
    gradient = torch.ones_like(given.lm_head.weight)
    given.lm_head.weight.grad = gradient
    with pytest.raises(ValueError, match="modes: step would clear the gradients"):
        bench(given, Bench(lengths=(8,), modes=("forward", "step"), rounds=3))
    bench(given, Bench(lengths=(8,), modes=("forward",), rounds=3))
    assert given.lm_head.weight.grad is gradient


def test_a_step_that_fails_leaves_no_gradients() -> None:
    given = model()

    given.get_input_embeddings().weight.register_hook(lambda gradient: out_of_memory())  # the last gradient
    call = module._step(given, torch.arange(8)[None])
    with pytest.raises(torch.OutOfMemoryError):
        call()
    assert all(parameter.grad is None for parameter in given.parameters())


def test_the_models_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    seen: set[torch.device] = set()

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(module, "MODES", {**MODES, "forward": lambda model, ids: lambda: seen.update(current)})
    given = model()
    bench(given, Bench(lengths=(8,), modes=("forward",), rounds=3))
    assert seen == {given.device}


@pytest.mark.parametrize(
    ("family", "length", "device", "message"),
    [
        ("gpt2", 1 << 20, "cpu", r"no rotary positions, so it reads at most \d+ tokens; got 1,048,576"),
        ("llama", 8, "meta", "times are taken on cpu and cuda, not on meta"),
    ],
)
def test_what_cannot_be_measured_is_refused(family: str, length: int, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(tiny_model(family).to(device), Bench(lengths=(length,), modes=("forward",), rounds=3))


def test_rotary_positions_go_further() -> None:
    given = model()
    longer = given.config.max_position_embeddings + 8
    assert all(row.seconds for row in bench(given, Bench(lengths=(longer,), modes=("forward",), rounds=3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["sleep"]}, "modes: unknown sleep; known are forward"),
        ({"modes": []}, "modes: name at least one"),
        ({"attentions": ["dense", "dense"]}, "attentions: each may be named once"),
        ({"lengths": [2]}, "lengths: expected at least 3 tokens, got 2"),
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
