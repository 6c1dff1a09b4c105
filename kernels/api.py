"""The adapted matrix product of all models, with a choice of implementation.

    y = x W + scale * (x A^T) B^T

All implementations compute this function; `reference` defines it. Float32 products have the default precision
of the device, which on accelerators is lower than float32 (`jax_default_matmul_precision`).

| implementation | meaning | runs on |
|---|---|---|
| "xla" | the reference, with JAX's own derivatives | anywhere |
| "pallas" | the kernels of `pallas_tpu` or `pallas_gpu`, with the derivative of `derivatives` | TPU, GPU |
| "interpret" | the kernels of `pallas_tpu`, interpreted step by step (slow) | anywhere; for tests |
| None | "pallas" on a TPU or GPU that supports the arrays and passes a trial, else "xla" | anywhere |

The trial (`trial`) compares kernels and reference on the device, once for each kind of arrays. The
environment variable `BNLORA_KERNEL` names "xla" or "pallas" where the caller names nothing.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
from jaxtyping import Array, Float

from bnlora.kernels import reference, trial
from bnlora.kernels.derivatives import Implementation, operation
from bnlora.kernels.limits import common_refusal
from bnlora.kernels.quantised import QuantisedMatrix, Weights

IMPLEMENTATIONS = ("xla", "pallas", "interpret")
PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cuda": "cuda"}
"""Maps JAX's backends to platforms for lowering."""


def _tpu_refusal(*arrays: Any) -> str | None:
    from bnlora.kernels import pallas_tpu  # imported late: it is a fifth of the library's import time

    return pallas_tpu.refusal(*arrays)


REFUSALS = {"tpu": _tpu_refusal, "cuda": common_refusal}


def lora_matmul(
    x: Float[Array, "*batch d_in"],
    w: Weights,
    a: Float[Array, "rank d_in"],
    b: Float[Array, "d_out rank"],
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a frozen kernel plus a low-rank update: x @ w + scale * (x @ a.T) @ b.T.

    Under `vmap` over adapters with a common x, the kernels compute x @ w once for all adapters.

    Args:
        x: Inputs, (..., d_in).
        w: Frozen kernel, (d_in, d_out), or its eight-bit form (`quantised.quantise`).
        a: Down projection, (rank, d_in).
        b: Up projection, (d_out, rank).
        scale: Factor of the low-rank term, a Python number that is known at compile time.
        implementation: One of `IMPLEMENTATIONS`, or None for the first of "pallas" and "xla" that supports
            the arrays and has passed its trial on the device.

    Returns:
        Outputs, (..., d_out).

    Raises:
        ValueError: If the implementation is unknown or does not support the arrays, the shapes do not fit
            together, `$BNLORA_KERNEL` is unknown, or (kernels only) the gradient of w is requested.
    """
    _check_implementation(implementation)
    _check_shapes(x, w, a, b)
    chosen = implementation or choose(x, w, a, b)
    if chosen == "xla":
        return reference.lora_matmul(x, w, a, b, scale)
    rows = x.reshape(-1, x.shape[-1])
    if refused := _refusals(chosen, rows, w, a, b):
        raise ValueError(
            f"implementation {chosen!r} of lora_matmul does not support these arrays: {refused}; "
            "use 'xla' or None"
        )
    apply = operation(_interpreted() if chosen == "interpret" else _compiled(), float(scale))
    return apply(rows, w, a, b).reshape(*x.shape[:-1], w.shape[1])


def choose(x: Array, w: Weights, a: Array, b: Array) -> str:
    """The implementation chosen for None, for these arrays on the default device."""
    if not _on_accelerator():
        return "xla"
    switched = trial.switched()
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    if switched == "xla" or _refusals("pallas", rows, w, a, b):
        return "xla"
    device = str(jax.devices()[0].device_kind)
    kind = {"dtype": str(x.dtype), "eight_bits": isinstance(w, QuantisedMatrix)}
    return "pallas" if switched or trial.passes(_for_trial(), device, **kind) else "xla"


@cache
def _for_trial() -> Callable[..., Array]:
    """The kernels as the trial runs them; one function, so that its verdicts are kept."""
    return operation(_compiled(), trial.SCALE)


def _check_implementation(name: str | None) -> None:
    """Raise `ValueError`, with the nearest name, unless the implementation exists."""
    if name is not None and name not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(name, IMPLEMENTATIONS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown implementation {name!r} of lora_matmul; "
            f"available: {sorted(IMPLEMENTATIONS)}, nearest: {near!r}"
        )


def _on_accelerator() -> bool:
    return jax.default_backend() in PLATFORMS


def _refusals(
    chosen: str, rows: Array | jax.ShapeDtypeStruct, w: Weights, a: Array, b: Array
) -> dict[str, str]:
    """Reasons by platform why the needed kernels do not support these arrays; empty if all do."""
    return {name: why for name in _platforms(chosen) if (why := REFUSALS[name](rows, w, a, b))}


def _platforms(chosen: str) -> tuple[str, ...]:
    """Platforms whose kernels a program may need: that of the default accelerator, or all without one."""
    if chosen == "interpret":
        return ("tpu",)
    return (PLATFORMS[jax.default_backend()],) if _on_accelerator() else tuple(REFUSALS)


def _interpreted() -> Implementation:
    from bnlora.kernels import pallas_tpu

    product = partial(pallas_tpu.product, interpret=True)
    return Implementation(product, partial(pallas_tpu.factor_gradients, interpret=True))


def _compiled() -> Implementation:
    """The kernels of the platform for which the program is lowered; on a CPU, Pallas raises an error."""
    from bnlora.kernels import pallas_gpu, pallas_tpu

    def product(x: Array, w: Weights, a: Array, b: Array, **options: Any) -> Array:
        kernels = {
            "tpu": partial(pallas_tpu.product, **options),
            "cuda": partial(pallas_gpu.product, **options),
        }
        return _dispatch(kernels, kernels["tpu"], x, w, a, b)

    def factor_gradients(x: Array, cotangent: Array, a: Array, b: Array, **options: Any) -> Any:
        kernels = {"tpu": partial(pallas_tpu.factor_gradients, **options)}
        # These are two thin products; on a GPU, XLA computes them.
        return _dispatch(kernels, partial(reference.factor_gradients, **options), x, cotangent, a, b)

    return Implementation(product, factor_gradients)


def _dispatch(kernels: Mapping[str, Callable[..., Any]], other: Callable[..., Any], *arrays: Any) -> Any:
    if _on_accelerator():
        return kernels.get(PLATFORMS[jax.default_backend()], other)(*arrays)
    return jax.lax.platform_dependent(*arrays, default=other, **kernels)


def _check_shapes(x: Array, w: Weights, a: Array, b: Array) -> None:
    """Raise `ValueError`, with all four shapes, unless they fit together."""
    fits = w.ndim == a.ndim == b.ndim == 2 and x.ndim >= 1
    if fits:
        (d_in, d_out), rank = w.shape, a.shape[0]
        fits = x.shape[-1] == d_in and a.shape == (rank, d_in) and b.shape == (d_out, rank)
    if not fits:
        raise ValueError(
            "lora_matmul expects x (..., d_in), w (d_in, d_out), a (rank, d_in), b (d_out, rank); "
            f"got x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}"
        )
