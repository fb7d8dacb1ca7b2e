"""Which blocks of keys a block of queries sees, listed row by row: never a square of blocks, on any device."""

import torch
from torch import Tensor

from hf_dilated.config import BlockParts

NONE = 1 << 40  # stands behind every block
MASK = (1 << 64) - 1
ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def earlier_blocks(parts: BlockParts, row: Tensor, blocks: int, stream: int) -> Tensor:
    """List the blocks that causal rows see.

    Args:
        parts: What is seen, other than the blocks that tokens choose by their content.
        row: (R,) indices of blocks of queries.
        blocks: An upper bound of ``row + 1``.
        stream: Of random numbers (:func:`stream_of`).

    Returns:
        (R, K): blocks j ≤ i, each once, in order, followed by :data:`NONE`.

    Example:
        >>> seen = earlier_blocks(BlockParts(local_blocks=2, global_blocks=1), torch.tensor([0, 4]), 5, 0)
        >>> torch.where(seen < NONE, seen, -1).tolist()
        [[0, -1, -1], [0, 3, 4]]
    """
    i = row[:, None]
    first = torch.arange(min(parts.global_blocks, blocks), device=row.device)
    window = torch.arange(min(parts.local_blocks, blocks), device=row.device)
    columns = [_kept(i - window, i - window >= 0), _kept(first.expand(len(row), -1), first <= i - parts.local_blocks)]
    if k := parts.stride_blocks:
        strided = torch.arange(min(k - 1, blocks), blocks, k, device=row.device).expand(len(row), -1)
        is_new = (strided <= i - parts.local_blocks) & (strided >= parts.global_blocks)
        columns.append(_kept(strided, is_new))
    if powers := min(parts.dilated_blocks, blocks.bit_length()):
        dilated = i - (1 << torch.arange(powers, device=row.device))
        columns.append(_kept(dilated, (dilated >= 0) & ~parts.shows_always(i, dilated)))
    if parts.block_mask is not None:
        shown = mask_matrix(parts, row.device)[row]
        j = torch.arange(shown.shape[1], device=row.device).expand_as(shown)
        columns.append(_kept(j, shown & (j <= i) & ~parts.shows_always(i, j) & ~parts.is_dilated(i, j)))
    seen = torch.cat(columns, 1).sort(1).values
    if parts.random_blocks:
        seen = torch.cat([seen, _draws(parts.random_blocks, row, seen, stream)], 1).sort(1).values
    return seen


def later_rows_see(parts: BlockParts, row: Tensor, block: Tensor) -> Tensor:
    """Whether causal row ``row``, or any after it, sees a block.

    Raises:
        ValueError: If a later row may choose any block.

    Example:
        >>> later_rows_see(BlockParts(local_blocks=2, global_blocks=1), torch.tensor(5), torch.tensor([0, 1, 3, 4]))
        tensor([ True, False, False,  True])
    """
    for name in ("random_blocks", "topk_blocks"):
        if getattr(parts, name):
            raise ValueError(f"{name}: a later token may choose any block, so a cache has to keep all of them")
    shown = (row - block < parts.local_blocks) | (block < parts.global_blocks)
    if k := parts.stride_blocks:
        shown |= block % k == k - 1
    if parts.dilated_blocks:
        shown |= row - block <= 1 << min(parts.dilated_blocks - 1, 62)
    if parts.block_mask is not None:
        later = mask_matrix(parts, block.device).tril().flip(0).cummax(0).values.flip(0)
        is_inside = (row < len(later)) & (block < len(later))
        shown |= is_inside & later[row.clamp(max=len(later) - 1), block.clamp(0, len(later) - 1)]
    return shown


def visited_pairs(
    parts: BlockParts, first: int, blocks: int, is_causal: bool, stream: int, device: str | torch.device
) -> Tensor:
    """List the pairs (i, j) of blocks that rows ``first … blocks - 1`` of a document of ``blocks`` blocks visit.

    Returns:
        (P,) the numbers ``i * blocks + j``, in order.

    Example:
        >>> pairs = visited_pairs(BlockParts(global_blocks=1), 0, 3, is_causal=True, stream=0, device="cpu")
        >>> [divmod(pair, 3) for pair in pairs.tolist()]
        [(0, 0), (1, 0), (1, 1), (2, 0), (2, 2)]
    """
    row = torch.arange(0 if not is_causal else first, blocks, device=device)
    seen = earlier_blocks(parts, row, blocks, stream)
    pairs = (row[:, None] * blocks + seen)[seen < NONE]
    return pairs if is_causal else _both_ways(parts, pairs, first, blocks)


def _both_ways(parts: BlockParts, earlier: Tensor, first: int, blocks: int) -> Tensor:
    """Add the blocks after the own one: all parts but strided blocks and masks are symmetric."""
    i, j = earlier // blocks, earlier % blocks
    ends = BlockParts(local_blocks=parts.local_blocks, global_blocks=parts.global_blocks, random_blocks=1)
    one_way = torch.zeros_like(i, dtype=torch.bool)  # seen only by a part that is not symmetric
    later = []
    if k := parts.stride_blocks:
        one_way |= j % k == k - 1
        row, strided = (
            torch.arange(blocks, device=i.device)[:, None],
            torch.arange(min(k - 1, blocks), blocks, k, device=i.device),
        )
        later.append((row * blocks + strided)[strided > row])
    if parts.block_mask is not None:
        shown = mask_matrix(parts, i.device)[:blocks, :blocks]
        one_way |= shown[i, j]
        later.append(shown.triu(1).flatten().nonzero()[:, 0])
    one_way &= ~ends.shows_always(i, j) & ~parts.is_dilated(i, j)
    pairs = torch.cat([earlier, (j * blocks + i)[~one_way], *later]).unique()
    return pairs[pairs >= first * blocks]


def mask_matrix(parts: BlockParts, device: torch.device | str) -> Tensor:
    """The mask of one's own: (rows, rows) bool."""
    return torch.stack([torch.from_numpy(bits) for bits in parts.mask_bits()]).to(device)


def stream_of(seed: int, layer: int, group: int) -> int:
    """A stream of random numbers for the heads of a group, and the layers that run the same parts."""
    state = 0
    for number in (seed, layer, group):
        state = _mix_whole((state + number * ODD[0] + ODD[1]) & MASK)
    return state


def turn_of(turn: int, stream: int) -> int:
    """What stands for a turn in a stream of random numbers."""
    return _signed((turn * ODD[2] + stream) & MASK)


def random_number(row: Tensor, turn: int | Tensor) -> Tensor:
    """A number of 31 bits for rows and turns (:func:`turn_of`): the same on every machine, whatever else is drawn."""
    return (_mix(row * _signed(ODD[0]) + turn) >> 33) & (MASK >> 33)


def _mix_whole(x: int) -> int:
    """The finisher of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * ODD[1]) & MASK
    x = ((x ^ (x >> 27)) * ODD[2]) & MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """The same; 64-bit integers wrap around, and their shifts keep the sign."""
    x = (x ^ ((x >> 30) & (MASK >> 30))) * _signed(ODD[1])
    x = (x ^ ((x >> 27) & (MASK >> 27))) * _signed(ODD[2])
    return x ^ ((x >> 31) & (MASK >> 31))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _draws(count: int, row: Tensor, seen: Tensor, stream: int) -> Tensor:
    """Draw ``count`` of the blocks before the own one that are not seen (R, K), without replacement (R, count).

    Floyd's algorithm draws ranks among these blocks; the number of seen blocks up to a rank turns it into a block.
    """
    before = torch.where(seen < row[:, None], seen, NONE)
    unseen_before = before - torch.arange(before.shape[1], device=row.device)
    unseen = row - (before < NONE).sum(1)
    drawn: list[Tensor] = []
    for turn in range(count):
        last = (unseen - count).clamp(min=0) + turn
        rank = random_number(row, turn_of(turn, stream)) * (last + 1) >> 31
        if drawn:
            rank = torch.where((torch.stack(drawn) == rank).any(0), last, rank)
        drawn.append(rank)
    ranks = torch.stack(drawn, 1)
    block = ranks + torch.searchsorted(unseen_before.contiguous(), ranks, right=True)
    return _kept(block, torch.arange(count, device=row.device) < unseen[:, None])


def _kept(block: Tensor, is_kept: Tensor) -> Tensor:
    return torch.where(is_kept, block, NONE)
