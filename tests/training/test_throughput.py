"""The log of a trainer counts every token, and its memory."""

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from hf_dilated.training import throughput
from hf_dilated.training.packing import PackedRows
from hf_dilated.training.throughput import ThroughputMixin
from tests.tiny_models import tiny_model


class Counted(ThroughputMixin, tf.Trainer):
    pass


def test_tokens_a_second_and_memory_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock), raising=True)
    options: dict[str, Any] = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    rows = PackedRows(lambda epoch: [[5, 6, 7, 8, 9]], length=16, rows=24)
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), **options)
    trainer = Counted(model=tiny_model("llama", "dilated"), args=arguments, train_dataset=rows)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    # Two steps of two batches of two rows of 16 tokens, one tick of the clock apart.
    assert [entry["tokens_per_second"] for entry in logged] == [128.0] * 3
    assert all(0.05 < entry["peak_memory_gib"] < 64 for entry in logged)
    assert "tokens_per_second" not in trainer.state.log_history[-1]  # the summary of the run
