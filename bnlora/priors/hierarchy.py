r"""Partial pooling across the layers of a family: of scales, or of inducing matrices.

Scales: the factor of layer l is multiplied by tau_l, with log tau_l ~ N(0, spread^2) and one spread for each
family. At spread zero all layers share one scale; with a large spread the scales are independent.

Inducing matrices: with one set of frames for all layers of a family,

    V_l = sqrt(rho) V_0 + sqrt(1 - rho) V'_l,      V_0, V'_l standard normal,

so each layer has the law of the sparse GP, iid N(0, sigma^2), for every `rho`. The weights of two layers have
covariance rho sigma^2 P_r (x) P_c. At `rho = 1` all layers share one inducing matrix.

Reference: Gelman and Hill (2007) for partial pooling; Lin et al. (2026), arXiv 2601.21003, for the inducing
matrix.
"""

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from bnlora._util.checks import check_option
from bnlora._util.typing import FACTORS, NOISE, Adapters
from bnlora.adapters.sites import Site, Sites
from bnlora.priors import gp
from bnlora.priors.base import START, Prior, Width, each_factor, layers, require_width, width_factor
from bnlora.priors.hyper import (
    ByFactor,
    Hyper,
    by_factor,
    hyper_value,
    learned,
    require_number,
    require_positive,
    require_unit,
)
from bnlora.priors.sides import frames_side, require_sizes
from bnlora.priors.sparse_gp import standard_normal


def pooled_scales(prior: Prior, *, spread: Hyper = learned(0.5), factor: str = "b") -> Prior:  # noqa: B008
    """Give each layer of another prior its own scale, partially pooled within the family.

    Args:
        prior: The prior whose factor is scaled.
        spread: Standard deviation of the log-scales, one for each family: a number, `learned(init_value)` or
            a distribution.
        factor: The factor that is scaled.

    Returns:
        A prior with the sites of `prior`, and `<family>.<factor>.pool`, shape (layer,), standard normal. The
        prior raises `ValueError` if none of its sites requests the factor.

    Raises:
        ValueError: If the factor is unknown or the spread may not be positive.
    """
    require_positive("spread", spread)
    check_option("factor", factor, FACTORS)

    def pooled(sites: Sites) -> Adapters:
        requested = sorted({f for site in sites.values() for f in site.factors})
        if factor not in requested:
            raise ValueError(
                f"pooled_scales(factor={factor!r}) needs sites that request it; these request {requested}"
            )
        adapters = {name: dict(pair) for name, pair in prior(sites).items()}
        for name, site in sites.items():
            if factor in site.factors:
                pool = f"{name}.{factor}.pool"
                width = hyper_value(f"{pool}.spread", spread)
                with layers(site):
                    law = dist.Normal(jnp.zeros(site.depth), 1.0)
                    z = numpyro.sample(pool, law, infer={"init": "zero"})
                adapters[name][factor] = jnp.exp(width * z)[:, None, None] * adapters[name][factor]
        return adapters

    return pooled


def pooled_sparse_gp(
    *,
    rho: Hyper = 0.5,
    rows: int = 9,
    cols: int = 9,
    scale: ByFactor = 1.0,
    width: Width = "scaled",
    reliability: float = 0.95,
) -> Prior:
    """Sparse GP whose layers share learned frames and have correlated inducing matrices.

    Args:
        rho: Correlation of the inducing matrices of two layers: a number in (0, 1), `learned(init_value,
            constraints.unit_interval)`, or a distribution on (0, 1).
        rows: Inducing rows, clipped to the length of their side.
        cols: Inducing columns, clipped to the length of their side.
        scale: As in `sparse_gp`.
        width: As in `sparse_gp`.
        reliability: Eigenvalue of `P` at the start, in (0, 1).

    Returns:
        A prior with sample sites `<family>.<factor>.V_0`, shape (k_r, k_c), and `.V` and `.E` as in
        `sparse_gp`.

    Raises:
        ValueError: If a scale is not positive, `width` is unknown, `rho` or `reliability` lies outside
            (0, 1), or an inducing size is below one.
    """
    scales = by_factor("scale", scale)
    require_width(width)
    require_unit("rho", rho)
    require_number("reliability", reliability, upper=1.0)
    require_sizes(rows, cols)

    def law(site: Site, factor: str) -> Array:
        name, shape = f"{site.name}.{factor}", site.shapes[factor]
        sigma = hyper_value(f"{name}.scale", scales[factor]) * width_factor(site, factor, width)
        kinds: dict[str, Any] = {"frames": "learned", "reliability": reliability}
        row_side = frames_side(name, "rows", 1, shape[1], rows, **kinds)
        col_side = frames_side(name, "cols", 1, shape[2], cols, **kinds)
        k = (row_side.factor.shape[-1], col_side.factor.shape[-1])
        correlation = hyper_value(f"{name}.rho", rho)
        common = standard_normal(f"{name}.V_0", k, init=START[factor])
        with layers(site):
            own = standard_normal(f"{name}.V", (site.depth, *k), init="zero")
            E = standard_normal(f"{name}.E", shape, init="zero", **{NOISE: True})
        V = jnp.sqrt(correlation) * common + jnp.sqrt(1 - correlation) * own
        inside = gp.conditional_mean(V, row_side, col_side) + gp.conditional_noise(E, row_side, col_side)
        return sigma * inside

    return each_factor(law)
