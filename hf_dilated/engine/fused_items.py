"""Where the items lie that the kernels for chosen blocks go over (:mod:`hf_dilated.engine.fused_choice`).

How many tokens there are, and how many blocks each of them chooses, is known when a kernel is launched. One program
serves all of that, and divides by such numbers as by constants: with a product and a shift.
"""

import triton
import triton.language as tl


def reciprocal(divisor: int) -> int:
    """What :func:`_over` takes instead of a divisor of up to 31 bits: a factor of 32 bits, and in the low 6 a shift.

    Example:
        >>> by = reciprocal(10)
        >>> 2 * 2147483647 * (by >> 6) >> 32 + (by & 63)
        214748364
    """
    shift = (divisor - 1).bit_length()
    return ((1 << 31 + shift) // divisor + 1) << 6 | shift


@triton.jit
def _over(n, by):
    """Divide n by that whose reciprocal is given; both are integers of up to 31 bits, not negative."""
    twice = n.to(tl.uint32) * 2
    return (tl.umulhi(twice, (by >> 6).to(tl.uint32)) >> (by & 63).to(tl.uint32)).to(tl.int32)


@triton.jit
def _limits(tile, block, starts, tile_starts, EACH):
    """Where the items of a tile start and stop."""
    begin = tl.load(starts + block) + (tile - tl.load(tile_starts + block)) * EACH
    return begin, tl.minimum(begin + EACH, tl.load(starts + block + 1))


@triton.jit
def _rows_of(item, by_turns, count, by_count, N, by_N, row_stride, head_stride, token_stride):
    """Where the rows of items begin, which are counted from those of a head, beyond that head."""
    query = _over(item, by_turns)
    head = _over(query, by_count)
    token = query - head * count
    row = _over(token, by_N)
    return (
        row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + (token - row * N).to(tl.int64) * token_stride
    )


@triton.jit
def _load_rows(rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of D numbers, which begin anywhere, as (rows, WIDTH)."""
    d = tl.arange(0, WIDTH)
    pointers = rows[:, None] + d[None, :]
    return tl.load(pointers) if D == WIDTH else tl.load(pointers, mask=(d < D)[None, :], other=0.0)
