"""Frozen weights in eight or four bits, and how a product reads them.

Eight bits: every output channel of W has its own scale.

    W_ij ~ q_ij s_j,    q_ij = round(W_ij / s_j) in [-127, 127],    s_j = max_i |W_ij| / 127

so |W_ij - q_ij s_j| <= s_j / 2, and the error of a product x W is at most s_j / 2 times the sum of |x_i|.

Four bits: every block of inputs of a channel has its own scale and offset, both in float16.

    W_ij ~ m_bj + q_ij s_bj,    q_ij in [0, 15],    b the block of i

This is the form of GGUF's Q4_0 (m = -8 s) and Q4_1, so such files are kept as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Int8, UInt8

LEVELS = 127


class QuantisedMatrix(NamedTuple):
    """A matrix in eight bits with a scale for each output channel; a pytree. Layers can be stacked in front.

    Attributes:
        values: Integers, (d_in, d_out).
        scales: Size of one level, (d_out,).
    """

    values: Int8[Array, "*layer d_in d_out"]
    scales: Float[Array, "*layer d_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the represented matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the represented matrix."""
        return self.values.ndim


class QuantisedBlocks(NamedTuple):
    """A matrix in four bits; each block of inputs of an output channel has a scale and an offset. A pytree.

    Attributes:
        codes: Two entries in each byte, (blocks, size / 2, d_out): entry i of a block in the low bits of byte
            i, entry i + size / 2 in the high ones.
        scales: Size of one level, (blocks, d_out).
        offsets: The weight of code zero, (blocks, d_out).
    """

    codes: UInt8[Array, "*layer blocks half d_out"]
    scales: Float16[Array, "*layer blocks d_out"]
    offsets: Float16[Array, "*layer blocks d_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the represented matrix."""
        *layers, blocks, half, d_out = self.codes.shape
        return (*layers, 2 * half * blocks, d_out)

    @property
    def ndim(self) -> int:
        """Number of axes of the represented matrix."""
        return self.codes.ndim - 1


class QuantisedTable(NamedTuple):
    """A table in eight bits with a scale for each row, such as an embedding; a pytree.

    Attributes:
        values: Integers, (rows, d).
        scales: Size of one level, (rows,).
    """

    values: Int8[Array, "rows d"]
    scales: Float[Array, " rows"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the represented table."""
        return self.values.shape


Weights = Array | QuantisedMatrix
"""A frozen kernel that the adapted product reads, in floating point or in eight bits."""

Kernel = Weights | QuantisedBlocks
"""A frozen kernel in any type."""

Table = Array | QuantisedTable
"""An embedding or output layer, one row for each token."""

QUANTISED = (QuantisedMatrix, QuantisedBlocks, QuantisedTable)


def is_quantised(value: object) -> bool:
    """Whether this is one of the types of quantised weights, and not an array in it."""
    return isinstance(value, QUANTISED)


def quantise(w: Float[Array, "d_in d_out"]) -> QuantisedMatrix:
    """Round a matrix to eight bits, with one scale for each output channel.

    Args:
        w: Frozen kernel, (d_in, d_out), finite.

    Returns:
        The integers and their scales; a channel of zeros has the scale one.
    """
    largest = jnp.max(jnp.abs(w), axis=0)
    scales = jnp.where(largest > 0, largest / LEVELS, 1.0).astype(w.dtype)
    return QuantisedMatrix(jnp.round(w / scales).astype(jnp.int8), scales)


def dequantise(w: Kernel, dtype: jax.typing.DTypeLike) -> Float[Array, "*layer d_in d_out"]:
    """The matrix in a floating-point type."""
    return _floats(w, dtype) if isinstance(w, QuantisedMatrix | QuantisedBlocks) else w.astype(dtype)


# A function with its own derivative stays one operation of a program. So what a backward pass keeps can be
# decided for it as a whole: the matrix must not be kept for every layer.
@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _floats(w: QuantisedMatrix | QuantisedBlocks, dtype: jax.typing.DTypeLike) -> Array:
    return _computed(w, dtype)


@_floats.defjvp
def _floats_jvp(dtype: jax.typing.DTypeLike, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jax.jvp(lambda w: _computed(w, dtype), primals, tangents)


def _computed(w: QuantisedMatrix | QuantisedBlocks, dtype: jax.typing.DTypeLike) -> Array:
    if isinstance(w, QuantisedMatrix):
        return w.values.astype(dtype) * w.scales[..., None, :].astype(dtype)
    codes = jnp.concatenate([w.codes & 15, w.codes >> 4], axis=-2).astype(jnp.float32)
    scales, offsets = (x[..., None, :].astype(jnp.float32) for x in (w.scales, w.offsets))
    return (codes * scales + offsets).reshape(w.shape).astype(dtype)


def picked(w: Array, pick: Callable[[Array], Array]) -> Array:
    """A part of frozen weights, such as one layer. Weights in bfloat16 have no derivative here.

    Their bits are picked: XLA's CPU compiler has no slices of bfloat16, and would keep the whole stack in
    float32 beside a loop over its layers.
    """
    if w.dtype != jnp.bfloat16:
        return pick(w)
    return jax.lax.bitcast_convert_type(pick(jax.lax.bitcast_convert_type(w, jnp.uint16)), jnp.bfloat16)


def table_rows(
    table: Table, rows: Int[Any, "*batch"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*batch d"]:
    """Some rows of a table in a floating-point type."""
    if isinstance(table, QuantisedTable):
        return table.values[rows].astype(dtype) * table.scales[rows][..., None].astype(dtype)
    return picked(table, lambda x: x[rows]).astype(dtype)


def table_kernel(table: Table, rows: Int[Any, " c"] | None = None) -> Weights:
    """A table, or some of its rows, as the kernel of a product, (d, rows)."""
    chosen = table if rows is None else jax.tree.map(lambda x: picked(x, lambda y: y[rows]), table)
    if isinstance(chosen, QuantisedTable):
        return QuantisedMatrix(chosen.values.T, chosen.scales)
    return chosen.T
