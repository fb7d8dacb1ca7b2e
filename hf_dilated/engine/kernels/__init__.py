"""One dense partial attention on the best kernel that the device has.

Shapes: query and output gradient (n, H, N, D), key and value (n, G, M, D), LSE (n, H, N), ``H`` a multiple of
``G``. Causal partials are square. The backward pass takes the *global* output and LSE of its queries, which
makes the sum over partials the exact gradient (FlashAttention-2, arXiv:2307.08691, algorithm 2).
"""

from functools import lru_cache

from hf_dilated.engine.kernels.biased import attend_with_bias
from hf_dilated.engine.kernels.case import Case, Gradients, Kernel, Packed, PackedLengths
from hf_dilated.engine.kernels.cpu_flash import CPU_FLASH
from hf_dilated.engine.kernels.cudnn import CUDNN
from hf_dilated.engine.kernels.efficient import EFFICIENT
from hf_dilated.engine.kernels.flash_attention_2 import FLASH_ATTENTION_2
from hf_dilated.engine.kernels.flash_attention_4 import FLASH_ATTENTION_4
from hf_dilated.engine.kernels.plain import PLAIN

__all__ = [
    "KERNELS",
    "Case",
    "Gradients",
    "Kernel",
    "Packed",
    "PackedLengths",
    "attend_with_bias",
    "choose",
    "choose_for_one",
    "choose_packed",
    "explain",
]

KERNELS = (FLASH_ATTENTION_4, CUDNN, FLASH_ATTENTION_2, EFFICIENT, CPU_FLASH, PLAIN)
KERNELS_FOR_ONE = KERNELS[2:]  # cuDNN plans anew for every number of keys, FlashAttention 4 does not divide the keys


@lru_cache(maxsize=256)
def choose(case: Case) -> Kernel:
    """Return the first kernel of :data:`KERNELS` that can run a case."""
    return next(kernel for kernel in KERNELS if kernel.refuses(case) is None)


@lru_cache(maxsize=256)
def choose_for_one(case: Case) -> Kernel:
    """Return the first kernel for the queries of one token that can run a case."""
    return next(kernel for kernel in KERNELS_FOR_ONE if kernel.refuses(case) is None)


@lru_cache(maxsize=256)
def choose_packed(case: Case) -> Packed | None:
    """Return how the first kernel that can runs sequences of different lengths in one call; None if none can."""
    return next((kernel.packed for kernel in KERNELS if kernel.packed and kernel.refuses(case) is None), None)


def explain(case: Case) -> list[tuple[str, str | None]]:
    """List every kernel, in order of preference, with the reason for which it is skipped.

    Example:
        >>> import torch
        >>> case = Case("cpu", (0, 0), torch.float32, 64, 64, deterministic=False)
        >>> [name for name, reason in explain(case) if reason is None]
        ['cpu_flash', 'math']
    """
    return [(kernel.name, kernel.refuses(case)) for kernel in KERNELS]
