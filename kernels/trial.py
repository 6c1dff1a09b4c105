"""The trial of the kernels: before a result rests on them, they are held to the reference on this device.

A compiler may refuse a kernel, or compile it wrongly, on a device on which it has never run. So where nobody
has named an implementation, the first product of each kind (types of the arrays, eight-bit weights or not)
compiles a small problem of that kind, with draws and all gradients, by the kernels and by the reference, and
compares them. The verdict is kept for the process. A kernel that fails is replaced by the reference, with one
warning.

`BNLORA_KERNEL=xla` leaves the kernels out, `BNLORA_KERNEL=pallas` leaves out the trial.
"""

import difflib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnlora.kernels import reference
from bnlora.kernels.quantised import Weights, quantise

SWITCH = "BNLORA_KERNEL"
"""Environment variable that names the implementation where the caller names none."""

CHOICES = ("xla", "pallas")

TOLERANCE = 0.05
"""Largest difference from the reference, over its largest entry: roundings of bfloat16, no wrong product."""

ROWS, D_IN, D_OUT, RANK, DRAWS, SCALE = 48, 256, 128, 8, 2, 0.5
"""Sides of the trial, small enough to compile in seconds, and the scale of its low-rank term."""

COMPARED = ("product", "gradient of x", "gradient of a", "gradient of b")

Apply = Callable[[Array, Weights, Array, Array], Array]


def switched() -> str | None:
    """The implementation that the environment names, or None.

    Raises:
        ValueError: If it names something else.
    """
    name = os.environ.get(SWITCH) or None
    if name is not None and name not in CHOICES:
        near = difflib.get_close_matches(name, CHOICES, n=1, cutoff=0.0)[0]
        raise ValueError(f"${SWITCH} must be one of {list(CHOICES)}; got {name!r}, nearest is {near!r}")
    return name


@lru_cache(maxsize=64)
def passes(apply: Apply, device: str, dtype: str, *, eight_bits: bool) -> bool:
    """Whether the kernels hold on this device for arrays of this kind; warns once if they do not.

    Args:
        apply: The product by the kernels, of `SCALE`.
        device: Name of the device, for the warning.
        dtype: Type of the arrays.
        eight_bits: Whether the frozen kernel is in eight bits.
    """
    # The first product is asked for while a program is traced; in a thread of its own the trial runs outside.
    with ThreadPoolExecutor(1) as outside:
        why = outside.submit(lambda: failure(apply, *problem(dtype, eight_bits=eight_bits))).result()
    if why is not None:
        kind = f"{dtype}{' with weights of eight bits' if eight_bits else ''}"
        warnings.warn(
            f"the Pallas kernels for {kind} failed their trial on {device}: {why}; XLA's products take their "
            f"place ({SWITCH}=xla leaves out the trial)",
            stacklevel=2,
        )
    return why is None


def problem(dtype: str, *, eight_bits: bool) -> tuple[Array, Weights, Array, Array]:
    """A small product of this kind: common inputs, and `DRAWS` adapters."""
    shapes = (ROWS, D_IN), (D_IN, D_OUT), (DRAWS, RANK, D_IN), (DRAWS, D_OUT, RANK)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, w, a, b = (
        (jax.random.normal(key, shape) / shape[-1] ** 0.5).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return x, quantise(w) if eight_bits else w, a, b


def failure(apply: Apply, x: Array, w: Weights, a: Array, b: Array) -> str | None:
    """Why the kernels do not hold for these arrays: an error, or a difference. None if they hold."""

    def by_reference(x: Array, w: Weights, a: Array, b: Array) -> Array:
        return reference.lora_matmul(x, w, a, b, SCALE)

    expected = jax.device_get(jax.jit(_product_and_gradients(by_reference))(x, w, a, b))
    try:
        got = jax.device_get(jax.jit(_product_and_gradients(apply))(x, w, a, b))
    except Exception as error:  # noqa: BLE001 (a compiler raises what it likes)
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    for name, *pair in zip(COMPARED, expected, got, strict=True):
        wanted, found = (array.astype("float32") for array in pair)
        share = float(abs(found - wanted).max() / abs(wanted).max())
        if not share <= TOLERANCE:  # also NaN
            return f"the {name} differs from the reference by {share:.2g} of its largest entry"
    return None


def _product_and_gradients(apply: Apply) -> Callable[..., tuple[Array, ...]]:
    """`COMPARED`: the product over all draws, and the gradients of the sum of its sines."""

    def both(x: Array, w: Weights, a: Array, b: Array) -> tuple[Array, ...]:
        def total(x: Array, a: Array, b: Array) -> tuple[Array, Array]:
            out = jax.vmap(lambda a, b: apply(x, w, a, b))(a, b)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(x, a, b)
        return out, *gradients

    return both
