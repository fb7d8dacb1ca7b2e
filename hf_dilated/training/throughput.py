"""Tokens a second and memory in the log of ``Trainer``."""

import resource
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class ThroughputMixin(Base):
    """Adds ``tokens_per_second`` of all devices and ``peak_memory_gib`` of this one to the training log.

    Put it in front of a trainer: ``class MyTrainer(ThroughputMixin, Trainer)``; TRL's trainers work alike. The time
    between two entries of the log counts whole, evaluation and saving included. Peak memory is what PyTorch has
    allocated since the last entry on CUDA, and elsewhere the most that the process has had resident so far.
    """

    _tokens = 0
    _since: float | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        """Count the tokens of the batch and train on it."""
        if self._since is None:
            self._since = time.perf_counter()
        self._tokens += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with the two numbers where there is a training loss."""
        if "loss" in logs and self._since is not None:
            logs = logs | self._measure(self._since)
        super().log(logs, *args, **options)

    def _measure(self, since: float) -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = time.perf_counter()
        readers = self.accelerator.num_processes // getattr(self, "sequence_parallel_size", 1)
        tokens = self._tokens * readers
        self._tokens, self._since = 0, now
        return {"tokens_per_second": round(tokens / (now - since), 1), "peak_memory_gib": round(peak / 2**30, 3)}
