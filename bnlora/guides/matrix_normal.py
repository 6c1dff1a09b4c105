r"""Matrix normal: x = M + R Z C^T with Z standard normal, R and C lower triangular.

The row covariance is R R^T, the column covariance C C^T. The exact posterior of a weight matrix under iid
normal noise and an iid normal prior has this form. If an event does not have two axes, its last axis gives
the columns and the other axes give the rows.

Reference: Louizos and Welling (2016), Structured and efficient variational deep learning with matrix Gaussian
posteriors; Lin et al. (2026), arXiv 2601.21003, name it as one of the choices of q(U).
"""

import math

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ReshapeTransform

from bnlora.guides.family import Family, per_site
from bnlora.guides.latent import Latent
from bnlora.guides.vector import MAX_PARAMETERS
from bnlora.priors.distributions import MatrixAffine
from bnlora.priors.hyper import require_number


def matrix_normal(*, init_scale: float = 0.01, max_parameters: int = MAX_PARAMETERS) -> Family:
    """A row and a column covariance for every layer of a site.

    Args:
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Largest number of parameters that is accepted for one site.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `init_scale` is not a positive number. `Guide` raises it if a side is too long for a
            covariance.
    """
    require_number("init_scale", init_scale)

    def law(latent: Latent) -> dist.Distribution:
        cols = latent.event[-1] if latent.event else 1
        shape = (math.prod(latent.event) // cols, cols)
        total = math.prod(latent.shape) + math.prod(latent.batch) * sum(d * (d + 1) // 2 for d in shape)
        if total > max_parameters:
            raise ValueError(
                f"a matrix normal over the {shape[0]:,} x {shape[1]:,} matrices of {latent.name!r} has "
                f"{total:,} parameters, more than max_parameters={max_parameters:,}; low_rank(rank=8) has "
                f"{math.prod(latent.shape) * 10:,}"
            )
        # Each root has scale sqrt(init_scale), so that an entry of R Z C^T has scale init_scale.
        R, C = (
            latent.parameter(
                f"{side}_tril",
                jnp.broadcast_to(init_scale**0.5 * jnp.eye(d), (*latent.batch, d, d)),
                constraints.scaled_unit_lower_cholesky,
            )
            for side, d in zip(("row", "column"), shape, strict=True)
        )
        loc = latent.location().reshape(*latent.batch, *shape)
        unit = dist.Normal(jnp.zeros(loc.shape), 1.0).to_event(2)
        reshape = [] if latent.event == shape else [ReshapeTransform(latent.event, shape)]
        return latent.constrained(unit, [MatrixAffine(loc, R, C), *reshape, *latent.to_values()])

    return per_site("matrix normal", law)
