"""The training script, in small: what it writes, going on after a kill, several processes, bad options."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config import config_args
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainerCallback, TrainingArguments

from hf_dilated.integration.persistence import stored_config
from hf_dilated.patching import PatchError, patch_checkpoint
from tests.distributed.processes import run_on_ranks
from tests.scripts.killed_process import Killed
from tests.tiny_checkpoint import save_tiny_checkpoint

script = importlib.import_module("train_long_context")
ROOT = Path(__file__).resolve().parents[2]
PATTERN = '{"segment_lengths": [64, 128, 256], "dilation_rates": [1, 2, 4], "sink_tokens": 2}'
RESUMABLE = {"curriculum": "64:0.5,256:0.5", "lesson_share": 0.3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text("".join(f"x_{number} = {n}\n" for n in range(40 * (number + 1))))
    save_tiny_checkpoint(folder / "model")
    return folder


def command_line(base: Path, output: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {"model": base / "model", "dataset": base / "texts", "max_length": 256}
    settings |= {"output_dir": output, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    settings |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    settings |= {"pattern": PATTERN, "dtype": "float32", "seed": 3}
    settings |= options
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def run(base: Path, output: Path, *, callbacks: Sequence[TrainerCallback] = (), **options: Any) -> None:
    parser = HfArgumentParser((script.ModelArguments, script.DataArguments, TrainingArguments))
    script.run(*parser.parse_args_into_dataclasses(command_line(base, output, **options)), callbacks=callbacks)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("through")
    run(base, output, **RESUMABLE | {"report_to": "tensorboard"})
    return output


def test_the_result_is_a_patched_checkpoint(base: Path, uninterrupted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(uninterrupted)
    assert model.config._attn_implementation == "dilated"
    assert stored_config(model.config).dilated.to_dict().items() >= json.loads(PATTERN).items()
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.use_cache
    assert (uninterrupted / "tokenizer.json").exists()
    before = weights(base / "model")
    after = weights(uninterrupted)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_log_has_throughput_and_memory_and_reaches_tensorboard(uninterrupted: Path) -> None:
    (state,) = uninterrupted.glob("checkpoint-4/trainer_state.json")
    logged = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(logged) == 4
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory_gib"] > 0 for entry in logged)
    (events,) = uninterrupted.rglob("events.out.tfevents*")
    assert b"train/tokens_per_second" in events.read_bytes()


def run_as_a_rank(rank: int, base: Path, output: Path, options: dict[str, Any], is_killed: bool = False) -> None:
    run(base, output, callbacks=[Killed()] if is_killed else [], **options)


def test_a_killed_process_goes_on_to_the_same_weights(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert run_on_ranks(1, run_as_a_rank, base, tmp_path, RESUMABLE, True) == [-signal.SIGKILL]
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / "checkpoint-9").mkdir()  # cut short
    run(base, tmp_path, **RESUMABLE)
    torch.testing.assert_close(weights(tmp_path), weights(uninterrupted), rtol=0, atol=0)


def test_of_two_processes_one_is_killed_and_one_goes_on(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Rows of two processes are those of one, which reads on where they stopped."""
    two = RESUMABLE | {"per_device_train_batch_size": 1}
    survivor, killed = run_on_ranks(2, run_as_a_rank, base, tmp_path, two, True)
    assert "Error" in survivor
    assert killed == -signal.SIGKILL
    assert not (tmp_path / "model.safetensors").exists()
    for restores in (False, True):
        with pytest.raises(ValueError, match="rows a step: 2 until this checkpoint, 1 from now on"):
            run(base, tmp_path, **two, restore_callback_states_from_checkpoint=restores)
    run(base, tmp_path, **RESUMABLE)
    assert_close(tmp_path, uninterrupted)


@pytest.mark.timeout(500)
def test_under_torchrun_one_is_killed_and_two_go_on(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Two processes share every row; at first they read in processes of their own."""
    shared = RESUMABLE | {"attention": "ring_dilated", "sequence_parallel_size": 2}
    arguments = command_line(base, tmp_path, **shared | {"dataloader_num_workers": 1})
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    stopped = launch(launcher, "scripts/killed_process.py", arguments)
    assert "(exitcode: -9) local_rank: 1" in stopped.stderr, stopped.stderr[-3000:]
    assert not (tmp_path / "model.safetensors").exists()
    assert run_on_ranks(2, run_as_a_rank, base, tmp_path, shared) == [None, None]
    assert_close(tmp_path, uninterrupted)


@pytest.mark.timeout(500)
def test_accelerate_launches_what_is_shipped(base: Path, tmp_path: Path) -> None:
    """FSDP2, adapters, tied embeddings, bfloat16 and checkpointing, on two processes as on one."""
    save_tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    options = {"model": tmp_path / "tied", "lora_rank": 2, "gradient_checkpointing": True, "max_steps": 2}
    options |= {"dtype": "bfloat16", "save_strategy": "steps", "save_steps": 2}
    run(base, tmp_path / "one", bf16=True, **options)
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "scripts" / "accelerate" / "gpu2.yaml")]
    launcher += ["--main_process_port", "0"]
    arguments = command_line(base, tmp_path / "two", **options | {"per_device_train_batch_size": 1, "use_cpu": None})
    done = launch(launcher, "training/cpu_fsdp.py", arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, expected = (
        [entry["loss"] for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][:2]]
        for name in ("two", "one")
    )
    assert losses == pytest.approx(expected, rel=2e-3)
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss in losses)
    assert (tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()
    assert weights(tmp_path / "two")["model.norm.weight"].dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert model.config._attn_implementation == "dilated"


def launch(launcher: list[str], program: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", *launcher, str(ROOT / "tests" / program), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, timeout=300, capture_output=True, text=True, check=False)


def assert_close(found: Path, expected: Path) -> None:
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=2e-5)


def test_adapters_are_merged(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path, lora_rank=2, gradient_checkpointing=True, max_steps=2)
    assert weights(tmp_path).keys() == weights(base / "model").keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "dilated"


def test_dense_and_block_sparse(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "dense", attention="sdpa", pattern=None, max_steps=1)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config._attn_implementation == "sdpa"
    assert dense.config.max_position_embeddings == 256
    run(
        base,
        tmp_path / "sparse",
        attention="block_sparse",
        pattern='{"block_size": 32, "local_blocks": 2}',
        max_steps=1,
    )
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sparse.config._attn_implementation == "block_sparse"


def test_a_patched_checkpoint_is_taken_as_it_is(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run(base, tmp_path, model=uninterrupted, pattern=None, max_steps=1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.max_position_embeddings == 256
    for options, message in (
        ({}, "runs 'dilated' already"),
        ({"pattern": None, "attention": "sdpa"}, "runs 'dilated' already"),
        ({"pattern": None, "max_length": 512}, "patched for 256 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            run(base, tmp_path / "refused", model=uninterrupted, **options)
    assert not (tmp_path / "refused" / "model.safetensors").exists()


def test_dynamic_positions_are_taken_as_far_as_they_reach(base: Path, tmp_path: Path) -> None:
    patch_checkpoint(base / "model", tmp_path / "long", max_position_embeddings=256, rope_scaling="dynamic")
    arguments = {"model": str(tmp_path / "long")}
    model = script.load_model(script.ModelArguments(**arguments, max_length=256))
    assert model.config.max_position_embeddings == 64
    with pytest.raises(ValueError, match="patched for 256 tokens"):
        script.load_model(script.ModelArguments(**arguments, max_length=257))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "max_steps: streams have no end"),
        ({"curriculum": "64:0.5"}, "shares add up to 0.5"),
        ({"files": "*.rst"}, "finds no file"),
        ({"sequence_parallel_size": 2}, "2 does not divide 1 processes"),
        ({"max_length": 32}, "already reads 64 tokens"),
        ({"rope_scaling": "magic"}, "rope_scaling: expected one of"),
    ],
)
def test_bad_options(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, PatchError), match=message):
        run(base, tmp_path, **options)


def test_a_model_that_is_not_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *command_line(base, tmp_path, model=tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        script.main()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_accelerate_reads_its_configurations(processes: int) -> None:
    config = config_args.load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"gpu{processes}.yaml"))
    assert config.num_processes == processes
    assert config.mixed_precision == "bf16"
    if processes > 1:
        assert config.fsdp_config["fsdp_version"] == 2
