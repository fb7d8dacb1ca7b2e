"""How the shipped model is taught to read far: what the scripts that do it share."""

from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parents[2] / "model_cards" / "pystdlib-4m"
LESSON_SHARE = 0.3


def curriculum(trained: int, length: int) -> str:
    """A third of the steps each at the trained length, four times that, and the full length.

    Example:
        >>> curriculum(2048, 32768)
        '2048:0.3,8192:0.3,32768:0.4'
    """
    return f"{trained}:0.3,{min(4 * trained, length)}:0.3,{length}:0.4"


def training_options(*, steps: int, rows: int, learning_rate: float, device: str, seed: int) -> dict[str, Any]:
    """Return options of Transformers' ``TrainingArguments``: AdamW, a cosine, bfloat16 autocast on GPUs."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": device.startswith("cuda"),
        "use_cpu": device == "cpu",
        "logging_steps": max(1, steps // 10),
        "seed": seed,
    }
