r"""Noise of the conditional W | U: `lam` in (0, lam_max] times the noise of the prior, one `lam` a layer.

The guide's `lam` is relative to the prior's conditional noise. If the site is the whitened noise, q(E) =
N(0, lam^2). If the site is the weights, q(W | U) has lam times the prior's own scale lam_p. In both forms, in
closed form,

    KL(q(W|U) || p(W|U)) = d_o d_i (lam^2 / 2 - log lam - 1 / 2).

Reference: Lin et al. (2026), arXiv 2601.21003.
"""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bnlora.guides.family import Family, per_site
from bnlora.guides.latent import Latent
from bnlora.priors.distributions import MatrixConditional
from bnlora.priors.hyper import require_number


def noise(*, lam_init: float = 0.01, lam_max: float = 1.0) -> Family:
    """One learned scale for each layer of the conditional noise, relative to the noise of the prior.

    Args:
        lam_init: Start of every `lam`. A small value lets the optimisation find the signal before the noise.
        lam_max: Upper bound of `lam`. 1, the prior's own noise, gives the full family; a smaller value
            restricts it.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: Unless `0 < lam_init < lam_max <= 1`.
    """
    require_number("lam_init", lam_init)
    require_number("lam_max", lam_max)
    if not lam_init < lam_max <= 1:
        raise ValueError(
            f"noise needs 0 < lam_init < lam_max <= 1; got lam_init={lam_init}, lam_max={lam_max}"
        )

    def law(latent: Latent) -> dist.Distribution:
        start = jnp.full(latent.batch, lam_init)
        lam = latent.parameter("lam", start, constraints.interval(0.0, lam_max))
        return _times_the_prior(latent, lam)

    return per_site(f"noise with lam in (0, {lam_max:g}]", law)


def prior_noise() -> Family:
    """Noise exactly as in the prior, without parameters: KL(q(W|U) || p(W|U)) = 0.

    Returns:
        A family for `Guide`.
    """

    def law(latent: Latent) -> dist.Distribution:
        return _times_the_prior(latent, jnp.ones(latent.batch))

    return per_site("noise as in the prior", law)


def _times_the_prior(latent: Latent, lam: Array) -> dist.Distribution:
    """Noise with `lam` times the prior's scale.

    The conditional law of weights depends on draws and parameters that are not known yet. The law returned
    here only carries `lam`; `Guide.__call__` applies it to the prior's law at the actual draws.
    """
    prior = latent.site["fn"]
    if isinstance(prior, MatrixConditional):
        return prior.scaled_to(lam)
    width = jnp.expand_dims(lam, range(-latent.event_dim, 0))
    return dist.Normal(jnp.zeros(latent.shape), width).to_event(latent.event_dim)
