r"""Gaussians with covariance between the numbers of a vector: full, and diagonal plus low rank.

    full:      x = loc + diag(s) L z,              L unit lower triangular, z standard normal
    low rank:  x = loc + s (z_1 + F z_2),          covariance diag(s) (I + F F^T) diag(s), F of shape (size,
    rank)

What is one vector is the caller's choice (`over`, see `vector`): full or low-rank covariance within a layer,
across the layers of a family, or across sites, which is how the factors `a` and `b` come to depend on each
other.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import LowerCholeskyAffine

from bnlora.guides.family import Family
from bnlora.guides.vector import MAX_PARAMETERS, Over, vector_family
from bnlora.priors.distributions import LowRankGaussian
from bnlora.priors.hyper import require_count, require_number


def full(*, over: Over = "layer", init_scale: float = 0.01, max_parameters: int = MAX_PARAMETERS) -> Family:
    """Gaussian with a full covariance.

    Args:
        over: What is one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Refuse to be built with more.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: When `over` is unknown or `init_scale` is not a positive number. Building the guide raises
            it where the covariance would be too large.
    """
    require_number("init_scale", init_scale)

    def law(prefix: str, batch: tuple[int, ...], size: int, start) -> dist.Distribution:
        loc = numpyro.param(f"{prefix}.q.loc", start)
        tril = numpyro.param(
            f"{prefix}.q.scale_tril",
            jnp.broadcast_to(init_scale * jnp.eye(size), (*batch, size, size)),
            constraint=constraints.scaled_unit_lower_cholesky,
        )
        unit = dist.Normal(jnp.zeros((*batch, size)), 1.0).to_event(1)
        # As a transform and not as `MultivariateNormal`: the density of an own draw then needs no solve.
        return dist.TransformedDistribution(unit, LowerCholeskyAffine(loc, tril))

    return vector_family(
        "full-covariance Gaussian",
        law,
        count=lambda size: size + size * (size + 1) // 2,
        over=over,
        form="full",
        max_parameters=max_parameters,
    )


def low_rank(
    *,
    rank: int = 4,
    over: Over = "layer",
    init_scale: float = 0.01,
    max_parameters: int = MAX_PARAMETERS,
) -> Family:
    """Gaussian with a covariance of diagonal plus low rank; `over="family"` ties the layers of a family.

    Args:
        rank: Number of directions besides the diagonal.
        over: What is one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Refuse to be built with more.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: When the rank is no whole number of at least one, `over` is unknown or `init_scale` is not
            a positive number.
    """
    require_count("rank", rank)
    require_number("init_scale", init_scale)

    def law(prefix: str, batch: tuple[int, ...], size: int, start) -> dist.Distribution:
        loc = numpyro.param(f"{prefix}.q.loc", start)
        scale = numpyro.param(
            f"{prefix}.q.scale",
            jnp.full((*batch, size), init_scale),
            constraint=constraints.softplus_positive,
        )

        def small(key: Array) -> Array:  # at zero the gradient of every direction vanishes in mean
            return 0.1 * jax.random.normal(key, (*batch, size, rank)) / rank**0.5

        return LowRankGaussian(loc, scale, numpyro.param(f"{prefix}.q.factor", small))

    return vector_family(
        f"Gaussian of rank {rank} plus diagonal",
        law,
        count=lambda size: size * (2 + rank),
        over=over,
        max_parameters=max_parameters,
    )
