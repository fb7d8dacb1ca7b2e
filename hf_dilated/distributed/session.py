"""``with sequence_parallel(group) as sp``: batches in, shards out; while it lasts, ring attention knows its ranks."""

import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy, pad

from hf_dilated.config import RingConfig
from hf_dilated.distributed.agreement import Watch
from hf_dilated.distributed.cached import CachedSequence
from hf_dilated.distributed.communication import Wire
from hf_dilated.distributed.layout import Kind, SequenceLayout
from hf_dilated.distributed.symmetric import buffers_of_session

IGNORED = -100  # label that no loss counts
VERSION = 1  # of what ranks must agree on
BOUNDARIES = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
MISFIT: dict[Kind, str] = {
    "zigzag": 'layout="contiguous", but layers attend densely: the last rank computes most; use "auto" or "zigzag"',
    "contiguous": 'layout="zigzag", but all layers follow patterns or windows: tokens travel that neighbours would '
    'have; use "auto" or "contiguous"',
}
STARTED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many processes there are
EMPTY: dict[str, float] = {"labels": IGNORED, "shift_labels": IGNORED}


class SequenceParallel:
    """What ranks that share sequences have in common; made by :func:`sequence_parallel`.

    Attributes:
        wire: The ranks.
        config: How sequences are laid out and travel.
        layout: Of the batch that was sharded last.
        kind: Of layout that ``"auto"`` gives the next batch: zigzag, until all attention to a batch was sparse.
        cached: What the caches of a generation hold; None outside of one.
    """

    def __init__(self, wire: Wire, config: RingConfig, watch: Watch | None = None) -> None:
        self.wire, self.config, self.watch = wire, config, watch
        self.layout: SequenceLayout | None = None
        self.kind: Kind = "zigzag" if config.layout == "auto" else config.layout
        self._was_dense: set[bool] = set()  # the attention to the last batch
        self.cached: CachedSequence | None = None

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Take this rank's slice of a batch that all ranks of the group have whole.

        Shard a batch right before it is used: attention takes the layout of the last one.

        Args:
            batch: Entries (B, N, …) for each token are sharded, others are handed on. ``attention_mask`` (B, N) says
                what is padding; documents start where ``position_ids`` (B, N) do not count on.

        Returns:
            The same entries; ``position_ids`` are always there, ``labels`` have become ``shift_labels``, and
            ``attention_mask`` is there where shards have empty slots. Boundaries of packed documents
            (``cu_seq_lens_q`` and the like) are left out: the position ids say the same.

        Raises:
            DisagreementError: If the ranks' batches or settings differ.
            RankLostError: If a rank does not come.
            ValueError: If the batch cannot be sharded.
        """
        rows, length = _shape(batch)
        entries = dict(batch)
        _check(entries, rows, length)
        self._choose_kind()
        positions = entries.get("position_ids")
        layout = SequenceLayout.of(
            (rows, length),
            self.wire.ranks,
            kind=self.kind,
            attention_mask=entries.get("attention_mask"),
            position_ids=None if positions is None else positions.expand(rows, length),
        )
        if self.watch is not None:
            self.watch.agree(_facts(entries, layout, self.config))
        if positions is None:
            device = next(x for x in entries.values() if isinstance(x, Tensor)).device
            positions = torch.arange(length, device=device)
        entries["position_ids"] = positions.expand(rows, length)
        if "labels" in entries:
            labels = entries.pop("labels")
            entries.setdefault("shift_labels", pad(labels[:, 1:], (0, 1), value=IGNORED))
        has_empty = any(shard.count.sum() < rows * layout.slots for shard in layout.shards)
        entries.pop("attention_mask", None)
        shards = {
            name: layout.shard(x, self.wire.rank, EMPTY.get(name, 0)) if _is_per_token(x, rows, length) else x
            for name, x in entries.items()
            if name not in BOUNDARIES
        }
        if has_empty:
            columns = layout.columns(self.wire.rank)
            shards["attention_mask"] = (columns >= 0).long().to(shards["position_ids"].device)
        self.layout = layout
        return shards

    def observe(self, *, is_dense: bool) -> None:
        """Take note of how a layer attends to the batch that was sharded last."""
        self._was_dense.add(is_dense)

    def _choose_kind(self) -> None:
        """Suit the layout to the layers: balance dense causal ones, else keep neighbours together."""
        if not self._was_dense:
            return
        suits: Kind = "zigzag" if True in self._was_dense else "contiguous"
        self._was_dense.clear()
        if self.config.layout == "auto":
            self.kind = suits
        elif self.config.layout != suits and self.wire.ranks > 1:
            warnings.warn(MISFIT[suits], stacklevel=3)

    def unshard(self, shard: Tensor, empty: float = 0) -> Tensor:
        """Bring slices (B, n, …) of all ranks together as (B, N, …), on every rank; without gradients."""
        if self.layout is None:
            raise ValueError("unshard: no batch was sharded")
        return self.layout.unshard(self.wire.gather(shard.detach()).wait(), empty)

    def loss(self, logits: Tensor, shift_labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """Cross entropy of the whole batch: the same number on every rank.

        Its gradients are those of the whole where they are averaged over the group, as DDP and FSDP do.

        Args:
            logits: (B, n, V) of this rank's tokens.
            shift_labels: (B, n) as :meth:`shard` made them.
            num_items: Labels to divide by; by default those of the batch.
        """
        logits, labels = logits.flatten(0, 1), shift_labels.flatten()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        if num_items is None:
            num_items = self.sum((shift_labels != IGNORED).sum())
        own = total / num_items
        return own * self.wire.ranks + (self.sum(own.detach()) - own.detach() * self.wire.ranks)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in their order; without gradients."""
        return self.wire.gather(x.detach()).wait().sum(0)


_active: list[SequenceParallel] = []  # of the process: backward passes run in threads of their own


def active() -> SequenceParallel | None:
    """Return the innermost ``sequence_parallel`` that is open."""
    return _active[-1] if _active else None


@contextmanager
def sequence_parallel(
    mesh_or_group: DeviceMesh | dist.ProcessGroup | None = None, config: RingConfig | None = None
) -> Iterator[SequenceParallel]:
    """Spread the sequences of every batch over a group of processes, each of which runs the same program.

    A program that was started alone, without a process group, runs as a group of one.

    Models with ``attn_implementation`` ``"ring"``, ``"ring_dilated"`` or ``"ring_block_sparse"`` then attend across the
    group; everything else in them works token by token.

    Args:
        mesh_or_group: A one-dimensional device mesh or a process group; None is all processes.
        config: Layout, transport and the time after which a silent rank counts as lost.

    Raises:
        ValueError: If several processes were started, but there is no process group.
        RankLostError: If a rank fails, is killed, falls silent, or does not come within the timeout of the process
            group; on every other rank, naming it and the step.

    Example:
        >>> with sequence_parallel() as sp:  # doctest: +SKIP
        ...     shard = sp.shard(batch)
        ...     loss = sp.loss(model(**shard).logits, shard["shift_labels"])
    """
    config = config or RingConfig()
    if not dist.is_initialized():
        if mesh_or_group is not None or (started := _processes()) > 1:
            many = "" if mesh_or_group is not None else f", for {started} processes were started"
            raise ValueError(f"sequence_parallel: call torch.distributed.init_process_group first{many}")
        with _open(SequenceParallel(Wire.alone(), config)) as session:
            yield session
        return
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim != 1:
            raise ValueError(f"mesh_or_group: expected one dimension, got {mesh_or_group.mesh_dim_names}; pick one")
        mesh_or_group = mesh_or_group.get_group()
    group = mesh_or_group or dist.distributed_c10d._get_default_group()
    with Watch(Wire.of(group), config.timeout_seconds) as watch:
        wire = Wire(group, watch.wire.rank, watch.wire.ranks, watch.finish)
        with buffers_of_session(wire), _open(SequenceParallel(wire, config, watch)) as session:
            yield session


def _processes() -> int:
    """How many processes torchrun, Slurm or MPI has started."""
    return max(int(os.environ.get(name, "1")) for name in STARTED)


@contextmanager
def _open(session: SequenceParallel) -> Iterator[SequenceParallel]:
    _active.append(session)
    try:
        yield session
    finally:
        _active.remove(session)


def _shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            rows, length = batch[name].shape[:2]
            return rows, length
    raise ValueError(f"batch: needs input_ids or inputs_embeds, got {', '.join(batch)}")


def _check(entries: Mapping[str, Any], rows: int, length: int) -> None:
    positions, mask = entries.get("position_ids"), entries.get("attention_mask")
    if positions is not None and positions.shape not in ((rows, length), (1, length)):
        raise ValueError(f"position_ids: expected ({rows}, {length}), got {tuple(positions.shape)}")
    if mask is not None and mask.shape != (rows, length):
        raise ValueError(f"attention_mask: expected the padding mask ({rows}, {length}), got {tuple(mask.shape)}")
    if positions is None and (given := BOUNDARIES.intersection(entries)):
        raise ValueError(f"{', '.join(sorted(given))}: pass packed documents as position_ids that start again in each")


def _is_per_token(x: Any, rows: int, length: int) -> bool:
    return isinstance(x, Tensor) and x.ndim >= 2 and tuple(x.shape[:2]) == (rows, length)


def _facts(entries: Mapping[str, Any], layout: SequenceLayout, config: RingConfig) -> dict[str, str]:
    tensors = {name: x for name, x in sorted(entries.items()) if isinstance(x, Tensor)}
    return {
        "version": str(VERSION),
        "config": str(config.to_dict()),
        "entries": ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()),
        "layout": layout.kind,
        "documents": _hash(layout.column, layout.position),
        **{f"the content of {name}": _content(x) for name, x in tensors.items()},
    }


def _content(x: Tensor) -> str:
    return _hash(x.detach().cpu().contiguous().view(torch.uint8).numpy()) if x.numel() and x.ndim else str(x.tolist())


def _hash(*arrays: np.ndarray[Any, Any]) -> str:
    value = 0
    for array in arrays:
        value = zlib.crc32(array.tobytes(), value)
    return f"{value:08x}"
