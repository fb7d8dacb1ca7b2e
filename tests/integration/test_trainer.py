"""Trainer: the same losses as dense attention where the pattern is dense; checkpoints; autocast."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.data import Dataset

from hf_dilated import DilatedConfig, StoredConfig
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.support import UnsupportedError
from tests.tiny_models import tiny_config, tiny_model, tokens

SHORT = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=2)
DENSE = DilatedConfig(segment_lengths=(64, 128), dilation_rates=(1, 2))


class Documents(Dataset):
    """Sixteen documents of different lengths, padded by the collator below."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": tokens(1, 10 + 2 * index, seed=index)[0].tolist()}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(example["input_ids"]) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        mask[row, : len(example["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model: tf.PreTrainedModel, path: Path, **options: Any) -> tf.Trainer:
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 7}
    arguments = tf.TrainingArguments(output_dir=str(path), **settings | options)
    return tf.Trainer(model=model, args=arguments, train_dataset=Documents(), data_collator=collate)


def losses(run: tf.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulation", "reentrant", "non-reentrant"],
)
def test_losses_are_those_of_dense_attention(tmp_path: Path, options: dict[str, Any]) -> None:
    found = {}
    for backend in ("sdpa", "dilated"):
        run = trainer(tiny_model("llama", backend, hf_dilated=DENSE), tmp_path, **options)
        run.train()
        found[backend] = losses(run)
    assert len(found["sdpa"]) == 4
    assert found["dilated"] == pytest.approx(found["sdpa"], rel=1e-6)


def test_a_checkpoint_resumes_where_it_stopped(tmp_path: Path) -> None:
    through = trainer(tiny_model("llama", "dilated", hf_dilated=SHORT), tmp_path / "through")
    through.train()
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(tiny_model("llama", "dilated", hf_dilated=SHORT), tmp_path / "run", **options).train()

    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert json.loads((checkpoint / "config.json").read_text())["attn_implementation"] == "dilated"
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    assert model.config._attn_implementation == "dilated"
    assert stored_config(model.config) == StoredConfig(attn_implementation="dilated", dilated=SHORT)

    resumed = trainer(model, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == pytest.approx(losses(through), rel=1e-9)
    torch.testing.assert_close(resumed.model.state_dict(), through.model.state_dict())


def test_the_pattern_matters(tmp_path: Path) -> None:
    """The comparison with dense attention can fail."""
    found = []
    for pattern in (SHORT, DENSE):
        run = trainer(tiny_model("llama", "dilated", hf_dilated=pattern), tmp_path, max_steps=1)
        run.train()
        found += losses(run)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_bfloat16_autocast_reaches_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    backend = BACKENDS["dilated"]

    def spy(query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.add(query.dtype)
        return backend.attend(query, *arguments, **options)

    monkeypatch.setitem(BACKENDS, "dilated", dataclasses.replace(backend, attend=spy))
    found = {}
    for bf16 in (False, True):
        seen.clear()
        model = tiny_model("llama", "dilated", dtype=torch.float32, hf_dilated=SHORT)
        run = trainer(model, tmp_path, bf16=bf16, learning_rate=1e-3)
        run.train()
        found[bf16] = losses(run)
        assert seen == {torch.bfloat16 if bf16 else torch.float32}
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert found[True] == pytest.approx(found[False], rel=2e-2)
    assert found[True] != found[False]


def test_attention_dropout_is_refused_in_training(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.attention_dropout = 0.1
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="dilated")
    with pytest.raises(UnsupportedError, match=r"dropout=0\.1.*set config\.attention_dropout"):
        trainer(model, tmp_path).train()
