"""Reference implementation of the adapted matrix product, in plain JAX.

    y = x W + scale * (x A^T) B^T,    W: (d_in, d_out),  A: (rank, d_in),  B: (d_out, rank).

The low-rank term is contracted through the rank, so B A (d_out x d_in) is never formed. With B = 0 it is
exactly zero and y equals x W bit for bit, whatever A holds (as long as A is finite).
"""

from jaxtyping import Array, Float


def lora_matmul(
    x: Float[Array, "*batch d_in"],
    w: Float[Array, "d_in d_out"],
    a: Float[Array, "rank d_in"],
    b: Float[Array, "d_out rank"],
    scale: float = 1.0,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a frozen kernel plus a low-rank update.

    Args:
        x: Inputs, (..., d_in).
        w: Frozen kernel, (d_in, d_out).
        a: Down projection, (rank, d_in).
        b: Up projection, (d_out, rank).
        scale: Factor of the low-rank term.

    Returns:
        x @ w + scale * (x @ a.T) @ b.T, (..., d_out).
    """
    return x @ w + scale * ((x @ a.T) @ b.T)
