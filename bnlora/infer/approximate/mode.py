"""The point of a fitted posterior, as adapters and as a vector.

Laplace's approximation, SWAG and training-free Bayesianization build a posterior around one fitted point.
They need a fit with a guide of deltas, or with the prior `priors.point()`.
"""

import jax
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from bnlora._util.typing import Adapters
from bnlora.prediction.posterior import Posterior


def mode_of(posterior: Posterior, purpose: str) -> Adapters:
    """The point of a posterior whose draws are all equal.

    Args:
        posterior: A fit of a point.
        purpose: Name of the method that needs the point, for the error.

    Returns:
        The adapters, without a draw axis.

    Raises:
        ValueError: If two draws differ.
    """
    # Any two keys will do: draws of a point are equal for all keys, and other posteriors are refused.
    first, second = (posterior.draw_adapters(jax.random.key(seed), 1) for seed in (0, 1))
    if not all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (first, second)), strict=True)):
        raise ValueError(
            f"{purpose} needs a fit of a point, but the draws of this one differ; fit with the guide "
            "AutoDelta(model.prior, init_loc_fn=guides.init_to_base), or with the prior priors.point()"
        )
    return jax.tree.map(lambda x: x[0], first)


def flattened(draws: Adapters) -> Float[np.ndarray, "s p"]:
    """Adapters with a leading draw axis as a matrix with one row for each draw, in float64."""
    leaves = jax.tree.leaves(draws)
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], axis=1)


def unflattened(rows: Float[np.ndarray, "s p"], like: Adapters) -> Adapters:
    """The inverse of `flattened`, for adapters shaped as `like`, which has no draw axis."""
    _, unravel = ravel_pytree(like)
    return jax.vmap(unravel)(_float32(rows))


def _float32(rows: np.ndarray) -> Array:
    return jax.numpy.asarray(rows, jax.numpy.float32)
