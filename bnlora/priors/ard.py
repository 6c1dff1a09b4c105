r"""Automatic relevance determination: every rank of every layer has its own scale.

    b[:, k] = gain_lk z[:, k]

A learned gain (type-II maximum likelihood) goes to zero if the data do not support its rank.

Reference: MacKay (1994); Neal (1996), Bayesian learning for neural networks; Bishop (1999), Bayesian PCA.
"""

from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width
from bnlora.priors.hyper import ByFactor, Hyper, hyper_value, learned, require_positive
from bnlora.priors.rank_gains import rank_gains


def ard(
    *,
    gain: Hyper = learned(1.0),  # noqa: B008 a frozen mark, the same for every call
    scale: ByFactor = 1.0,
    width: Width = "scaled",
) -> Prior:
    """Normal factors with a gain for each rank, learned or random.

    The gains act on `b`. If the sites request only `a`, as in `per_factor(a=...)`, this prior is `normal`.

    Args:
        gain: `learned(init_value)`, the distribution of each gain (such as `HalfNormal(1)`), or a number.
        scale: Scale of the normals, as in `normal`.
        width: As in `normal`.

    Returns:
        A prior with the sites of `normal` and `<family>.b.gain`, shape (layer, rank).

    Raises:
        ValueError: If a scale or gain can be non-positive, or `width` is unknown.
    """
    require_positive("gain", gain)

    def gains(site: Site) -> Array:
        return hyper_value(f"{site.name}.b.gain", gain, event=(site.rank,), site=site, dims=("rank",))

    return rank_gains(gains, scale=scale, width=width)
