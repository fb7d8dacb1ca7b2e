"""How the shipped model is taught to read far: what the scripts that do it share."""

from multiprocessing import get_start_method
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

SHIPPED = Path(__file__).resolve().parents[2] / "model_cards" / "pystdlib-4m"
LESSON_SHARE = 0.3
STEPS = 900
ROWS = 2
LEARNING_RATE = 1e-3


def curriculum(trained: int, length: int) -> str:
    """A tenth of the steps at the trained length, three tenths at four times that, and the rest at the full length.

    Example:
        >>> curriculum(2048, 32768)
        '2048:0.1,8192:0.3,32768:0.6'
    """
    return f"{trained}:0.1,{min(4 * trained, length)}:0.3,{length}:0.6"


def workers(device: str) -> int:
    """Return 1 where another process can make the rows while a GPU computes, else 0."""
    return int(device != "cpu" and get_start_method() == "fork")


def training_options(*, steps: int, rows: int, learning_rate: float, device: str, seed: int) -> dict[str, Any]:
    """Return options of Transformers' ``TrainingArguments``: AdamW, a cosine; on GPUs bfloat16 autocast."""
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
        "dataloader_num_workers": workers(device),
        "logging_steps": max(1, steps // 20),
        "seed": seed,
    }


def check_one_gpu(arguments: TrainingArguments) -> None:
    """Refuse several visible GPUs: ``Trainer`` would give each of them the rows of a step.

    Raises:
        ValueError: Then.
    """
    if arguments.n_gpu > 1:
        raise ValueError("device: several GPUs are visible and one is used; choose it with CUDA_VISIBLE_DEVICES")


def training_seconds(log: list[dict[str, Any]], tokens_per_step: int) -> float:
    """Return the wall time of a training from the log of ``Trainer``, whose entries know their speed."""
    steps = [entry["step"] - before for entry, before in zip(log, [0, *(e["step"] for e in log)], strict=False)]
    return sum(count * tokens_per_step / entry["tokens_per_second"] for count, entry in zip(steps, log, strict=True))
