"""Sizes of the blocks that a TPU core processes at a time.

Blocks of inputs and outputs are double-buffered in the vector memory (VMEM): one is filled while the other is
used. Their last two sides are whole axes or multiples of (8, 128). The search maximises depth first: if a
block spans the whole contraction, W is read once for any number of rows and draws.
"""

from typing import NamedTuple

LANES = 128
LONGEST = 512
"""Longest side of a block of outputs."""
BUDGET = 12 * 2**20
"""Bytes of VMEM for the blocks of a kernel; a core of the smallest supported TPU has 16 MiB."""


class Tiles(NamedTuple):
    """Sides of the blocks of a product of (m, k) by (k, n)."""

    rows: int
    columns: int
    depth: int


def product_tiles(m: int, k: int, n: int, rank: int, *, itemsize: int, weight_itemsize: int) -> Tiles | None:
    """The largest blocks that fit into VMEM, or None if not even the smallest fit.

    Args:
        m: Rows of a group.
        k: Length of the contraction.
        n: Columns of the output.
        rank: Rank of the adapter.
        itemsize: Bytes of an input or output.
        weight_itemsize: Bytes of a weight.
    """
    for depth in (k, *_powers(k, 4096, LANES)):
        for columns in _sides(n):
            for rows in _sides(m):
                factors = _padded(rank, depth) + _padded(rank, columns) + _padded(rank, rows)
                # Twice for double buffering; the float32 scratch exists once.
                held = 2 * itemsize * (_padded(rows, depth) + _padded(rows, columns) + factors)
                weights = 2 * weight_itemsize * _padded(depth, columns)
                scratch = 4 * (_padded(rows, columns) + _padded(rows, rank))
                if held + weights + scratch <= BUDGET:
                    return Tiles(rows, columns, depth)
    return None


def gradient_rows(m: int, k: int, n: int, rank: int, *, itemsize: int) -> int | None:
    """Number of rows that one step of the factor gradients sums over, or None if no block fits."""
    for rows in _sides(m, smallest=32 // itemsize):  # smallest: the rows of one tile of registers
        held = 2 * itemsize * (_padded(rows, k) + _padded(rows, n) + _padded(rank, k) + _padded(rank, n))
        sums = 2 * 4 * (_padded(rank, k) + _padded(rank, n))
        if held + sums <= BUDGET:
            return rows
    return None


def _sides(size: int, *, smallest: int = LANES) -> list[int]:
    """Possible sides of a block along an axis, largest first; the whole axis if it is short."""
    return [*([size] if size <= LONGEST else []), *_powers(size, LONGEST, smallest)]


def _powers(size: int, largest: int, smallest: int) -> list[int]:
    """Powers of two below `size`, from `largest` down to `smallest`."""
    powers = [2**i for i in range(smallest.bit_length() - 1, largest.bit_length())]
    return [side for side in reversed(powers) if side < size]


def _padded(rows: int, columns: int) -> int:
    """Elements of a block in VMEM, padded to tiles of (8, 128)."""
    return -(-rows // 8) * 8 * -(-columns // LANES) * LANES
