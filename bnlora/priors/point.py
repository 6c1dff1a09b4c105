"""No prior: adapters are parameters, and a fit is plain LoRA by maximum likelihood.

Reference: Hu et al. (2021), LoRA, for the start values.
"""

import jax
import jax.numpy as jnp
import numpyro
from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, each_factor


def point() -> Prior:
    """Plain LoRA: adapters are NumPyro parameters, and the objective is the log-likelihood.

    `a` starts uniform on +-1/sqrt(d_in), and `b` starts at zero. There is no sample site, so the guide is
    empty and the usual training loop fits by maximum likelihood.

    Returns:
        A prior without latent sites. Its factors are parameters.
    """
    return each_factor(parameter)


def parameter(site: Site, factor: str) -> Array:
    """One factor as a parameter `<family>.<factor>` at LoRA's start."""
    shape, bound = site.shapes[factor], site.d_in**-0.5

    def init(key: Array) -> Array:
        if factor == "b":
            return jnp.zeros(shape)
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return numpyro.param(f"{site.name}.{factor}", init)
