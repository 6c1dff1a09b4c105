"""Draws from a fitted guide: latent sites, adapters, and their log-densities under prior and guide."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers

from bnlora.typing import Adapters, Parameters


class Draw(NamedTuple):
    """One draw of the guide.

    Attributes:
        sites: Value of every latent site of the prior, by name.
        log_prior: Log-density of the draw under the prior, in nats.
        log_q: Log-density of the draw under the guide, in nats. The auxiliary sites of a NumPyro
            autoguide count with the densities of its deltas: it is the density over the sites.
    """

    sites: dict[str, Array]
    log_prior: Array
    log_q: Array


def draw_sites(key: Array, model: Any, guide: Callable, params: Parameters) -> Draw:
    """One guide draw of every latent site of `model.prior`, with both log-densities."""
    prior_key, guide_key = jax.random.split(key)
    guide_trace = handlers.trace(_seeded(guide, guide_key, params)).get_trace()
    prior = handlers.replay(_seeded(model.prior, prior_key, params), guide_trace)
    prior_trace = handlers.trace(prior).get_trace()
    sites = {n: s["value"] for n, s in prior_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return Draw(sites, _log_density(prior_trace), _log_density(guide_trace))


def adapters_at(model: Any, params: Parameters, sites: dict[str, Array]) -> Adapters:
    """The adapters that the prior program makes of given latent sites."""
    substituted = handlers.substitute(model.prior, data={**params, **sites})
    with handlers.block():
        return handlers.seed(substituted, jax.random.key(0))()


def draw_both(
    key: Array, model: Any, guide: Callable, params: Parameters, num_samples: int
) -> tuple[Draw, Adapters]:
    """Draws of the guide and the adapters that the prior makes of them, with a leading draw axis."""

    def one(k: Array) -> tuple[Draw, Adapters]:
        draw = draw_sites(k, model, guide, params)
        return draw, adapters_at(model, params, draw.sites)

    return jax.lax.map(one, jax.random.split(key, num_samples))


def draw_adapters(key: Array, model: Any, guide: Callable, params: Parameters, num_samples: int) -> Adapters:
    """Posterior adapters with a leading draw axis."""
    return draw_both(key, model, guide, params, num_samples)[1]


def _log_density(trace: dict) -> Array:
    total = jnp.zeros(())
    for site in trace.values():
        if site["type"] == "sample":
            extra = (site["intermediates"],) if site["intermediates"] else ()
            total = total + jnp.sum(site["fn"].log_prob(site["value"], *extra))
    return total


def _seeded(program: Callable, key: Array, params: Parameters) -> Callable:
    return handlers.substitute(handlers.seed(program, key), data=dict(params))
