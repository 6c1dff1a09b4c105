"""Limits of the Pallas kernels that hold on all devices."""

import jax
from jaxtyping import Array

from bnlora.kernels.quantised import QuantisedMatrix, Weights

DTYPES = ("float32", "bfloat16")
LARGEST_RANK = 64


def common_refusal(x: Array | jax.ShapeDtypeStruct, w: Weights, a: Array, b: Array) -> str | None:
    """The reason why no kernel supports these arrays, or None if one may.

    Args:
        x: Inputs, (m, d_in); arrays or shapes with types.
        w: Frozen kernel, (d_in, d_out).
        a: Down projection, (rank, d_in).
        b: Up projection, (d_out, rank).
    """
    weights = w.scales if isinstance(w, QuantisedMatrix) else w
    kinds = {str(value.dtype) for value in (x, weights, a, b)}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        return f"all arrays must be float32, or all must be bfloat16; got {sorted(kinds)}"
    sides = (*x.shape, w.shape[1], a.shape[0])
    if a.shape[0] > LARGEST_RANK or min(sides) < 1:
        return f"the rank must be from 1 to {LARGEST_RANK} and no side may be empty; got {sides}"
    return None
