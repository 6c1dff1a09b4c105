r"""Noise that completes a conditional W | U: q(E) = N(0, lam^2), one `lam` in (0, lam_max] for each layer.

KL(q(W|U) || p(W|U)) = d_o d_i (rho^2 / 2 - log rho - 1 / 2), rho = lam over the prior's own: in closed form,
and the same whether the site is the whitened `E` or the weights `W` themselves.

Reference: Lin et al. (2026), arXiv 2601.21003.
"""

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from bnlora.distributions import MatrixConditional
from bnlora.guides.family import Family, per_site
from bnlora.guides.latent import Latent


def noise(*, lam_init: float = 0.01, lam_max: float = 1.0) -> Family:
    """One learned scale a layer for the conditional noise.

    Args:
        lam_init: Start of every `lam`; small, so that optimisation finds the signal before noise.
        lam_max: Cap on `lam`. 1 is the full family; a smaller one is a restricted family.

    Raises:
        ValueError: When `0 < lam_init < lam_max <= 1` fails.
    """
    if not 0 < lam_init < lam_max <= 1:
        raise ValueError(f"lam needs 0 < lam_init < lam_max <= 1; got lam_init={lam_init}, lam_max={lam_max}")

    def law(latent: Latent) -> dist.Distribution:
        start = jnp.full(latent.batch, lam_init)
        lam = latent.parameter("lam", start, constraints.interval(0.0, lam_max))
        prior = latent.site["fn"]
        if isinstance(prior, MatrixConditional):
            return prior.scaled_to(lam)
        width = jnp.expand_dims(lam, range(-latent.event_dim, 0))
        return dist.Normal(jnp.zeros(latent.shape), width).to_event(latent.event_dim)

    return per_site(f"noise with lam in (0, {lam_max:g}]", law)


def prior_noise() -> Family:
    """Noise exactly as in the prior, nothing learned: KL(q(W|U) || p(W|U)) = 0."""

    def law(latent: Latent) -> dist.Distribution:
        prior = latent.site["fn"]
        if isinstance(prior, MatrixConditional):
            return prior.scaled_to(jnp.ones(latent.batch) * prior.lam)
        return dist.Normal(jnp.zeros(latent.shape), 1.0).to_event(latent.event_dim)

    return per_site("noise as in the prior", law)
