r"""A random core in a learned subspace: the update is B diag(1 + s) A; s is random, A and B are parameters.

    s_lk ~ N(0, scale^2),     b[:, k] = B[:, k] (1 + s_lk)

The random part has one number for each rank and layer, so every guide is cheap. `A` and `B` are fitted by
maximum likelihood. The bound is a bound on log p(y | A, B), not on the evidence of a prior over all weights.

Reference: Samplawski et al. (2025), Scalable Bayesian low-rank adaptation of large language models via
stochastic variational subspace inference, arXiv 2506.21408, for a variational core between fitted
projections.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from bnlora._util.typing import Adapters
from bnlora.adapters.sites import Sites
from bnlora.priors.base import Prior, layers
from bnlora.priors.hyper import Hyper, hyper_value, require_positive
from bnlora.priors.point import parameter


def subspace(*, scale: Hyper = 1.0) -> Prior:
    """Plain LoRA adapters with one random gain for each rank of each layer.

    Args:
        scale: Standard deviation of the gains around one: a number, `learned(init_value)`, or a distribution.

    Returns:
        A prior with one sample site `<family>.b.core` for each family, standard normal of shape
        (layer, rank), and the parameters `<family>.a`, `<family>.b`.

    Raises:
        ValueError: If the scale is not positive.
    """
    require_positive("scale", scale)

    def prior(sites: Sites) -> Adapters:
        adapters = {}
        for name, site in sites.items():
            factors = {factor: parameter(site, factor) for factor in site.factors}
            if "b" in factors:
                spread = hyper_value(f"{name}.b.core.scale", scale)
                with layers(site):
                    law = dist.Normal(jnp.zeros((site.depth, site.rank)), 1.0).to_event(1)
                    core = numpyro.sample(f"{name}.b.core", law, infer={"init": "zero", "dims": ("rank",)})
                factors["b"] = factors["b"] * (1 + spread * core)[:, None, :]
            adapters[name] = factors
        return adapters

    return prior
