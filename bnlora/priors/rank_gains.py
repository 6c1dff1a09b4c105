r"""The common part of priors over ranks: one gain multiplies the contribution of each rank.

    a ~ iid N(0, s_a^2 / d_i),     b[:, k] = gain_lk z[:, k],     z ~ iid N(0, s_b^2 / rank)

The update of a layer is the sum over ranks of the outer products b[:, k] a[k, :]. A gain near zero removes
its rank.
"""

from collections.abc import Callable

import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width, each_factor, require_width, sample_matrices, width_factor
from bnlora.priors.hyper import ByFactor, by_factor, hyper_value

Gain = Callable[[Site], Float[Array, "layer rank"]]


def rank_gains(gain: Gain, *, scale: ByFactor = 1.0, width: Width = "scaled") -> Prior:
    """Normal factors; each column of `b` is multiplied by the gain of its layer and rank.

    Args:
        gain: Samples or declares the gains of a family, shape (layer, rank).
        scale: Scale of the normals, as in `normal`.
        width: As in `normal`.

    Returns:
        A prior with the sites of `normal` and those of `gain`.

    Raises:
        ValueError: If a scale is not positive or `width` is unknown.
    """
    scales = by_factor("scale", scale)
    require_width(width)

    def law(site: Site, factor: str) -> Array:
        spread = hyper_value(f"{site.name}.{factor}.scale", scales[factor])
        sigma = spread * width_factor(site, factor, width)
        z = sample_matrices(site, factor, lambda s: dist.Normal(0.0, s), sigma, hyper=scales[factor])
        return gain(site)[:, None, :] * z if factor == "b" else z

    return each_factor(law)
