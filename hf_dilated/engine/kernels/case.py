"""What a kernel is, and what decides whether it can run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """What decides whether a kernel can run."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_size: int
    value_size: int
    deterministic: bool
    recurs: bool = False

    @classmethod
    def of(cls, query: Tensor, value: Tensor, *, recurs: bool = False) -> "Case":
        """Describe a call; ``recurs`` says that calls of the same shape are likely to follow."""
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
        deterministic = torch.are_deterministic_algorithms_enabled()
        sizes = query.shape[-1], value.shape[-1]
        return cls(query.device.type, capability, query.dtype, *sizes, deterministic, recurs)


@dataclass(frozen=True)
class PackedLengths:
    """Where sequences that lie side by side start, and the longest of them.

    Attributes:
        query: (n + 1,) cumulative lengths of the queries, int32, on the device.
        key: (n + 1,) the same for the keys.
    """

    query: Tensor
    key: Tensor
    longest_query: int
    longest_key: int

    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """In the order of the signatures of torch's kernels."""
        return self.query, self.key, self.longest_query, self.longest_key


@dataclass(frozen=True)
class Packed:
    """What a kernel does with sequences of different lengths that lie side by side.

    Query and output gradient (T, H, D), key and value (T', G, D), LSE (T, H).

    Attributes:
        forward: ``(query, key, value, lengths, is_causal, scale) -> (output, lse)``.
        backward: ``(grad_output, query, key, value, output, lse, lengths, is_causal, scale) -> gradients``.
    """

    forward: Callable[[Tensor, Tensor, Tensor, PackedLengths, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, PackedLengths, bool, float], Gradients]


@dataclass(frozen=True)
class Kernel:
    """An attention kernel.

    Attributes:
        name: How reports call it.
        refuses: Returns why a case cannot run, or None if it can.
        forward: ``(query, key, value, is_causal, scale) -> (output, lse)``.
        backward: ``(grad_output, query, key, value, output, lse, is_causal, scale) -> gradients``.
        packed: The same for sequences of different lengths, or None if it cannot.
    """

    name: str
    refuses: Callable[[Case], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Gradients]
    packed: Packed | None = None


def one_of(case: Case, *, device: str, dtypes: tuple[torch.dtype, ...], multiple: int, largest: int) -> str | None:
    if case.device != device:
        return f"needs {device}, the tensors are on {case.device}"
    if case.dtype not in dtypes:
        return f"does not support {case.dtype}"
    for size in (case.head_size, case.value_size):
        if size % multiple or size > largest:
            return f"needs head sizes that are multiples of {multiple} up to {largest}, got {size}"
    return None


def same_sizes(case: Case) -> str | None:
    if case.head_size != case.value_size:
        return f"needs equal head sizes, got {case.head_size} for keys and {case.value_size} for values"
    return None


def needs_capability(case: Case, least: tuple[int, int]) -> str | None:
    """Why the GPU is too old, or None."""
    if case.device != "cuda" or case.capability >= least:
        return None
    needed, found = (f"{major}.{minor}" for major, minor in (least, case.capability))
    return f"needs compute capability {needed}, this GPU has {found}"


def no_seed(like: Tensor) -> Tensor:
    """The random state of a kernel without dropout."""
    return torch.zeros((), dtype=torch.int64, device=like.device)


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def per_key_head(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1)).sum(2)
