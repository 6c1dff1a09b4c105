"""Reference implementation of the adapted matrix product, in plain JAX.

    y = x W + scale * (x A^T) B^T,    W: (d_in, d_out),  A: (rank, d_in),  B: (d_out, rank).

The low-rank term is contracted through the rank, so B A (d_out x d_in) is never formed. With B = 0 it is
exactly zero and y equals x W bit for bit, for every finite A.

The kernels implement this product for groups of rows with one adapter each: G posterior draws of an adapter,
over common inputs (x has one group) or over separate inputs for each draw. The cotangent y' of y gives

    dx = y' W^T + scale (y' B) A,    dA = scale (y' B)^T x,    dB = scale y'^T (x A^T),

so dx is the same product with W transposed, B^T instead of A and A^T instead of B.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnlora.kernels.quantised import QuantisedMatrix, Weights, dequantise


def lora_matmul(
    x: Float[Array, "*batch d_in"],
    w: Weights,
    a: Float[Array, "rank d_in"],
    b: Float[Array, "d_out rank"],
    scale: float = 1.0,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a frozen kernel plus a low-rank update.

    Args:
        x: Inputs, (..., d_in).
        w: Frozen kernel, (d_in, d_out), or its eight-bit form.
        a: Down projection, (rank, d_in).
        b: Up projection, (d_out, rank).
        scale: Factor of the low-rank term.

    Returns:
        x @ w + scale * (x @ a.T) @ b.T, (..., d_out).
    """
    matrix = dequantise(w, x.dtype) if isinstance(w, QuantisedMatrix) else w
    return x @ matrix + scale * ((x @ a.T) @ b.T)


def product(
    x: Float[Array, "groups_or_1 m k"],
    w: Weights,
    a: Float[Array, "groups rank k"],
    b: Float[Array, "groups n rank"],
    *,
    scale: float,
    summed: int = 0,
) -> Float[Array, "groups m n"]:
    """The adapted product of groups of rows; each group has its own adapter.

    Args:
        x: Inputs; a single group is used for all adapters.
        w: Frozen kernel, common to all groups: (k, n), or (n, k) if axis 1 is summed over.
        a: Down projections.
        b: Up projections.
        scale: Factor of the low-rank term.
        summed: Axis of w that the product sums over: 0 for x W, 1 for x W^T.

    Returns:
        Outputs of every group.
    """
    matrix = dequantise(w, x.dtype)
    base = x @ (matrix if summed == 0 else matrix.T)
    return base + scale * jnp.einsum("gmr,gnr->gmn", jnp.einsum("gmk,grk->gmr", x, a), b)


def factor_gradients(
    x: Float[Array, "m k"],
    cotangent: Float[Array, "m n"],
    a: Float[Array, "rank k"],
    b: Float[Array, "n rank"],
    *,
    scale: float,
) -> tuple[Float[Array, "rank k"], Float[Array, "n rank"]]:
    """Gradients with respect to both factors.

    Args:
        x: Inputs.
        cotangent: Cotangent of the outputs.
        a: Down projection.
        b: Up projection.
        scale: Factor of the low-rank term.

    Returns:
        The gradients of a and b; x A^T is recomputed here, not stored by the forward pass.
    """
    return scale * (cotangent @ b).T @ x, scale * cotangent.T @ (x @ a.T)
