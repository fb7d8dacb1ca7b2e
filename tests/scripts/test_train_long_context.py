"""The training script, in small: what it writes, going on after a kill, several processes, bad options."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config import config_args
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

from hf_dilated.integration.persistence import stored_config
from hf_dilated.patching import PatchError, patch_checkpoint
from tests.tiny_checkpoint import save_tiny_checkpoint

script = importlib.import_module("train_long_context")
ROOT = Path(__file__).resolve().parents[2]
PATTERN = '{"segment_lengths": [64, 128, 256], "dilation_rates": [1, 2, 4], "sink_tokens": 2}'


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


def run(base: Path, output: Path, **options: Any) -> None:
    parser = HfArgumentParser((script.ModelArguments, script.DataArguments, TrainingArguments))
    script.run(*parser.parse_args_into_dataclasses(command_line(base, output, **options)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("through")
    run(base, output, curriculum="64:0.5,256:0.5", lesson_share=0.3, report_to="tensorboard", save_strategy="steps")
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


def test_a_killed_run_goes_on_to_the_same_weights(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    options = {"curriculum": "64:0.5,256:0.5", "lesson_share": 0.3, "save_strategy": "steps", "save_steps": 1}
    slow = {"dataloader_num_workers": 0, "logging_steps": 1}
    arguments = [sys.executable, str(ROOT / "scripts" / "train_long_context.py")]
    arguments += command_line(base, tmp_path, **options | slow)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / "checkpoint-9").mkdir()  # cut short
    run(base, tmp_path, **options)
    torch.testing.assert_close(weights(tmp_path), weights(uninterrupted), rtol=0, atol=0)


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


@pytest.mark.parametrize("shares", ["rows", "sequences"])
def test_two_processes_learn_what_one_does(base: Path, tmp_path: Path, shares: str) -> None:
    """A row of two each, or half of every row each: the steps of one process with two rows."""
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    arguments += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "scripts" / "train_long_context.py")]
    options: dict[str, Any] = {"max_steps": 2, "lesson_share": 0.3}
    alone = options | {"per_device_train_batch_size": 2}
    if shares == "rows":
        together = options | {"per_device_train_batch_size": 1}
    else:
        together = alone | {"attention": "ring_dilated", "sequence_parallel_size": 2}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments += command_line(base, tmp_path / "two", **together)
    done = subprocess.run(arguments, env=environment, timeout=180, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run(base, tmp_path / "one", **alone)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_accelerate_reads_its_configurations(processes: int) -> None:
    config = config_args.load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"gpu{processes}.yaml"))
    assert config.num_processes == processes
    assert config.mixed_precision == "bf16"
    if processes > 1:
        assert config.fsdp_config["fsdp_version"] == 2
