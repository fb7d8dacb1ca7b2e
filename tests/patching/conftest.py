"""Checkpoints that never heard of this package."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.utils import logging

from tests.tiny_models import GROUPED

logging.set_verbosity_error()


@pytest.fixture
def model() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED))


@pytest.fixture
def checkpoint(tmp_path: Path, model: tf.PreTrainedModel) -> Path:
    """Two shards, a tokenizer's limit, a chat template, generation settings, and files that do not belong."""
    path = tmp_path / "plain"
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer_config.json").write_text('{\n  "model_max_length": 256\n}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("optimizer.pt", "README.md", "trainer_state.json", "pytorch_model.bin", ".gitattributes"):
        (path / name).write_text("not wanted")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path
