"""The recipe through TRL's SFTTrainer: packing, LoRA with embeddings and norms, throughput in the log."""

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_dilated import DilatedConfig
from hf_dilated.integration.persistence import stored_config
from hf_dilated.training.lora import long_lora
from hf_dilated.training.throughput import ThroughputMixin
from tests.tiny_checkpoint import tokenizer
from tests.tiny_models import tiny_model

PATTERN = DilatedConfig(segment_lengths=(16, 32), dilation_rates=(1, 2))


class Trainer(ThroughputMixin, SFTTrainer):
    pass


def test_the_same_recipe(tmp_path: Path) -> None:
    tokens = tokenizer()
    model = tiny_model("llama", "dilated", hf_dilated=PATTERN)
    texts = [[3 + (start + n) % 40 for n in range(length)] for start, length in enumerate((30, 9, 50, 12, 22, 40))]
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_length=64, packing=True, packing_strategy="bfd", max_steps=12, logging_steps=1,
        learning_rate=2e-2, per_device_train_batch_size=2, gradient_checkpointing=True, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": texts}),
        processing_class=tokens,
        peft_config=long_lora(model, rank=4),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert all(entry["tokens_per_second"] > 0 for entry in logged)
    assert trainer.model.config._attn_implementation == "dilated"
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert stored_config(merged.config).dilated == PATTERN
