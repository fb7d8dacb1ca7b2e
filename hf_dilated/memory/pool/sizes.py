"""Size classes: eight for each power of two, so that a block is at most 12.5 % larger than what it holds.

Blocks are whole pages, which is more than that below 32 KiB.
"""

from hf_dilated.memory.pool.mapping import PAGE

STEPS = 8


def size_class(size: int) -> int:
    """Return the size of the smallest class that holds ``size`` bytes.

    Example:
        >>> size_class((8 << 20) + 1) / (1 << 20)
        9.0
    """
    step = max(PAGE, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step
