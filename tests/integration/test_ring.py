"""Whole models over several ranks: the loss, gradients and tokens of one process."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_dilated import (
    BlockSparseConfig,
    DilatedConfig,
    DisagreementError,
    RingConfig,
    ring_generate,
    sequence_parallel,
)
from hf_dilated.distributed import SequenceParallel
from hf_dilated.distributed import layout as layouts
from tests.distributed.processes import divided, run_on_ranks
from tests.tiny_models import tiny_model, tokens

PATTERNS = {
    "ring": RingConfig(),
    "ring_dilated": DilatedConfig(segment_lengths=(8, 16, 64), dilation_rates=(1, 2, 4), sink_tokens=2, rotate=True),
    "ring_block_sparse": BlockSparseConfig(block_size=8, local_blocks=2, stride_blocks=3, random_blocks=1),
}
MODELS = [("llama", backend) for backend in PATTERNS] + [("gemma3", "ring"), ("gpt_oss", "ring"), ("gpt2", "ring")]


def model_of(family: str, backend: str) -> Any:
    model = tiny_model(family, backend, dtype=torch.float64)
    model.config.hf_dilated = PATTERNS[backend]
    model.set_attn_implementation(backend)
    return model


def batches() -> dict[str, dict[str, Tensor]]:
    """A plain batch, one padded on both sides, and packed documents."""
    ids = tokens(2, 61)
    mask = torch.ones_like(ids)
    mask[0, 50:], mask[1, :7] = 0, 0
    packed = torch.cat([torch.arange(n) for n in (9, 30, 3, 19)])[None].repeat(2, 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 7] = -100  # predicted from padding
    return {
        "plain": {"input_ids": ids, "labels": ids},
        "padded": {"input_ids": ids, "attention_mask": mask, "labels": labels},
        "packed": {"input_ids": ids, "position_ids": packed, "labels": ids},
    }


def whole_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradients in one process."""
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss.detach(), gradients(model, loss)


def sharded_loss(model: Any, sp: SequenceParallel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of the whole batch, and this rank's share of the gradients."""
    shard = sp.shard(batch)
    labels = shard.pop("shift_labels")
    loss = sp.loss(model(**shard).logits, labels)
    return loss, gradients(model, loss)


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_models(rank: int, models: list[tuple[str, str]]) -> list[str]:
    """Compare losses, gradients and generated tokens; return what differs."""
    wrong = []
    for family, backend in models:
        layouts.SHORTEST_PIECE = 2 if family == "llama" else 128
        model = model_of(family, backend)
        expected_of = divided(list(batches()), lambda kind, model=model: whole_loss(model, batches()[kind]))
        found_of, layouts_of = {}, []
        with sequence_parallel() as sp:
            for kind, batch in batches().items():
                found_of[kind] = sharded_loss(model, sp, batch)
                layouts_of.append(sp.layout.kind)
        suits = "zigzag" if backend == "ring" else "contiguous"
        if layouts_of != ["zigzag", suits, suits]:  # the first batch shows how layers attend
            wrong.append(f"{family} {backend}: layouts are {layouts_of}")
        for kind, (loss, found) in found_of.items():
            expected, expected_gradients = expected_of[kind]
            dist.all_reduce(found)
            found /= dist.get_world_size()
            name = f"{family} {backend} {kind}"
            if abs(loss.item() - expected.item()) > 1e-11:
                wrong.append(f"{name}: loss {loss.item()} is not {expected.item()}")
            if not torch.allclose(found, expected_gradients, rtol=0, atol=1e-7):  # norms compute in float32
                wrong.append(f"{name}: gradients are off by {(found - expected_gradients).abs().max():.1e}")
        wrong += check_generation(f"{family} {backend}", model)
    return wrong


def check_generation(name: str, model: Any) -> list[str]:
    wrong: list[str] = []
    ids = tokens(2, 45)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    ways: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
        "plain": (None, {}),
        "padded": (mask, {}),
        "beams": (None, {"num_beams": 2}),
        "sampled": (mask, {"do_sample": True}),
    }
    kinds = ["plain"] if "gpt_oss" in name else list(ways)

    def generated(kind: str) -> list[list[int]]:
        given, more = ways[kind]
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=given, **options | more).tolist()

    expected = divided(kinds, generated)
    for kind in kinds:
        given, more = ways[kind]
        with sequence_parallel() as sp:
            torch.manual_seed(0)
            found = ring_generate(model, sp, ids, given, **options | more).tolist()
        if found != expected[kind]:
            wrong.append(f"{name}, {kind}: generated {found}, not {expected[kind]}")
    return wrong


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("ranks", "models"), [(2, MODELS), (3, MODELS[:2])])
def test_models_compute_what_one_process_does(ranks: int, models: list[tuple[str, str]]) -> None:
    for rank, wrong in enumerate(run_on_ranks(ranks, check_models, models)):
        assert wrong == [], f"rank {rank}"


def check_documents(rank: int) -> list[str]:
    """Change one document: only its own logits change."""
    model, batch = model_of("llama", "ring"), batches()["packed"]
    changed = batch["input_ids"].clone()
    changed[:, 9:39] = (changed[:, 9:39] + 5) % 60
    logits = []
    with sequence_parallel() as sp, torch.no_grad():
        for ids in (batch["input_ids"], changed):
            shard = sp.shard({"input_ids": ids, "position_ids": batch["position_ids"]})
            logits.append(sp.unshard(model(**shard).logits))
    same = (logits[0] == logits[1]).all(-1).all(0)
    inside = torch.arange(61)
    return [] if torch.equal(~same, (inside >= 9) & (inside < 39)) else [str(same)]


def check_refusals(rank: int) -> list[str]:
    wrong, model, ids = [], model_of("llama", "ring"), tokens(2, 30)

    def expect(words: str, call: Any, kind: type[Exception]) -> None:
        try:
            call()
        except kind as error:
            if words not in str(error):
                wrong.append(str(error))
        else:
            wrong.append(f"no error about {words}")

    with sequence_parallel() as sp:
        expect("no shard of the last batch", lambda: model(ids), ValueError)
        lengths = {"input_ids": ids[:, : 20 + dist.get_rank()]}
        expect(
            "differs (rank 0: input_ids (2, 20), rank 1: input_ids (2, 21)",
            lambda: sp.shard(lengths),
            DisagreementError,
        )
        other = {"input_ids": ids + dist.get_rank()}
        expect("the content of input_ids differs", lambda: sp.shard(other), DisagreementError)
        expect(
            "pass packed documents as position_ids",
            lambda: sp.shard({"input_ids": ids, "cu_seq_lens_q": 1}),
            ValueError,
        )
        expect("leave out prefill_chunk_size", lambda: ring_generate(model, sp, ids, prefill_chunk_size=4), ValueError)
    return wrong


def check_misfits(rank: int) -> list[str]:
    """A layout that was asked for, but does not suit the layers, is told."""
    wrong = []
    for backend, layout, words in (
        ("ring", "contiguous", "layers attend densely"),
        ("ring_dilated", "zigzag", "follow"),
    ):
        model, batch = model_of("llama", backend), batches()["plain"]
        with sequence_parallel(config=RingConfig(layout=layout)) as sp, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                sharded_loss(model, sp, batch)
        if [words in str(warning.message) for warning in told if "layout=" in str(warning.message)] != [True]:
            wrong.append(f"{backend}: {[str(warning.message) for warning in told]}")
    return wrong


@pytest.mark.parametrize("backend", PATTERNS)
def test_a_process_alone_runs_the_same_program(backend: str) -> None:
    model = model_of("llama", backend)
    for batch in batches().values():
        expected, expected_gradients = whole_loss(model, batch)
        with sequence_parallel(config=RingConfig(chunk_tokens=70)) as sp:
            loss, found = sharded_loss(model, sp, batch)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(found, expected_gradients, rtol=0, atol=1e-7)


@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_without_a_group_are_refused(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    monkeypatch.setenv(launcher, "2")
    with pytest.raises(ValueError, match="init_process_group first, for 2 processes"), sequence_parallel():
        pass


@pytest.mark.timeout(100)
@pytest.mark.parametrize("check", [check_documents, check_refusals, check_misfits])
def test_on_two_ranks(check: Any) -> None:
    assert run_on_ranks(2, check) == [[], []]
