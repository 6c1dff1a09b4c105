r"""The objective: an evidence lower bound, term by term.

    ELBO = E_q[ sum_i log p(y_i | adapters) ]      data (N/B times the minibatch's sum)
           - KL(q(U) || p(U))                      inducing_kl: every latent site but the noise
           - E_q KL(q(W|U) || p(W|U))              conditional_kl: sites marked `conditional_noise`

The terms are NumPyro's `TraceMeanField_ELBO` by site, which takes closed-form KLs where they exist
and log-ratios of one draw where they do not (the flow). `flow_logdet` is the part of `inducing_kl`
that comes from the flow's Jacobian, with its sign in the KL: -E log|det f'|. Nothing is tempered and
nothing is added, so `elbo` bounds the log-evidence log p(y).

Reference: Lin et al. (2026), arXiv 2601.21003; conditions for the bound: one K everywhere, the scale
`lam` in the guide alone, a normalised likelihood, exact N/B scaling.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer import TraceMeanField_ELBO

from bnlora.flows import RowSharedAffine

TERMS = ("elbo", "data", "inducing_kl", "conditional_kl", "flow_logdet")
"""Names of the reported terms, in nats over the whole data set."""


def elbo_terms(
    key: Array, params: dict, model: Callable, guide: Callable, *args, num_particles: int = 1
) -> dict[str, Array]:
    """One unbiased estimate of the bound and of its terms.

    Args:
        key: Random key.
        params: NumPyro parameters, constrained.
        model: The NumPyro model, with `prior` as an attribute.
        guide: The NumPyro guide.
        *args: Arguments of model and guide: frozen weights, batch, size of the data set.
        num_particles: Draws of the guide to average over.

    Returns:
        A scalar for each of `TERMS`; `elbo = data - inducing_kl - conditional_kl`.
    """
    keys = jax.random.split(key, num_particles)
    terms = jax.lax.map(lambda k: _one_draw(k, params, model, guide, args), keys)
    return jax.tree.map(lambda x: x.mean(0), terms)


def _one_draw(key: Array, params: dict, model: Callable, guide: Callable, args: tuple) -> dict[str, Array]:
    by_site = TraceMeanField_ELBO(sum_sites=False).loss(key, params, model, guide, *args)
    # The same key and parameters give the same guide draw as inside the bound; XLA merges the two.
    seeded = handlers.substitute(handlers.seed(guide, jax.random.split(key)[1]), data=params)
    guide_trace = handlers.trace(seeded).get_trace(*args)
    latent = latent_sites(model)
    noise = {n for n, site in latent.items() if site["infer"].get("conditional_noise")}
    observed = set(by_site) - set(latent) - set(guide_trace)

    def total(names) -> Array:
        return sum((by_site[n] for n in names), start=jnp.zeros(()))

    data, conditional_kl = -total(observed), total(noise)
    inducing_kl = total(set(by_site) - observed - noise)
    return {
        "elbo": data - inducing_kl - conditional_kl,
        "data": data,
        "inducing_kl": inducing_kl,
        "conditional_kl": conditional_kl,
        "flow_logdet": -sum((_logdet(site) for site in guide_trace.values()), start=jnp.zeros(())),
    }


def latent_sites(model: Any) -> dict[str, dict]:
    """The latent sites of `model.prior`, as NumPyro trace entries by name."""
    trace = handlers.trace(handlers.seed(model.prior, jax.random.key(0))).get_trace()
    return {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


def _logdet(site: dict) -> Array:
    """Log-determinant of the flows that a guide site went through, summed over its batch."""
    if site["type"] != "sample" or not site["intermediates"]:
        return jnp.zeros(())
    steps = zip(site["fn"].transforms, site["intermediates"], strict=True)
    return sum(
        (jnp.sum(step[1]) for transform, step in steps if isinstance(transform, RowSharedAffine)),
        start=jnp.zeros(()),
    )


def initial_parameters(
    key: Array, model: Any, guide: Callable, *args
) -> tuple[dict[str, Array], Callable[[dict], dict]]:
    """Start values of every parameter of prior and guide, without running the language model.

    Returns:
        The unconstrained values by name and the map from them to the constrained ones.
    """
    guide_key, prior_key = jax.random.split(key)
    guide_trace = handlers.trace(handlers.seed(guide, guide_key)).get_trace(*args)
    prior = handlers.replay(handlers.seed(model.prior, prior_key), guide_trace)
    prior_trace = handlers.trace(handlers.substitute(prior, data=_parameters(guide_trace))).get_trace()
    sites = {
        name: site
        for trace in (guide_trace, prior_trace)
        for name, site in trace.items()
        if site["type"] == "param"
    }
    transforms = {
        n: biject_to(s["kwargs"].get("constraint", constraints.real) or constraints.real)
        for n, s in sites.items()
    }
    # A parameter may be a tree of arrays: NumPyro's flows keep a whole network under one name.
    unconstrained = {
        n: jax.tree.map(lambda x, n=n: transforms[n].inv(jnp.asarray(x)), s["value"])
        for n, s in sites.items()
    }
    return unconstrained, lambda values: {n: jax.tree.map(transforms[n], x) for n, x in values.items()}


def _parameters(trace: dict) -> dict[str, Array]:
    return {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
