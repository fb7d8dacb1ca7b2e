"""LoRA for long contexts: as LongLoRA (arXiv:2309.12307) found, embeddings and norms have to learn too."""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft import LoraConfig


def long_lora(model: Any, *, rank: int = 8, alpha: int | None = None, dropout: float = 0.0) -> "LoraConfig":
    """Return the PEFT configuration: low rank on the projections of attention, embeddings and norms in full.

    Args:
        model: A language model of Transformers.
        rank: Of the adapters.
        alpha: Their scale times ``rank``; twice the rank by default.
        dropout: Of the adapters' input.

    Raises:
        ValueError: If the model has no attention with linear projections, or PEFT would untie its embeddings.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> config = long_lora(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)))
        >>> sorted(config.target_modules)
        ['k_proj', 'o_proj', 'q_proj', 'v_proj']
        >>> sorted(config.modules_to_save)
        ['embed_tokens', 'input_layernorm', 'norm', 'post_attention_layernorm']
    """
    from peft import LoraConfig
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    projections, whole = set(), set()
    for name, module in model.named_modules():
        kind, last = type(module).__name__, name.rpartition(".")[2]
        if isinstance(module, nn.Linear | Conv1D) and _in_attention(model, name):
            projections.add(last)
        elif isinstance(module, nn.Embedding) or ("Norm" in kind and getattr(module, "weight", None) is not None):
            whole.add(last)
    if not projections:
        raise ValueError(f"{type(model).__name__} has no attention with linear projections; train it in full")
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if is_tied and not whole.intersection(EMBEDDING_LAYER_NAMES):
        raise ValueError(
            f"{type(model).__name__} ties its output to embeddings that PEFT does not know as such and would untie; "
            "train it in full, or load it with tie_word_embeddings=False"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=sorted(projections),
        modules_to_save=sorted(whole),
        ensure_weight_tying=is_tied,
    )


def _in_attention(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(
        "Attention" in type(model.get_submodule(".".join(parents[:n]))).__name__ for n in range(1, len(parents) + 1)
    )
