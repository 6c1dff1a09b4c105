r"""The objective: an evidence lower bound, term by term.

    ELBO = E_q[ sum_i log p(y_i | adapters) ]      data (N/B times the minibatch's sum)
           - KL(q(U) || p(U))                      inducing_kl: all latent sites except the noise
           - E_q KL(q(W|U) || p(W|U))              conditional_kl: sites marked `conditional_noise`

Factors and observed sites of the prior (`numpyro.factor`, `obs=`) are part of p(U) and so of `inducing_kl`.

The terms are NumPyro's `TraceMeanField_ELBO` by site. It uses closed-form KLs if they exist, and log-ratios
of one draw otherwise (for flows). `flow_logdet` is the part of `inducing_kl` from the flow's Jacobian, with
its sign in the KL: -E log|det f'|. No term is tempered or added, so `elbo` is a lower bound on the
log-evidence log p(y).

Reference: Lin et al. (2026), arXiv 2601.21003; conditions for the bound: the same K everywhere, the scale
`lam` only in the guide, a normalised likelihood, exact N/B scaling.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to
from numpyro.infer import TraceMeanField_ELBO

from bnlora._util.checks import check_key
from bnlora._util.compilation import options
from bnlora._util.typing import Parameters
from bnlora.guides.automatic import prepare
from bnlora.guides.flows import flow_log_determinant
from bnlora.priors.declared import declared

TERMS = ("elbo", "data", "inducing_kl", "conditional_kl", "flow_logdet")
"""Names of the reported terms, in nats over the whole data set."""

_Allowed = dict[str, constraints.Constraint]


@dataclass(frozen=True, eq=False)  # `jax.jit` needs a hash
class Constrain:
    """The map from unconstrained parameters to constrained ones.

    Attributes:
        transforms: The map of every parameter by name.
    """

    transforms: Mapping[str, Transform]

    def __call__(self, values: dict) -> dict:
        """The constrained parameters; each may be a tree of arrays."""
        return {name: jax.tree.map(self.transforms[name], x) for name, x in values.items()}


def elbo_terms(
    key: Array, params: dict, model: Any, guide: Callable, *args: Any, num_particles: int = 1
) -> dict[str, Array]:
    """One unbiased estimate of the bound and of its terms.

    Args:
        key: Random key.
        params: NumPyro parameters, constrained.
        model: The NumPyro model, with `prior` as an attribute.
        guide: The NumPyro guide.
        *args: Arguments of model and guide: frozen weights, batch, size of the data set.
        num_particles: Number of guide draws to average over.

    Returns:
        A scalar for each of `TERMS`; `elbo = data - inducing_kl - conditional_kl`.
    """
    if num_particles == 1:  # a loop of one turn would double the compile time
        return _one_draw(key, params, model, guide, args)
    keys = jax.random.split(key, num_particles)
    terms = jax.lax.map(lambda k: _one_draw(k, params, model, guide, args), keys)
    return jax.tree.map(lambda x: x.mean(0), terms)


def _one_draw(key: Array, params: dict, model: Any, guide: Callable, args: tuple) -> dict[str, Array]:
    # Record the sites of both programs while the bound runs them, so that each program runs once.
    recorded_model, recorded_guide = handlers.trace(model), handlers.trace(guide)
    by_site = TraceMeanField_ELBO(sum_sites=False).loss(key, params, recorded_model, recorded_guide, *args)
    # Read the marks from the prior itself, because a replayed site has the marks of the guide.
    sites, prior = recorded_model.trace, declared(model.prior)
    noise = {name for name, site in prior.latent.items() if site.is_noise}

    # Sum in the order of the trace: a sum over a set would round differently in each process.
    def total(belongs: Callable[[str], bool]) -> Array:
        return sum((by_site[name] for name in by_site if belongs(name)), start=jnp.zeros(()))

    def of_rows(name: str) -> bool:
        return name in sites and sites[name]["is_observed"] and name not in prior.observed

    # NumPyro's losses have the sign of KLs, so an observed site contributes -log p.
    data, conditional_kl = -total(of_rows), total(lambda name: name in noise)
    inducing_kl = total(lambda name: not of_rows(name) and name not in noise)
    return {
        "elbo": data - inducing_kl - conditional_kl,
        "data": data,
        "inducing_kl": inducing_kl,
        "conditional_kl": conditional_kl,
        "flow_logdet": -sum((_logdet(s) for s in recorded_guide.trace.values()), start=jnp.zeros(())),
    }


def _logdet(site: dict) -> Array:
    """Log-determinant of the flows of a guide site, in nats, summed over its batch."""
    if site["type"] != "sample" or not site["intermediates"]:
        return jnp.zeros(())
    steps = zip(site["fn"].transforms, site["intermediates"], strict=True)
    return sum((flow_log_determinant(transform, step[1]) for transform, step in steps), start=jnp.zeros(()))


def initial_parameters(
    key: Array, model: Any, guide: Callable, *args: Any, init_params: Parameters | None = None
) -> tuple[dict[str, Array], Constrain]:
    """Start values of every parameter of prior and guide, without running the language model.

    Args:
        key: Random key of the start values.
        model: The NumPyro model, with `prior` as an attribute.
        guide: The NumPyro guide.
        *args: Arguments of the guide.
        init_params: Constrained values to start from instead, one for each parameter.

    Returns:
        The unconstrained values by name and the map from them to the constrained ones.

    Raises:
        ValueError: If the prior has a discrete latent site or a name that model or guide own, the guide
            cannot be fitted (see `bnlora.guides.automatic`), a start value is outside its constraint, or
            `init_params` lacks a parameter, has another name or shape.
    """
    key = check_key(key)
    declared(model.prior).check()
    guide_key, prior_key = jax.random.split(key)
    transforms: dict[str, Any] = {}
    prepare(guide_key, guide, *args)

    def start_values(guide_key: Array, prior_key: Array) -> tuple[dict[str, Array], _Allowed]:
        sites = _declared(guide_key, prior_key, model, guide, args)
        allowed = _allowed(sites)
        transforms.update({name: biject_to(constraint) for name, constraint in allowed.items()})
        # A parameter may be a tree of arrays: NumPyro's flows keep a whole network under one name.
        values = {n: jax.tree.map(transforms[n].inv, s["value"]) for n, s in sites.items()}
        # Strip weak types; otherwise the first update changes the input types and the step is traced twice.
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), values), _computed(allowed)

    unconstrained, computed = run_once(start_values, guide_key, prior_key)
    transforms.update({name: biject_to(constraint) for name, constraint in computed.items()})
    constrain = Constrain(transforms)
    if init_params is None:
        _check_finite(unconstrained)
        return unconstrained, constrain
    _check_start(jax.eval_shape(constrain, unconstrained), init_params)
    start = {n: jax.tree.map(transforms[n].inv, init_params[n]) for n in unconstrained}
    _check_finite(start)
    return jax.tree.map(lambda like, x: jnp.asarray(x, like.dtype), unconstrained, start), constrain


def _check_finite(values: dict[str, Array]) -> None:
    """Raise `ValueError` unless every unconstrained start is finite; traced values cannot be checked."""
    for name, value in values.items():
        leaves = [leaf for leaf in jax.tree.leaves(value) if not isinstance(leaf, jax.core.Tracer)]
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise ValueError(
                f"the start of {name!r} must lie inside its constraint; it is on its edge or beyond"
            )


def parameter_shapes(model: Any, guide: Callable, *args: Any) -> tuple[Parameters, _Allowed]:
    """Shapes and types of the constrained parameters of prior and guide, and their constraints.

    Programs are traced and not run, except that an autoguide of NumPyro runs once if it has not run before.
    """
    allowed: _Allowed = {}
    prepare(jax.random.key(0), guide, *args)

    def look(guide_key: Array, prior_key: Array) -> tuple[Parameters, _Allowed]:
        sites = _declared(guide_key, prior_key, model, guide, args)
        allowed.update(_allowed(sites))
        return {n: s["value"] for n, s in sites.items()}, _computed(allowed)

    keys = jax.random.key(0), jax.random.key(1)
    shapes, computed = jax.eval_shape(look, *keys)
    return shapes, allowed | (jax.jit(look)(*keys)[1] if computed else {})


def _allowed(sites: dict[str, dict[str, Any]]) -> _Allowed:
    return {name: site["kwargs"].get("constraint", constraints.real) for name, site in sites.items()}


def _computed(allowed: _Allowed) -> _Allowed:
    """The constraints whose bounds a program computes. It must return them; otherwise they stay tracers."""
    return {
        name: constraint
        for name, constraint in allowed.items()
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(constraint))
    }


def _declared(
    guide_key: Array, prior_key: Array, model: Any, guide: Callable, args: tuple
) -> dict[str, dict[str, Any]]:
    """The parameter sites of one run of guide and prior, those of the guide first."""
    guide_trace = handlers.trace(handlers.seed(guide, guide_key)).get_trace(*args)
    prior = handlers.replay(handlers.seed(model.prior, prior_key), guide_trace)
    prior_trace = handlers.trace(handlers.substitute(prior, data=_parameters(guide_trace))).get_trace()
    return {n: s for t in (guide_trace, prior_trace) for n, s in t.items() if s["type"] == "param"}


def run_once(function: Callable, *args: Any) -> Any:
    """One compiled run, with few optimisations: they would take much longer than they save."""
    inside = any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)
    )  # JAX accepts compiler options only for outermost programs
    return jax.jit(function, compiler_options=None if inside else options())(*args)


def _check_start(like: Parameters, start: Parameters) -> None:
    """Raise `ValueError` unless `start` has the names, the trees and the shapes of `like`."""
    if set(start) != set(like):
        wrong = sorted(set(start) ^ set(like))[0]
        problem = "lacks" if wrong in like else "has, besides the parameters of this guide and prior,"
        near = difflib.get_close_matches(wrong, set(start if wrong in like else like), n=1, cutoff=0.0)
        raise ValueError(f"the start {problem} {wrong!r}; nearest is {near[0] if near else 'nothing'!r}")
    for name, value in like.items():
        wanted, got = (jax.tree.map(jnp.shape, tree) for tree in (value, start[name]))
        if wanted != got:
            raise ValueError(f"the start of {name!r} must have shape {wanted}; got {got}")


def _parameters(trace: dict) -> dict[str, Array]:
    return {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
