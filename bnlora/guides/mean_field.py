r"""Independent Gaussians: q(x) = prod_i N(loc_i, scale_i^2) over the unconstrained values.

`blob` is the parametrisation of BLoB for the factor `a`: scale = G^2 with a free real G. The whole minibatch
shares one reparametrised draw of the factor. Flipout, whose draws differ from row to row, is not used.

Reference: Wang et al. (2024), BLoB: Bayesian low-rank adaptation by backpropagation, arXiv 2406.11675.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from bnlora.guides.family import Family, per_site
from bnlora.guides.latent import Latent
from bnlora.priors.hyper import require_number


def mean_field(*, init_scale: float = 0.01) -> Family:
    """A location and a scale for every number.

    Args:
        init_scale: Standard deviation at the start, in unconstrained space.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `init_scale` is not a positive number.
    """
    require_number("init_scale", init_scale)

    def law(latent: Latent) -> dist.Distribution:
        q = dist.Normal(latent.location(), latent.scale(init_scale)).to_event(latent.event_dim)
        return latent.constrained(q)

    return per_site("mean-field Gaussian", law)


def blob(*, epsilon: float = 0.05) -> Family:
    r"""Mean-field Gaussian whose scale is the square of a free parameter.

    BLoB uses it for the factors `a`, with points for `b`: `{r".*\.a": blob(), r".*\.b": delta()}`.

    Args:
        epsilon: The roots of the scales start uniformly on `[epsilon / sqrt(2), epsilon]`.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `epsilon` is not a positive number.
    """
    require_number("epsilon", epsilon)

    def law(latent: Latent) -> dist.Distribution:
        def start(key: Array) -> Array:
            return jax.random.uniform(key, latent.shape, minval=epsilon * 0.5**0.5, maxval=epsilon)

        root = latent.parameter("root_scale", start)
        # Keep the scale positive: a root that crosses zero would have no density there.
        scale = jnp.maximum(root**2, jnp.finfo(root.dtype).tiny ** 0.5)
        return latent.constrained(dist.Normal(latent.location(), scale).to_event(latent.event_dim))

    return per_site("mean-field Gaussian with squared scales", law)
