"""Trainers whose processes share sequences: the losses, weights and checkpoints of one process."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl import SFTConfig, SFTTrainer

from hf_dilated import RingConfig, sequence_parallel
from hf_dilated.training.sequence_parallel import SequenceParallelTrainerMixin
from tests.distributed.processes import run_on_ranks
from tests.integration.test_ring import batches, model_of, whole_loss
from tests.integration.test_trainer import Documents, collate, losses
from tests.integration.test_trl import documents, words_tokenizer
from tests.training.cpu_fsdp import CONFIGURATION, configure

LIMIT = 240  # seconds for processes that do nothing unusual, on a busy machine
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


class RingTrainer(SequenceParallelTrainerMixin, tf.Trainer):
    pass


class RingSFTTrainer(SequenceParallelTrainerMixin, SFTTrainer):
    pass


class Killed(tf.TrainerCallback):
    """The process of a rank is gone in the third step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 2 and dist.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


SETTINGS: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "use_cpu": True, "seed": 7, "disable_tqdm": True, "bf16": False,
}  # fmt: skip


def train(path: str, *, processes: int, family: str = "plain", sequence: int | None = None, **options: Any) -> Any:
    """Train four documents a step; return losses, evaluation and weights."""
    resume, killed = options.pop("resume", None), options.pop("killed", None)
    if options.pop("is_sharded", False) and dist.is_initialized():
        configure(CONFIGURATION, ACCELERATE_MIXED_PRECISION="no")
        options |= {"use_cpu": False}
    torch.manual_seed(0)
    model = model_of("llama", options.pop("backend", "ring"))
    data = processes // (sequence or processes)
    sizes = {
        "per_device_train_batch_size": 2 // data,
        "per_device_eval_batch_size": 2 // data,
        "gradient_accumulation_steps": 2,
    }
    if family == "packed":
        run: Any = RingSFTTrainer(
            model=model, args=SFTConfig(output_dir=path, packing=True, max_length=32, **SETTINGS | sizes | options),
            train_dataset=documents(), eval_dataset=documents(), processing_class=words_tokenizer(),
            sequence_parallel_size=sequence,
        )  # fmt: skip
    else:
        model = get_peft_model(model, LORA) if family == "lora" else model
        run = RingTrainer(
            model=model, args=tf.TrainingArguments(output_dir=path, **SETTINGS | sizes | options),
            train_dataset=Documents(), eval_dataset=Documents(), data_collator=collate, sequence_parallel_size=sequence,
            ring=RingConfig(timeout_seconds=5),
        )  # fmt: skip
    if killed is not None:
        run.add_callback(Killed(killed))
    run.train(resume_from_checkpoint=resume)
    evaluation = run.evaluate()["eval_loss"]
    parameters = [p.detach() for p in run.accelerator.unwrap_model(run.model).parameters()]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return losses(run), evaluation, torch.cat([p.flatten() for p in whole])


def check_training(rank: int, path: str, runs: list[dict[str, Any]]) -> list[Any]:
    tf.utils.logging.set_verbosity_error()
    found = [train(path, processes=dist.get_world_size(), **options) for options in runs]
    return [(losses, evaluation, weights.numpy()) for losses, evaluation, weights in found]


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    torch.testing.assert_close(torch.as_tensor(found[2]), torch.as_tensor(expected[2]), rtol=0, atol=1e-7)


RUNS: list[dict[str, Any]] = [
    {},
    {"family": "packed", "backend": "ring_dilated"},
    {"family": "lora", "max_grad_norm": 0.1, "gradient_checkpointing": True},
    {"is_sharded": True, "max_grad_norm": 0.1},
]


@pytest.mark.timeout(600)
def test_two_processes_share_sequences(tmp_path: Path) -> None:
    expected = [train(str(tmp_path), processes=1, **options) for options in RUNS]
    assert expected[0][0][0] != pytest.approx(expected[0][0][-1], rel=1e-4), "nothing is learnt"
    for found in run_on_ranks(2, check_training, str(tmp_path), RUNS, limit=LIMIT):
        assert not isinstance(found, str), found
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.timeout(600)
def test_two_groups_of_two_processes(tmp_path: Path) -> None:
    expected = train(str(tmp_path), processes=1)
    for found in run_on_ranks(4, check_training, str(tmp_path), [{"sequence": 2}], limit=LIMIT):
        assert not isinstance(found, str), found
        assert_same(found[0], expected)


@pytest.mark.timeout(600)
def test_after_one_of_two_processes_is_killed_one_and_three_resume(tmp_path: Path) -> None:
    through = train(str(tmp_path / "through"), processes=1)
    saving = {"save_strategy": "steps", "save_steps": 2, "killed": 1}
    path = str(tmp_path / "run")
    heard = run_on_ranks(2, check_training, path, [saving], limit=LIMIT, lost={1})[0]
    assert "RankLostError: rank 1 gave its last sign of life 5 seconds ago, at step" in heard, heard
    resumed = {"resume": f"{path}/checkpoint-2"}
    on_one = train(str(tmp_path / "one"), processes=1, **resumed)
    assert_same((on_one[0][-1:], *on_one[1:]), (through[0][-1:], *through[1:]))
    for found in run_on_ranks(3, check_training, str(tmp_path / "three"), [resumed], limit=LIMIT):
        assert not isinstance(found, str), found
        losses, *rest = found[0]
        assert_same((losses[-1:], *rest), (through[0][-1:], *through[1:]))


def check_fully_shard(rank: int) -> list[str]:
    """A plain loop with FSDP2: gradients are averaged over the mesh that also shares the sequences."""
    batch, model = batches()["padded"], model_of("llama", "ring")
    expected, expected_gradients = whole_loss(model, batch)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with sequence_parallel(mesh, RingConfig()) as sp:
        shard = sp.shard(batch)
        labels = shard.pop("shift_labels")
        loss = sp.loss(model(**shard).logits, labels)
        model.zero_grad()
        loss.backward()
    found = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    off = (found - expected_gradients).abs().max().item()
    return [] if off < 1e-10 and abs(loss.item() - expected.item()) < 1e-11 else [f"{loss} {expected} {off}"]


@pytest.mark.timeout(600)
def test_fully_shard() -> None:
    assert run_on_ranks(2, check_fully_shard) == [[], []]


def check_refusals(rank: int) -> list[str]:
    wrong: list[str] = []
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("attends within a process", "sdpa", {}),
        ("label_smoothing_factor: needs whole sequences", "ring", {"label_smoothing_factor": 0.1}),
        ("3 does not divide 2 processes", "ring", {"sequence": 3}),
    ]
    for words, backend, options in cases:
        model = model_of("llama", "ring")
        model.set_attn_implementation(backend)
        sequence = options.pop("sequence", None)
        arguments = tf.TrainingArguments(output_dir="unused", **SETTINGS | options)
        try:
            RingTrainer(model=model, args=arguments, sequence_parallel_size=sequence)
            wrong.append(f"no error: {words}")
        except ValueError as error:
            wrong += [] if words in str(error) else [str(error)]
    return wrong


def test_refusals() -> None:
    assert run_on_ranks(2, check_refusals) == [[], []]
