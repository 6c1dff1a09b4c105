r"""Independent normals: W_ij ~ N(0, sigma^2), sigma = scale / sqrt(d_i).

The sparse GP has the same marginal law, so the evidences of the two priors are comparable.
"""

import numpyro.distributions as dist
from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width, each_factor, require_width, sample_matrices, width_factor
from bnlora.priors.hyper import ByFactor, by_factor, hyper_value


def normal(*, scale: ByFactor = 1.0, width: Width = "scaled") -> Prior:
    """Independent N(0, scale^2 / d_i) on every weight of every factor.

    Args:
        scale: Standard deviation of a factor's output for a unit-variance input, one for both factors or one
            for each as `{"a": ..., "b": ...}`: a number, `learned(init_value)`, or a distribution.
        width: `"scaled"` to divide by `sqrt(d_i)`, `"unscaled"` for the standard deviation of a weight.

    Returns:
        A prior with sample sites `<family>.<factor>` of the factor's shape. If `scale` is random, the sites
        are `<family>.<factor>.z` of unit scale and `<family>.<factor>.scale`.

    Raises:
        ValueError: If a scale is not positive or `width` is unknown.
    """
    scales = by_factor("scale", scale)
    require_width(width)

    def law(site: Site, factor: str) -> Array:
        spread = hyper_value(f"{site.name}.{factor}.scale", scales[factor])
        sigma = spread * width_factor(site, factor, width)
        return sample_matrices(site, factor, lambda s: dist.Normal(0.0, s), sigma, hyper=scales[factor])

    return each_factor(law)
