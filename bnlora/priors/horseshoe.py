r"""The horseshoe over ranks, plain and regularised: the number of ranks is inferred.

    b[:, k] = tau lambda_lk z[:, k],      lambda_lk ~ C+(0, 1),     tau ~ C+(0, tau_0),

with one tau for each family.

The regularised horseshoe replaces lambda by lambda~ with

    lambda~^2 = c^2 lambda^2 / (c^2 + tau^2 lambda^2),      c^2 ~ Inv-Gamma(nu / 2, nu slab^2 / 2),

so tau lambda~ never exceeds c, and ranks far from zero shrink as under a Student-t slab of scale `slab`.

Reference: Carvalho, Polson and Scott (2010), The horseshoe estimator for sparse signals; Piironen and Vehtari
(2017), Sparsity information and regularization in the horseshoe and other shrinkage priors, section 2.3.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width, layers
from bnlora.priors.hyper import ByFactor, require_number
from bnlora.priors.rank_gains import rank_gains


def horseshoe(*, global_scale: float = 0.5, scale: ByFactor = 1.0, width: Width = "scaled") -> Prior:
    """Horseshoe over the ranks of every layer, with one global scale for each family.

    The gains act on `b`. If the sites request only `a`, as in `per_factor(a=...)`, this prior is `normal`.

    Args:
        global_scale: Scale `tau_0` of the half-Cauchy law of `tau`.
        scale: Scale of the normals that the gains multiply, as in `normal`.
        width: As in `normal`.

    Returns:
        A prior with the sites of `normal`, `<family>.b.tau` (a scalar) and `<family>.b.local`, shape
        (layer, rank).

    Raises:
        ValueError: If a scale is not positive or `width` is unknown.
    """
    require_number("global_scale", global_scale)

    def gains(site: Site) -> Array:
        tau, local = _global_and_local(site, global_scale)
        return tau * local

    return rank_gains(gains, scale=scale, width=width)


def regularized_horseshoe(
    *,
    global_scale: float = 0.5,
    slab: float = 2.0,
    slab_df: float = 4.0,
    scale: ByFactor = 1.0,
    width: Width = "scaled",
) -> Prior:
    """Regularised horseshoe over the ranks of every layer.

    The gains act on `b`. If the sites request only `a`, as in `per_factor(a=...)`, this prior is `normal`.

    Args:
        global_scale: Scale `tau_0` of the half-Cauchy law of `tau`.
        slab: Scale of the slab.
        slab_df: Degrees of freedom `nu` of the slab.
        scale: Scale of the normals that the gains multiply, as in `normal`.
        width: As in `normal`.

    Returns:
        A prior with the sites of `horseshoe` and `<family>.b.slab`, the scalar c^2.

    Raises:
        ValueError: If a scale or `slab_df` is not positive or `width` is unknown.
    """
    for name, value in {"global_scale": global_scale, "slab": slab, "slab_df": slab_df}.items():
        require_number(name, value)

    def gains(site: Site) -> Array:
        tau, local = _global_and_local(site, global_scale)
        law = dist.InverseGamma(slab_df / 2, slab_df * slab**2 / 2)
        c2 = numpyro.sample(f"{site.name}.b.slab", law, infer={"init": "median"})
        # c tau lambda / sqrt(c^2 + tau^2 lambda^2); hypot avoids overflow in the square of a large lambda.
        unregularised = tau * local
        return unregularised / jnp.hypot(1.0, unregularised / jnp.sqrt(c2))

    return rank_gains(gains, scale=scale, width=width)


def _global_and_local(site: Site, global_scale: float) -> tuple[Array, Array]:
    tau = numpyro.sample(f"{site.name}.b.tau", dist.HalfCauchy(global_scale), infer={"init": "median"})
    with layers(site):
        law = dist.HalfCauchy(jnp.ones((site.depth, site.rank))).to_event(1)
        return tau, numpyro.sample(f"{site.name}.b.local", law, infer={"init": "median", "dims": ("rank",)})
