"""How frozen weights lie in memory: their types, and room that a checkpoint fills part by part.

| `weights`    | dense kernels                     | embedding, output layer | bytes per weight   |
|--------------|-----------------------------------|-------------------------|--------------------|
| `"float32"`  | as they are                       | as they are             | 4                  |
| `"bfloat16"` | rounded to 8 bits of precision    | the same                | 2                  |
| `"int8"`     | integers, a scale for each output | a scale for each row    | 1.0                |
| `"4bit"`     | blocks of 32 inputs (`BLOCKS`)    | as "int8"               | 0.625; of tables 1 |

The formulas are in `kernels.quantised`. Vectors (gains, biases) and learned positions are float32. Kernels
whose inputs form no blocks stay in eight bits. Room is filled in rows of output channels, so no weight is in
memory twice; on a CPU the arrays of JAX are this room itself.

Four bits are the blocks of GGUF's Q4_1 and not NF4: files of Q4_0 and Q4_1 then keep their numbers, and a
folder is rounded once, between the least and the greatest weight of each block. The tables keep eight bits,
because a rounded embedding enters every layer.
"""

from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, UInt8

from bnlora.kernels.quantised import LEVELS, QuantisedBlocks, QuantisedMatrix, QuantisedTable

Storage = Literal["float32", "bfloat16", "int8", "4bit"]

BLOCKS = (32, 16, 8)
"""Sizes of a block of inputs: the first that divides their number."""

CODES = 15
"""The largest code of four bits."""

_ALIGNMENT = 64  # bytes; JAX on a CPU uses the memory of an array that begins at a multiple of it
_FLOATS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


class Blocks(NamedTuple):
    """Output channels in blocks of four bits.

    Attributes:
        codes: Two entries in each byte, as in `QuantisedBlocks`, (n, blocks, size / 2).
        scales: Size of one level, (n, blocks).
        offsets: The weight of code zero, (n, blocks).
    """

    codes: UInt8[np.ndarray, "n blocks half"]
    scales: Float16[np.ndarray, "n blocks"]
    offsets: Float16[np.ndarray, "n blocks"]


class Room(Protocol):
    """Room for one weight of a model."""

    def write(self, layer: int, begin: int, rows: Float[np.ndarray, "n d_in"]) -> None:
        """Store the output channels from `begin` on, in one layer (0 for a weight outside of the layers)."""
        ...

    def filled(self) -> Any:
        """The weight, once all of it was written."""
        ...


class FloatKernel:
    """Room for the dense kernels of all layers, (layer, d_in, d_out), in a floating-point type."""

    def __init__(self, shape: tuple[int, int, int], dtype: Any) -> None:
        """Allocate the room."""
        self.values = aligned(shape, dtype)

    def write(self, layer: int, begin: int, rows: Float[np.ndarray, "n d_in"]) -> None:
        """Store output channels of a layer."""
        self.values[layer, :, begin : begin + len(rows)] = rows.T

    def filled(self) -> Array:
        """The kernels."""
        return jax.device_put(self.values)


class ByteKernel:
    """Room for the dense kernels of all layers in eight bits."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        """Allocate the room."""
        layers, _, d_out = shape
        self.values, self.scales = aligned(shape, np.int8), aligned((layers, d_out), np.float32)

    def write(self, layer: int, begin: int, rows: Float[np.ndarray, "n d_in"]) -> None:
        """Round output channels of a layer."""
        values, scales = in_bytes(rows)
        self.values[layer, :, begin : begin + len(rows)] = values.T
        self.scales[layer, begin : begin + len(rows)] = scales

    def filled(self) -> QuantisedMatrix:
        """The kernels."""
        return QuantisedMatrix(jax.device_put(self.values), jax.device_put(self.scales))


class BlockKernel:
    """Room for the dense kernels of all layers in blocks of four bits."""

    def __init__(self, shape: tuple[int, int, int], size: int) -> None:
        """Allocate the room for blocks of `size` inputs."""
        layers, d_in, d_out = shape
        self.size, (count, rest) = size, divmod(d_in, size)
        assert not rest
        sides = (layers, count, d_out)
        codes = aligned((layers, count, size // 2, d_out), np.uint8)
        self.stored = (codes, aligned(sides, np.float16), aligned(sides, np.float16))

    def write(self, layer: int, begin: int, rows: Float[np.ndarray, "n d_in"]) -> None:
        """Round output channels of a layer."""
        self.write_blocks(layer, begin, in_blocks(rows, self.size))

    def write_blocks(self, layer: int, begin: int, blocks: Blocks) -> None:
        """Store output channels of a layer as they are."""
        channels = slice(begin, begin + len(blocks.codes))
        for room, part in zip(self.stored, blocks, strict=True):
            room[layer, ..., channels] = np.moveaxis(part, 0, -1)

    def filled(self) -> QuantisedBlocks:
        """The kernels."""
        return QuantisedBlocks(*map(jax.device_put, self.stored))


class FloatTable:
    """Room for a table with one row for each token, (vocab, d), in a floating-point type."""

    def __init__(self, shape: tuple[int, int], dtype: Any) -> None:
        """Allocate the room."""
        self.values = aligned(shape, dtype)

    def write(self, layer: int, begin: int, rows: Float[np.ndarray, "n d"]) -> None:
        """Store rows; there is one layer."""
        self.values[begin : begin + len(rows)] = rows

    def filled(self) -> Array:
        """The table."""
        return jax.device_put(self.values)


class ByteTable:
    """Room for a table in eight bits."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """Allocate the room."""
        self.stored = (aligned(shape, np.int8), aligned(shape[:1], np.float32))

    def write(self, layer: int, begin: int, rows: Float[np.ndarray, "n d"]) -> None:
        """Round rows; there is one layer."""
        for room, part in zip(self.stored, in_bytes(rows), strict=True):
            room[begin : begin + len(rows)] = part

    def filled(self) -> QuantisedTable:
        """The table."""
        return QuantisedTable(*map(jax.device_put, self.stored))


def kernel_room(storage: Storage, shape: tuple[int, int, int]) -> Room:
    """Room for the dense kernels of all layers.

    Args:
        storage: Type in memory.
        shape: Numbers of layers, inputs and outputs.
    """
    if storage in _FLOATS:
        return FloatKernel(shape, _FLOATS[storage])
    size = block_size(shape[1])
    return ByteKernel(shape) if storage == "int8" or size is None else BlockKernel(shape, size)


def table_room(storage: Storage, shape: tuple[int, int]) -> Room:
    """Room for an embedding or an output layer.

    Args:
        storage: Type in memory.
        shape: Numbers of tokens and of inputs.
    """
    return FloatTable(shape, _FLOATS[storage]) if storage in _FLOATS else ByteTable(shape)


def block_size(d_in: int) -> int | None:
    """Inputs of a block of four bits; None if no block divides them."""
    return next((size for size in BLOCKS if d_in % size == 0), None)


def in_bytes(rows: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as integers and scales; a row of zeros has the scale one. An error is at most half a scale."""
    rows = rows.astype(np.float32, copy=False)
    largest = np.abs(rows).max(axis=1)
    scales = np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1))
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def in_blocks(rows: Float[np.ndarray, "n d_in"], size: int) -> Blocks:
    """Rows in blocks of four bits. An error is at most half a scale, for the levels enclose the block.

    Raises:
        ValueError: If a weight is beyond the range of float16.
    """
    blocks = rows.astype(np.float32, copy=False).reshape(len(rows), -1, size)
    offsets = _rounded(blocks.min(axis=2), np.float16(-np.inf))
    scales = _rounded((blocks.max(axis=2) - offsets) / CODES, np.float16(np.inf))
    if not (np.isfinite(offsets).all() and np.isfinite(scales).all()):
        raise ValueError(
            f"blocks of four bits hold weights up to {np.finfo(np.float16).max:,.0f}; got "
            f'{np.abs(blocks).max():g}; load the model with weights="bfloat16"'
        )
    steps = np.where(scales > 0, scales, 1).astype(np.float32)
    codes = np.rint((blocks - offsets[:, :, None]) / steps[:, :, None]).clip(0, CODES).astype(np.uint8)
    return Blocks(codes[..., : size // 2] | codes[..., size // 2 :] << 4, scales, offsets)


def _rounded(values: np.ndarray, towards: np.float16) -> np.ndarray:
    """Numbers rounded to float16, down or up; infinite beyond its range."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float16)
    beyond = near > values if towards < 0 else near < values
    return np.where(beyond, np.nextafter(near, towards), near)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array without values whose memory JAX can use as it is."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)
