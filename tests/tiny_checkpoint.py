"""A tiny checkpoint with a real tokenizer: that of the shipped model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny_models import sharpen

TOKENIZER = Path(__file__).resolve().parents[1] / "model_cards" / "pystdlib-4m"
TEXT = Path(__file__).read_text("utf-8")


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def save_tiny_checkpoint(folder: Path, **options: Any) -> Path:
    """Write a random Llama of two layers, made for 64 tokens, and its tokenizer; return the folder."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), bos_token_id=0, eos_token_id=0, **sizes | options)
    model = LlamaForCausalLM(config)
    sharpen(model)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
