"""A fingerprint of frozen weights: a few numbers of every array, to distinguish models of equal shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def fingerprint(tree: Any) -> Float[np.ndarray, " k"]:
    """Up to 16 numbers of every array of a tree, in one vector."""
    return np.asarray(_spread(tree))


def is_same(first: Float[np.ndarray, " k"], second: Float[np.ndarray, " k"]) -> bool:
    """Whether two fingerprints agree up to rounding: a base made again can differ in the last digits."""
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-4, atol=1e-6)


@jax.jit
def _spread(tree: Any) -> Float[Array, " k"]:
    picked = [jnp.zeros(0)]
    for leaf in (jnp.atleast_1d(leaf) for leaf in jax.tree.leaves(tree) if leaf.size):
        places = np.linspace(0, leaf.size - 1, min(leaf.size, 16)).astype(np.int64)
        picked.append(leaf[np.unravel_index(places, leaf.shape)].astype(jnp.float32))
    return jnp.concatenate(picked)
