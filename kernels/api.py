"""The adapted matrix product that every model calls, with a choice of implementation.

    y = x W + scale * (x A^T) B^T

All implementations compute this same function; `reference` defines it.
"""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxtyping import Array, Float

from bnlora.kernels import reference

IMPLEMENTATIONS: Mapping[str, Callable[..., Array]] = MappingProxyType({"xla": reference.lora_matmul})


def lora_matmul(
    x: Float[Array, "*batch d_in"],
    w: Float[Array, "d_in d_out"],
    a: Float[Array, "rank d_in"],
    b: Float[Array, "d_out rank"],
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a frozen kernel plus a low-rank update: x @ w + scale * (x @ a.T) @ b.T.

    Args:
        x: Inputs, (..., d_in).
        w: Frozen kernel, (d_in, d_out).
        a: Down projection, (rank, d_in).
        b: Up projection, (d_out, rank).
        scale: Factor of the low-rank term.
        implementation: One of `IMPLEMENTATIONS`, or None for the default, "xla".

    Returns:
        Outputs, (..., d_out).

    Raises:
        ValueError: If the implementation is unknown or the shapes do not fit together.
    """
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(name, IMPLEMENTATIONS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown implementation {name!r} of lora_matmul; "
            f"available: {sorted(IMPLEMENTATIONS)}, nearest: {near!r}"
        )
    _check_shapes(x, w, a, b)
    return IMPLEMENTATIONS[name](x, w, a, b, scale)


def _check_shapes(x: Array, w: Array, a: Array, b: Array) -> None:
    """Raise one ValueError that shows all four shapes unless they fit together."""
    fits = w.ndim == a.ndim == b.ndim == 2 and x.ndim >= 1
    if fits:
        (d_in, d_out), rank = w.shape, a.shape[0]
        fits = x.shape[-1] == d_in and a.shape == (rank, d_in) and b.shape == (d_out, rank)
    if not fits:
        raise ValueError(
            "lora_matmul expects x (..., d_in), w (d_in, d_out), a (rank, d_in), b (d_out, rank); "
            f"got x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}"
        )
