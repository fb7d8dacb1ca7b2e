"""What a training step at full length costs: operations by the pattern, seconds by the clock."""

import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from hf_dilated.evaluation.perplexity import wait
from hf_dilated.integration.layers import layer_pattern
from hf_dilated.patterns import BlockSparsePattern, Pattern
from hf_dilated.patterns.sight import look

QUERIES = 64  # looked at to estimate the mean number of keys
WARM_UP, REPEATS = 2, 5  # steps
FORWARD_AND_BACKWARD = {"attention": 3.5, "rest": 3.0}  # in forward passes; attention computes its scores again


def operations(config: Any, backend: str, length: int) -> dict[str, float]:
    """Estimate the operations of one training step on a single document.

    Args:
        config: Configuration of a Llama-like model that holds the backend's pattern.
        backend: Its ``attn_implementation``.
        length: Tokens of the document.

    Returns:
        ``attention``, ``dense attention`` (the same with every earlier key) and ``rest`` (the matrices).
    """
    patterns = [layer_pattern(config, layer, None, backend) for layer in range(config.num_hidden_layers)]
    keys = sum(_mean_keys(pattern, config, length) for pattern in patterns)
    each = FORWARD_AND_BACKWARD["attention"] * 4 * config.head_dim * config.num_attention_heads * length
    per_layer = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    weights = config.num_hidden_layers * config.hidden_size * (per_layer + 3 * config.intermediate_size)
    weights += config.vocab_size * config.hidden_size
    return {
        "attention": each * keys,
        "dense attention": each * len(patterns) * (length + 1) / 2,
        "rest": FORWARD_AND_BACKWARD["rest"] * 2 * weights * length,
    }


def _mean_keys(pattern: Pattern, config: Any, length: int) -> float:
    heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    mean = float(look(pattern, length, head=0, is_causal=True, queries=QUERIES, **heads).read.mean())
    if isinstance(pattern, BlockSparsePattern) and pattern.chosen_blocks:
        size = pattern.config.block_size
        mean += pattern.chosen_blocks * size + length / size / 2  # the chosen keys, and the mean keys to choose by
    return mean


def seconds_a_step(model: Any, length: int) -> float:
    """Return the median time of forward and backward on one document of random tokens."""
    device = model.device
    tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
    seconds = []
    model.train()
    for _ in range(WARM_UP + REPEATS):
        wait(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        wait(device)
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return median(seconds[WARM_UP:])
