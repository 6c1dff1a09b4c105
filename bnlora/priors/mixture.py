r"""A spike and a slab, both continuous: W_ij ~ pi N(0, sigma^2) + (1 - pi) N(0, (epsilon sigma)^2).

`sigma = scale / sqrt(d_i)` is the width of the slab, `pi` the share of weights in the slab, and `epsilon` the
width of the spike relative to the slab. The membership of a weight is summed out: every site is continuous.

Reference: George and McCulloch (1993), variable selection via Gibbs sampling; Blundell et al. (2015), scale
mixture priors on network weights.
"""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width, each_factor, require_width, sample_matrices, width_factor
from bnlora.priors.hyper import ByFactor, Hyper, by_factor, hyper_value, require_number, require_unit


def spike_and_slab(
    *,
    scale: ByFactor = 1.0,
    inclusion: Hyper = 0.1,
    spike: float = 0.01,
    width: Width = "scaled",
) -> Prior:
    """Mixture of a narrow and a wide normal on every weight.

    Args:
        scale: Scale of the slab; as in `normal`, but a number or `learned`.
        inclusion: Probability `pi` of the slab: a number in (0, 1), `learned(init_value,
            constraints.unit_interval)`, or a distribution on (0, 1), one for each family and factor.
        spike: Standard deviation of the spike relative to the slab, in (0, 1).
        width: `"scaled"` to divide by `sqrt(d_i)`, `"unscaled"` for the standard deviation of a weight.

    Returns:
        A prior with sample sites `<family>.<factor>` (or `.z` if `scale` is random).

    Raises:
        ValueError: If a scale is not positive, `width` is unknown, or `spike` or `inclusion` lies
            outside (0, 1).
    """
    scales = by_factor("scale", scale)
    require_width(width)
    require_unit("inclusion", inclusion)
    require_number("spike", spike, upper=1.0)

    def law(site: Site, factor: str) -> Array:
        name = f"{site.name}.{factor}"
        pi = hyper_value(f"{name}.inclusion", inclusion)
        weights = dist.Categorical(probs=jnp.stack([pi, 1 - pi]))
        spread = hyper_value(f"{name}.scale", scales[factor]) * width_factor(site, factor, width)

        def unit(s: Array) -> dist.Distribution:
            parts = dist.Normal(0.0, s[..., None] * jnp.array([1.0, spike]))
            return dist.MixtureSameFamily(weights, parts)

        return sample_matrices(site, factor, unit, spread, hyper=scales[factor])

    return each_factor(law)
