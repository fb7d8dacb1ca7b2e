"""Weights sharded with FSDP2 as ``scripts/accelerate/gpu2.yaml`` says: the losses and weights of one process."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

from hf_dilated.integration.support import UnsupportedError
from hf_dilated.training.lora import long_lora
from hf_dilated.training.sharded import ShardedTrainerMixin
from tests.distributed.processes import run_on_ranks
from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.training.cpu_fsdp import CONFIGURATION, configure

script = importlib.import_module("train_long_context")
PATTERN = '{"segment_lengths": [64, 128], "dilation_rates": [1, 2], "sink_tokens": 2}'
LIMIT = 180  # seconds for processes that do nothing unusual, on a busy machine


class Trainer(ShardedTrainerMixin, tf.Trainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"x_{n} = {n % 7}\n" for n in range(400)))
    save_tiny_checkpoint(folder / "untied")
    save_tiny_checkpoint(folder / "tied", tie_word_embeddings=True)
    return folder


def train(base: Path, output: str, model: str, options: dict[str, Any]) -> None:
    """Run the training script in this process."""
    settings: dict[str, Any] = {"model": base / model, "dataset": base / "text.txt", "max_length": 128}
    settings |= {"output_dir": base / output, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
    settings |= {"report_to": "none", "disable_tqdm": True, "pattern": PATTERN, "dtype": "float32"}
    settings |= {"per_device_train_batch_size": 2, "max_grad_norm": 0.5, "save_strategy": "no"} | options
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    parser = HfArgumentParser((script.ModelArguments, script.DataArguments, TrainingArguments))
    tf.utils.logging.set_verbosity_error()
    script.run(*parser.parse_args_into_dataclasses(words))


def train_sharded(rank: int, base: Path, runs: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Adapters are saved as a whole, everything else in shards."""
    for run in runs:
        kind = "FULL_STATE_DICT" if "lora_rank" in run[-1] else "SHARDED_STATE_DICT"
        configure(CONFIGURATION, ACCELERATE_MIXED_PRECISION="no", FSDP_STATE_DICT_TYPE=kind)
        train(base, *run)


def log(folder: Path) -> list[tuple[float, float]]:
    """Losses and gradient norms, step by step."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


def assert_same(found: Path, expected: Path) -> None:
    assert log(found) == [pytest.approx(step, rel=1e-5) for step in log(expected)]
    one, other = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4)  # of steps of 1e-2
    model = AutoModelForCausalLM.from_pretrained(found)
    assert model.config._attn_implementation in ("dilated", "ring_dilated")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.use_cache


SHARED = {"attention": "ring_dilated", "sequence_parallel_size": 2}
ADAPTED = {"lora_rank": 2, "gradient_checkpointing": True}
SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.timeout(4 * LIMIT)  # three times processes, and two runs in this one
def test_two_processes_then_one_and_four(base: Path) -> None:
    """Full training of rows, adapters of sequences; then from the checkpoint in the middle with other processes."""
    rows = {"per_device_train_batch_size": 1}
    train(base, "full-1", "tied", {"use_cpu": True})
    train(base, "adapted-1", "untied", {"use_cpu": True} | ADAPTED)
    runs = [("full-2", "tied", rows | SAVED), ("adapted-2", "untied", SHARED | ADAPTED | SAVED)]
    assert run_on_ranks(2, train_sharded, base, runs, limit=LIMIT) == [None] * 2
    assert_same(base / "full-2", base / "full-1")
    assert_same(base / "adapted-2", base / "adapted-1")
    halfway = base / "full-2" / "checkpoint-2"
    assert (halfway / "pytorch_model_fsdp_0" / ".metadata").exists()
    assert not (halfway / "model.safetensors").exists()
    assert (base / "adapted-2" / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()
    resumed = {"resume_from_checkpoint": halfway}
    assert run_on_ranks(1, train_sharded, base, [("resumed-1", "tied", resumed)], limit=LIMIT) == [None]
    assert_same(base / "resumed-1", base / "full-1")
    resumed = SHARED | ADAPTED | rows | {"resume_from_checkpoint": base / "adapted-2" / "checkpoint-2"}
    assert run_on_ranks(4, train_sharded, base, [("resumed-4", "untied", resumed)], limit=LIMIT) == [None] * 4
    assert_same(base / "resumed-4", base / "adapted-1")


def tied_adapters(rank: int, base: Path) -> str:
    configure(CONFIGURATION)
    model = AutoModelForCausalLM.from_pretrained(base / "tied")
    model = get_peft_model(model, long_lora(model))
    with pytest.raises(UnsupportedError) as error:
        Trainer(model=model, args=TrainingArguments(output_dir=str(base / "unused"), report_to=[]))
    return str(error.value)


def test_tied_adapters_that_one_process_has_read_are_refused(base: Path) -> None:
    (said,) = run_on_ranks(1, tied_adapters, base)
    assert said.startswith("fsdp_cpu_ram_efficient_loading: accelerate cannot tie"), said


def test_the_first_version_of_fsdp_is_refused() -> None:
    class Base:
        def create_accelerator_and_postprocess(self) -> None:
            plugin = SimpleNamespace(fsdp_version=1)
            self.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))

    class Old(ShardedTrainerMixin, Base):
        pass

    with pytest.raises(UnsupportedError, match="fsdp_version=1: set fsdp_version: 2"):
        Old.__new__(Old).create_accelerator_and_postprocess()


def test_checkpoints_without_fsdp_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was saved without FSDP"):
        ShardedTrainerMixin._load_from_checkpoint(SimpleNamespace(is_fsdp_enabled=True), str(tmp_path))
