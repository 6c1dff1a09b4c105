r"""Gaussians with a covariance between the numbers of a vector: full, or diagonal plus low rank.

    full:      x = loc + diag(s) L z,        L unit lower triangular, z standard normal
    low rank:  x = loc + s (z_1 + F z_2),    covariance diag(s) (I + F F^T) diag(s), F of shape (size, rank)

The argument `over` (see `vector`) defines the vector: one layer of a site, all layers of a family, or all
sites. With all sites, the factors `a` and `b` depend on each other.
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
        over: The extent of one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Largest number of parameters that is accepted.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `over` is unknown or `init_scale` is not a positive number. `Guide` raises it if the
            covariance has too many parameters.
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
        # A transform instead of `MultivariateNormal`: the density of the guide's own draw needs no solve.
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
    """Gaussian whose covariance is diagonal plus low rank; `over="family"` correlates the layers of a family.

    Args:
        rank: Number of directions besides the diagonal.
        over: The extent of one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Largest number of parameters that is accepted.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `rank` is not a whole number of at least one, `over` is unknown or `init_scale` is not
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

        def small(key: Array) -> Array:  # not zero: there, the expected gradient of every direction is zero
            return 0.1 * jax.random.normal(key, (*batch, size, rank)) / rank**0.5

        return LowRankGaussian(loc, scale, numpyro.param(f"{prefix}.q.factor", small))

    return vector_family(
        f"Gaussian of rank {rank} plus diagonal",
        law,
        count=lambda size: size * (2 + rank),
        over=over,
        max_parameters=max_parameters,
    )
