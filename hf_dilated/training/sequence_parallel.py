"""Training with one sequence over many processes, for Transformers' ``Trainer`` and what is derived from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hf_dilated.config import RingConfig
from hf_dilated.distributed.session import IGNORED, SequenceParallel, sequence_parallel
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.ring import ring_settings
from hf_dilated.integration.support import UnsupportedError

BACKENDS = ("ring", "ring_dilated", "ring_block_sparse")


class SequenceParallelTrainerMixin:
    """Put before ``Trainer`` (or TRL's ``SFTTrainer``): its processes then share sequences.

    ``sequence_parallel_size`` neighbouring processes read the same batch and hold a slice of it each; further processes
    are data-parallel as ever, with DDP or FSDP. Losses, gradients, accumulation and clipping are those of whole
    sequences, and a checkpoint resumes on any number of processes. The model runs a ``ring`` backend.

    Args:
        sequence_parallel_size: Processes that share a sequence; by default all.
        ring: Layout and transport; by default what the model's configuration holds.

    Raises:
        ValueError: If the processes do not divide into such groups.
        UnsupportedError: For options under which the loss would not be that of whole sequences.

    Example:
        >>> from transformers import Trainer
        >>> class RingTrainer(SequenceParallelTrainerMixin, Trainer):
        ...     pass
    """

    args: Any
    accelerator: Any
    model: Any

    def __init__(
        self, *arguments: Any, sequence_parallel_size: int | None = None, ring: RingConfig | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        world = self.args.world_size
        self.sequence_parallel_size = sequence_parallel_size or world
        if world % self.sequence_parallel_size:
            raise ValueError(f"sequence_parallel_size: {self.sequence_parallel_size} does not divide {world} processes")
        self._session: SequenceParallel | None = None
        if self.sequence_parallel_size == 1:
            return
        self._check_options()
        backend = self.model.config.get_text_config()._attn_implementation
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"attn_implementation={backend!r} attends within a process; load the model with one of "
                f"{', '.join(map(repr, BACKENDS))}, or set sequence_parallel_size=1"
            )
        self._ring = ring_settings(backend, ring or stored_config(self.model.config).ring or RingConfig())
        shape = world // self.sequence_parallel_size, self.sequence_parallel_size
        self._mesh = init_device_mesh(self.args.device.type, shape, mesh_dim_names=("data", "sequence"))["sequence"]

    def _check_options(self) -> None:
        refused = {
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "compute_loss_func": getattr(self, "compute_loss_func", None) is not None,
            "compute_metrics": getattr(self, "compute_metrics", None) is not None,
            "a model whose loss takes no num_items_in_batch": not getattr(self, "model_accepts_loss_kwargs", True),
        }
        if given := [name for name, is_given in refused.items() if is_given]:
            raise UnsupportedError(
                f"{', '.join(given)}: needs whole sequences on one process, but they are spread over "
                f"{self.sequence_parallel_size}; leave it out, or set sequence_parallel_size=1"
            )

    @contextmanager
    def _spread(self) -> Iterator[None]:
        """Open a session, once."""
        if self.sequence_parallel_size == 1 or self._session is not None:
            yield
            return
        with sequence_parallel(self._mesh, self._ring) as self._session:
            try:
                yield
            finally:
                self._session = None

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as ``Trainer`` does, on all processes together."""
        with self._spread():
            return super().train(*arguments, **options)  # type: ignore[misc]

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate the loss as ``Trainer`` does, on all processes together."""
        with self._spread():
            return super().evaluate(*arguments, **options)  # type: ignore[misc]

    def predict(self, *arguments: Any, **options: Any) -> Any:
        """Refuse, where sequences are spread over processes: their predictions are."""
        if self.sequence_parallel_size > 1:
            raise UnsupportedError("predict: predictions are spread over processes; set sequence_parallel_size=1")
        return super().predict(*arguments, **options)  # type: ignore[misc]

    def get_cp_size(self) -> int:
        """How many processes get the same batch; ``Trainer`` counts batches and tokens with it."""
        return super().get_cp_size() * self.sequence_parallel_size  # type: ignore[misc]

    def _get_dataloader(self, *arguments: Any, **options: Any) -> Any:
        loader = super()._get_dataloader(*arguments, **options)  # type: ignore[misc]
        if self.sequence_parallel_size == 1:
            return loader
        shards: list[Any] = [getattr(loader, "batch_sampler", None), loader.dataset]
        for shard in shards:
            if getattr(shard, "num_processes", 1) == self.args.world_size:
                shard.num_processes = self.args.world_size // self.sequence_parallel_size
                shard.process_index = self.args.process_index // self.sequence_parallel_size
                return loader
        raise UnsupportedError(
            "dispatch_batches: every process must read its batches itself; pass "
            'accelerator_config={"dispatch_batches": False}'
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.sequence_parallel_size == 1:
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = torch.stack([_labels(batch) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count / self.sequence_parallel_size

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute this process's share of the loss of whole sequences; the mean over processes is the loss."""
        if self._session is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if "labels" not in inputs:
            raise ValueError(f"labels: the batch has none, only {', '.join(inputs)}")
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        shard = self._session.shard(inputs)
        shard["labels"] = shard["shift_labels"]
        return super().compute_loss(model, shard, return_outputs, num_items_in_batch)  # type: ignore[misc]


def _labels(batch: dict[str, Any]) -> Tensor:
    """Count the labels of a batch that a real token predicts."""
    if "shift_labels" in batch:
        counts: Tensor = batch["shift_labels"] != IGNORED
    else:
        counts = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    if batch.get("attention_mask") is not None:
        counts = counts & batch["attention_mask"].bool()
    return counts.sum()
