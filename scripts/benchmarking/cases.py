"""What is measured: shapes, patterns and the machine they are measured on."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

import hf_dilated
from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.config import Offset, Overlap

Branches = tuple[tuple[int, int], ...]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_SEGMENT = 2048
PRESETS = ("doubling", "four", "model")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and one pattern: ``queries`` queries at the end of ``length`` keys."""

    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    queries: int
    branches: Branches = ()
    blocks: tuple[str, ...] = ()
    is_causal: bool = True

    def config(self, overlap: Overlap, offset: Offset = "head") -> DilatedConfig:
        """Return the case's pattern."""
        segments, rates = zip(*self.branches, strict=True)
        return DilatedConfig(segment_lengths=segments, dilation_rates=rates, overlap=overlap, offset=offset)

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, laid out as a model's projections (a decoding step: as its cache) are."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=DTYPES[self.dtype], generator=generator)

        query = random(self.batch, self.queries, self.heads, self.head_dim).transpose(1, 2)
        if self.queries == self.length:
            shape = (self.batch, self.length, self.kv_heads, self.head_dim)
            return query, random(*shape).transpose(1, 2), random(*shape).transpose(1, 2)
        shape = (self.batch, self.kv_heads, self.length, self.head_dim)
        return query, random(*shape), random(*shape)

    def query_bytes(self) -> int:
        """Return the size of the query: the unit in which memory is reported."""
        return self.batch * self.queries * self.heads * self.head_dim * DTYPES[self.dtype].itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def blocks_for(text: str, length: int) -> BlockSparseConfig:
    """Return a pattern of blocks of 128 tokens: its window is as wide as a density allows.

    Args:
        text: ``strided``, ``sinks`` or ``bigbird``, and the density at this length, such as ``"strided:0.25"``; or
            ``preset``, BigBird in both directions with three random blocks a row, as many as in the paper.
        length: Tokens in the sequence.

    Raises:
        ValueError: If it is not of this form, or the density cannot be met.

    Example:
        >>> blocks_for("sinks:0.25", 32768).local_blocks
        33
    """
    name, _, fraction = text.partition(":")
    if text == "preset":
        return replace(BlockSparseConfig.bigbird(), random_blocks=1)  # and on average one drawn by a later row
    try:
        density = float(fraction)
    except ValueError:
        raise ValueError(f"blocks: expected a pattern and its density such as strided:0.25, got {text!r}") from None
    few = density < 0.05  # there is no room for more
    patterns = {
        "strided": BlockSparseConfig(global_blocks=0 if few else 1, stride_blocks=round((4 if few else 1.5) / density)),
        "sinks": BlockSparseConfig(global_blocks=1),
        "bigbird": BlockSparseConfig(global_blocks=1 if few else 2, random_blocks=1 if few else 3),
    }
    if name not in patterns:
        raise ValueError(f"blocks: expected one of {', '.join(patterns)}, got {name!r}")
    return patterns[name].with_density(density, length)


def branches_for(pattern: str, length: int, heads: int) -> Branches:
    """Return the (segment length, rate) pairs of a named or written-out pattern.

    Args:
        pattern: ``"doubling"`` (segments double from 2048 up to the length, rates from 1 up to 8), ``"four"`` (the
            first four of those at any length), ``"model"`` (what ``DilatedConfig.from_model_config`` gives for a model
            of this length), or pairs such as ``"2048:1,4096:2"``.
        length: Tokens in the sequence.
        heads: Query heads.

    Raises:
        ValueError: If the pattern is neither a known name nor a list of pairs.

    Example:
        >>> branches_for("doubling", 32768, heads=8)
        ((2048, 1), (4096, 2), (8192, 4), (16384, 8), (32768, 8))
        >>> branches_for("128:1,256:2", 512, heads=8)
        ((128, 1), (256, 2))
    """
    if pattern == "four":
        return tuple((FIRST_SEGMENT << i, 1 << i) for i in range(4))
    if pattern == "doubling":
        count = max(1, ((length - 1) // FIRST_SEGMENT).bit_length() + 1)
        return tuple((FIRST_SEGMENT << i, min(1 << i, 8)) for i in range(count))
    if pattern == "model":
        model = PreTrainedConfig(max_position_embeddings=length, num_attention_heads=heads)
        config = DilatedConfig.from_model_config(model)
        return tuple(zip(config.segment_lengths, config.dilation_rates, strict=True))
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in pattern.split(",")]
        return tuple((segment, rate) for segment, rate in pairs)
    except ValueError:
        names = ", ".join(PRESETS)
        raise ValueError(f"pattern: expected one of {names}, or pairs such as 2048:1,4096:2, got {pattern!r}") from None


def describe_machine(device: str) -> dict[str, Any]:
    """Name the hardware and the versions that the numbers belong to."""
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hf_dilated": hf_dilated.__version__,
        "commit": _commit(),
    }
    if device == "cuda":
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
