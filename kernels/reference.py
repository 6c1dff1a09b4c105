"""Reference implementation of the adapted matrix product, in plain JAX.

    y = x W + scale * (x A^T) B^T,    W: (d_in, d_out),  A: (rank, d_in),  B: (d_out, rank).

The low-rank term is contracted through the rank, so B A (d_out x d_in) is never formed. With B = 0 it is
exactly zero and y equals x W bit for bit, whatever A holds (as long as A is finite).

The same for groups of rows, each with its own adapter, is what the kernels implement: G posterior draws of an
adapter over inputs that are one for all (x has one group) or each draw's own. The cotangent y' of y gives

    dx = y' W^T + scale (y' B) A,    dA = scale (y' B)^T x,    dB = scale y'^T (x A^T),

so dx is the same product with W transposed, B^T in the place of A and A^T in the place of B.
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
        w: Frozen kernel, (d_in, d_out), or the same in eight bits.
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
    """The adapted product of groups of rows, each with an adapter of its own.

    Args:
        x: Inputs; one group stands for the same inputs in all.
        w: Frozen kernel, one for all groups: (k, n), or (n, k) where axis 1 is summed over.
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
        The gradients of a and b; x A^T is computed here, not kept from the forward pass.
    """
    return scale * (cotangent @ b).T @ x, scale * cotangent.T @ (x @ a.T)
