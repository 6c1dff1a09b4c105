"""Gradients against finite differences, with one compiled program for both."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def assert_slopes(function: Callable[[Any], Any], at: Any, *, tolerance: float, step: float = 1e-5) -> None:
    """Reverse-mode gradients of a vector of values against central differences along a random direction.

    `jax.test_util.check_grads` compares the same two numbers, and compiles every operation by itself.

    Args:
        function: Takes a tree of float64 arrays and returns a vector.
        at: The tree.
        tolerance: Relative and absolute.
        step: Of the differences, whose own error is of order `step**2` and rounding over `step`.
    """

    @jax.jit
    def values_and_gradients(tree: Any) -> tuple[Any, Any]:
        values, pull = jax.vjp(function, tree)
        return values, jax.vmap(pull)(jnp.eye(len(values), dtype=values.dtype))[0]

    at, stream = jax.tree.map(np.asarray, at), np.random.default_rng(0)
    direction = jax.tree.map(lambda x: stream.normal(size=x.shape), at)

    def moved(by: float) -> np.ndarray:
        return np.asarray(values_and_gradients(jax.tree.map(lambda x, d: x + by * d, at, direction))[0])

    gradients = values_and_gradients(at)[1]
    along = jax.tree.map(lambda g, d: (np.asarray(g) * d).reshape(len(g), -1).sum(1), gradients, direction)
    differences = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(differences, sum(jax.tree.leaves(along)), rtol=tolerance, atol=tolerance)
