"""Eight-bit weights: every output channel of W has its own scale.

    W_ij ~ q_ij s_j,    q_ij = round(W_ij / s_j) in [-127, 127],    s_j = max_i |W_ij| / 127

so |W_ij - q_ij s_j| <= s_j / 2, and the error of a product x W is at most s_j / 2 times the sum of |x_i|.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

LEVELS = 127


class QuantisedMatrix(NamedTuple):
    """A matrix in eight bits with a scale for each output channel; a pytree.

    Attributes:
        values: Integers, (d_in, d_out).
        scales: Size of one level, (d_out,).
    """

    values: Int8[Array, "d_in d_out"]
    scales: Float[Array, " d_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the represented matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the represented matrix."""
        return self.values.ndim


Weights = Array | QuantisedMatrix
"""A frozen kernel, in floating point or in eight bits."""


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


def dequantise(w: Weights, dtype: jax.typing.DTypeLike) -> Float[Array, "d_in d_out"]:
    """The matrix in a floating-point type."""
    if isinstance(w, QuantisedMatrix):
        return w.values.astype(dtype) * w.scales.astype(dtype)
    return w.astype(dtype)
