"""Draws from a fitted guide: latent sites, adapters, and their log-densities under prior and guide.

Log-densities are over the constrained sites x, in nats: log p(x) of the prior and log q(x) of the guide.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers

from bnlora._util.typing import Adapters, Parameters
from bnlora.program.protocol import Program


class Draw(NamedTuple):
    """One draw of the guide.

    Attributes:
        sites: Value of every latent site of the prior, by name.
        log_prior: Log-density of the draw under the prior, in nats, including the prior's factors and
            observed sites.
        log_q: Log-density of the sites under the guide, in nats. For a NumPyro autoguide it is the sum over
            its auxiliary sites and the deltas that map them to the sites.
        log_prior_of: Contribution of each site to `log_prior`, also of observed sites, by name.
        log_q_of: Contribution of each site to `log_q`, also of auxiliary sites, by name.
    """

    sites: dict[str, Array]
    log_prior: Array
    log_q: Array
    log_prior_of: dict[str, Array]
    log_q_of: dict[str, Array]


def draw_sites(key: Array, model: Program, guide: Callable, params: Parameters) -> Draw:
    """One guide draw of every latent site of `model.prior`, with both log-densities."""
    guide_trace, prior_trace = traces(key, model, guide, params)
    log_prior, log_q = _log_densities(prior_trace), _log_densities(guide_trace)
    return Draw(_latent(prior_trace), _total(log_prior), _total(log_q), log_prior, log_q)


def draw_from_guide(
    key: Array, model: Program, guide: Callable, params: Parameters
) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """The guide's half of a draw: the sites, their log-density, and the contribution of each site."""
    known = getattr(guide, "latent", None)
    if known is None:
        guide_trace, prior_trace = traces(key, model, guide, params)
        sites = _latent(prior_trace)
    else:  # a `Guide` has every latent site of the prior, in its order, so the prior does not have to run
        # The same key as in `traces`.
        guide_trace = handlers.trace(_seeded(guide, jax.random.split(key)[1], params)).get_trace()
        sites = {name: guide_trace[name]["value"] for name in known}
    log_q = _log_densities(guide_trace)
    return sites, _total(log_q), log_q


def draw_from_prior(key: Array, model: Program, params: Parameters) -> dict[str, Array]:
    """One draw of the prior of every latent site."""
    return _latent(handlers.trace(_seeded(model.prior, key, params)).get_trace())


def prior_at(
    sites: dict[str, Array], model: Program, params: Parameters
) -> tuple[Array, dict[str, Array], Adapters]:
    """The prior's half of a draw: the sites' log-density, the contribution of each, and the adapters."""
    program = handlers.trace(_seeded(model.prior, jax.random.key(0), {**params, **sites}))
    adapters = program()
    log_prior = _log_densities(program.trace)
    return _total(log_prior), log_prior, adapters


def adapters_at(model: Program, params: Parameters, sites: dict[str, Array]) -> Adapters:
    """The adapters that the prior program makes of latent sites."""
    substituted = handlers.substitute(model.prior, data={**params, **sites})
    with handlers.block():
        return handlers.seed(substituted, jax.random.key(0))()


def draw_both(
    key: Array, model: Program, guide: Callable, params: Parameters, num_draws: int
) -> tuple[Draw, Adapters]:
    """Draws of the guide and the adapters that the prior makes of them, with a leading draw axis."""

    def one(k: Array) -> tuple[Draw, Adapters]:
        draw = draw_sites(k, model, guide, params)
        return draw, adapters_at(model, params, draw.sites)

    return jax.lax.map(one, jax.random.split(key, num_draws))


def draw_adapters(
    key: Array, model: Program, guide: Callable, params: Parameters, num_draws: int
) -> Adapters:
    """Posterior adapters with a leading draw axis."""
    return draw_both(key, model, guide, params, num_draws)[1]


def traces(
    key: Array, model: Program, guide: Callable, params: Parameters
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The traces of one run of the guide, and of a run of `model.prior` at its draws."""
    prior_key, guide_key = jax.random.split(key)
    guide_trace = handlers.trace(_seeded(guide, guide_key, params)).get_trace()
    prior = handlers.replay(_seeded(model.prior, prior_key, params), guide_trace)
    return guide_trace, handlers.trace(prior).get_trace()


def log_density_of(site: dict[str, Any]) -> Array:
    """Log-density of a site at its value, times its scale if any; one number for each entry of its plates."""
    # Flows reuse the intermediates of the draw, so that they are not inverted.
    extra = (site["intermediates"],) if site["intermediates"] else ()
    log_density = site["fn"].log_prob(site["value"], *extra)
    return log_density if site["scale"] is None else site["scale"] * log_density


def _log_densities(trace: dict) -> dict[str, Array]:
    return {n: jnp.sum(log_density_of(site)) for n, site in trace.items() if site["type"] == "sample"}


def _latent(trace: dict) -> dict[str, Array]:
    return {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


def _total(parts: dict[str, Array]) -> Array:
    return sum(parts.values(), start=jnp.zeros(()))


def _seeded(program: Callable, key: Array, params: Parameters) -> Callable:
    return handlers.substitute(handlers.seed(program, key), data=dict(params))
