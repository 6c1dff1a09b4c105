r"""Independent Laplace weights: p(W_ij) = exp(-|W_ij| / s) / (2 s), with s = sigma / sqrt(2).

`sigma = scale / sqrt(d_i)` is the standard deviation, as in the other priors. The posterior mode is sparse.

Reference: Tibshirani (1996) for the mode; Park and Casella (2008), The Bayesian lasso.
"""

import numpyro.distributions as dist
from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width, each_factor, require_width, sample_matrices, width_factor
from bnlora.priors.hyper import ByFactor, by_factor, hyper_value


def laplace(*, scale: ByFactor = 1.0, width: Width = "scaled") -> Prior:
    """Independent Laplace laws with standard deviation `scale / sqrt(d_i)` on every weight.

    Args:
        scale: Standard deviation of a factor's output for a unit-variance input; as in `normal`.
        width: `"scaled"` to divide by `sqrt(d_i)`, `"unscaled"` for the standard deviation of a weight.

    Returns:
        A prior with sample sites `<family>.<factor>` (or `.z` if `scale` is random).

    Raises:
        ValueError: If a scale is not positive or `width` is unknown.
    """
    scales = by_factor("scale", scale)
    require_width(width)

    def law(site: Site, factor: str) -> Array:
        spread = hyper_value(f"{site.name}.{factor}.scale", scales[factor])
        sigma = spread * width_factor(site, factor, width)
        return sample_matrices(
            site, factor, lambda s: dist.Laplace(0.0, s * 0.5**0.5), sigma, hyper=scales[factor]
        )

    return each_factor(law)
