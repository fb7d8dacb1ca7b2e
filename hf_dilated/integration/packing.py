"""Boundaries of packed documents that trainers pass beside the position ids, made for other kernels.

TRL's packing and Transformers' flattening collator say the same thing up to five times. The position ids decide; what
comes with them is checked against them.
"""

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_dilated.integration.support import UnsupportedError

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
WITHOUT_CHECK = ("max_length_q", "max_length_k")  # follow from the boundaries


class _Agreed(threading.local):
    """The tensors that were found to agree last: all layers of a forward pass bring the same."""

    tensors: tuple[tuple[weakref.ref[Tensor], int], ...] = ()


_agreed = _Agreed()


def check_boundaries(options: Mapping[str, Any], key_positions: Tensor | None, batch: int, keys: int) -> None:
    """Refuse boundaries of documents that are not those of the positions.

    Args:
        options: Arguments of the attention function. ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (documents + 1) are where
            documents start, and the end; ``seq_idx`` (1, M) numbers the document of each token.
        key_positions: (B, M) index of each token within its document; None for one whole document a row.
        batch: B, one if documents are packed like this.
        keys: M.

    Raises:
        UnsupportedError: If they differ, or while ``torch.compile`` traces, where they cannot be compared.

    Example:
        >>> positions = torch.tensor([[0, 1, 2, 0, 1]])
        >>> check_boundaries({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, positions, batch=1, keys=5)
    """
    given = {name: options[name] for name in BOUNDARIES if isinstance(options.get(name), Tensor)}
    if not given:
        return
    names = ", ".join(given)
    if torch.compiler.is_compiling():
        raise UnsupportedError(f"{names}: torch.compile cannot compare them; pass documents as position_ids alone")
    tensors = [*given.values(), *([] if key_positions is None else [key_positions])]
    if _is_agreed(tensors):
        return
    expected = [0] if key_positions is None else (key_positions[0] == 0).nonzero()[:, 0].tolist()
    for name, tensor in given.items():
        if batch != 1 or _starts(name, tensor.cpu(), keys) != expected:
            raise UnsupportedError(
                f"{name}: its documents are not those of the position_ids. Pass packed documents as one row with "
                "position_ids that start again in each"
            )
    _agreed.tensors = tuple((weakref.ref(tensor), _version(tensor)) for tensor in tensors)


def _is_agreed(tensors: list[Tensor]) -> bool:
    return len(tensors) == len(_agreed.tensors) and all(
        ref() is tensor and version == _version(tensor) >= 0
        for (ref, version), tensor in zip(_agreed.tensors, tensors, strict=True)
    )


def _version(tensor: Tensor) -> int:
    """Changes of inference tensors leave no trace: -1."""
    return -1 if tensor.is_inference() else tensor._version


def _starts(name: str, tensor: Tensor, keys: int) -> list[int] | None:
    """Where the documents start; None for something that does not cover the keys."""
    if name == "seq_idx":
        if tensor.shape != (1, keys):
            return None
        return [0, *((tensor[0, 1:] != tensor[0, :-1]).nonzero()[:, 0] + 1).tolist()]
    boundaries = tensor.tolist()
    return boundaries[:-1] if tensor.ndim == 1 and boundaries[-1] == keys else None
