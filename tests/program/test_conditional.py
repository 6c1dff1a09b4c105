"""Classifiers with fixed sites: the same density as the whole model, from a trunk that is computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bnlora as bl
from bnlora.prediction.functions import evaluate, identifiable
from bnlora.program.cache import cache_prefix
from bnlora.program.conditional import condition, matching
from bnlora.program.density import density
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=3)
ROWS = tiny_rows(jax.random.key(2), 7)


def pooled(sites):
    """A scale that all families share, so that fixed sites still inform it."""
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    adapters = bl.priors.normal(scale=0.7)(sites)
    with numpyro.plate("shrunk", 2):
        shift = numpyro.sample("shift", dist.Normal(0.0, tau))
    return {n: {"a": x["a"], "b": tau * x["b"] + shift[0]} for n, x in adapters.items()}


def classifier(prior=None, targets=("q_proj", "k_proj", "lm_head")):
    sites = bl.select(BASE, list(targets), rank=2)
    return bl.Classifier(BASE, sites, prior or bl.priors.normal(scale=0.7), label_ids=(3, 5))


def split(model, names):
    """A vector of the whole model, its constrained values, and those of the named sites."""
    view = density(model, {})
    vector = 0.5 * jax.random.normal(KEY, (view.size,))
    values = view.sites(vector)
    return view, vector, {n: values[n] for n in names}


CASES = {
    "the head is free": (["q_proj.a", "q_proj.b", "k_proj.a", "k_proj.b"], 3),
    "the queries are free": (["k_proj.a", "k_proj.b", "lm_head.a", "lm_head.b"], 0),
}


@pytest.mark.parametrize(("names", "first_layer"), CASES.values(), ids=CASES)
def test_density_and_gradient_are_those_of_the_whole_model(names, first_layer):
    model = classifier()
    view, vector, fixed = split(model, names)
    conditional = condition(model, fixed)
    assert conditional.first_layer == first_layer
    part = density(conditional, {})
    free = part.vector({n: x for n, x in view.sites(vector).items() if n not in fixed})
    rows = cache_prefix(conditional, ROWS)
    assert (rows.cached and rows.cached.depth) == (first_layer or None)

    def whole(u):
        sites = {**view.sites(vector), **part.sites(u)}
        return view.log_joint(view_vector(view, sites), BASE.weights, ROWS)

    ours, gradient = jax.jit(jax.value_and_grad(lambda u: part.log_joint(u, BASE.weights, rows)))(free)
    theirs, expected = jax.jit(jax.value_and_grad(whole))(free)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def view_vector(view, sites):
    """The vector of normal sites, whose supports are the whole line."""
    return jnp.concatenate([jnp.ravel(sites[n]) for n in view.shapes])


def test_fixed_sites_still_inform_what_is_free():
    model = classifier(pooled)
    view, vector, fixed = split(model, ["shift"])
    conditional = condition(model, fixed)
    part = density(conditional, {})
    assert "shift" not in part.shapes
    assert "tau" in part.shapes
    free = part.vector({n: x for n, x in view.sites(vector).items() if n != "shift"})
    tau = float(view.sites(vector)["tau"])
    moved = free.at[0].add(0.5)
    assert list(part.shapes)[0] == "tau"
    log_prior = jax.jit(part.log_prior)
    gain = log_prior(moved) - log_prior(free)
    new = tau * np.exp(0.5)
    expected = (
        float(jnp.sum(dist.Normal(0.0, new).log_prob(fixed["shift"])))
        - float(jnp.sum(dist.Normal(0.0, tau).log_prob(fixed["shift"])))
        + float(dist.HalfNormal(1.0).log_prob(new) - dist.HalfNormal(1.0).log_prob(tau))
        + 0.5  # log-determinant of the exponential
    )
    np.testing.assert_allclose(gain, expected, rtol=1e-4)
    assert conditional.first_layer == 0  # the scale moves every layer


def test_layers_below_the_free_ones_are_part_of_the_trunk():
    model = classifier()
    _, _, fixed = split(model, ["q_proj.a", "q_proj.b", "k_proj.a", "k_proj.b"])
    conditional = condition(model, fixed)
    assert set(conditional.fixed) == set(fixed)
    assert conditional.moving == ("lm_head",)
    rows = cache_prefix(conditional, ROWS)
    adapters = jax.tree.map(lambda x: x[None], density(conditional, {}).adapters(jnp.ones(2 * 16 + 2 * 2)))
    by_draw = jax.jit(conditional.outputs_by_draw)
    cached = by_draw(BASE.weights, adapters, rows)
    np.testing.assert_allclose(cached, by_draw(BASE.weights, adapters, ROWS), atol=1e-6)
    of_model = jax.jit(model.outputs_by_draw)(BASE.weights, adapters, ROWS)
    np.testing.assert_allclose(cached, of_model, atol=1e-5)
    names, values = evaluate(identifiable(conditional, ROWS[:1]), conditional, adapters, ROWS)
    assert names == ("log_likelihood", "margin[0]", "norm[lm_head]")
    assert values.shape == (1, 3)


def test_activations_under_other_fixed_values_are_not_reused():
    """Two conditionals of one depth have different trunks below it."""
    model = classifier(targets=("q_proj", "lm_head"))
    _, _, fixed = split(model, ["q_proj.a", "q_proj.b"])
    other = {n: 2 * x for n, x in fixed.items()}
    first, second = (condition(model, values) for values in (fixed, other))
    assert first.first_layer == second.first_layer == 3
    rows = cache_prefix(first, ROWS)
    hidden = jax.jit(second.hidden)
    np.testing.assert_allclose(hidden(BASE.weights, rows), hidden(BASE.weights, ROWS), atol=1e-6)
    assert cache_prefix(first, rows) is rows
    assert cache_prefix(second, rows) is not rows
    free = {n: jnp.ones((1, *x)) for n, x in model.sites["lm_head"].shapes.items()}
    drawn = {
        "q_proj": {n: jnp.ones((1, *x)) for n, x in model.sites["q_proj"].shapes.items()},
        "lm_head": free,
    }
    held = first.trunk.held(drawn)
    for factor in ("a", "b"):
        np.testing.assert_array_equal(held["q_proj"][factor][0], fixed[f"q_proj.{factor}"])
        np.testing.assert_array_equal(held["lm_head"][factor], free[factor])


def test_nothing_to_fix_is_the_model_itself():
    model = classifier()
    assert condition(model, {}) is model


def test_patterns_choose_sites():
    latent = ("tau", "q_proj.a", "q_proj.b", "lm_head.a.V", "lm_head.a.E", "lm_head.b")
    assert matching(latent, ["lm_head"]) == ("lm_head.a.V", "lm_head.a.E", "lm_head.b")
    assert matching(latent, ["lm_head.a", "tau"]) == ("tau", "lm_head.a.V", "lm_head.a.E")
    assert matching(latent, [r".*\.V"]) == ("lm_head.a.V",)
    with pytest.raises(ValueError, match="'lm_hed' matches no latent site; nearest are lm_head.b"):
        matching(latent, ["lm_hed"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"q_pro.a": jnp.zeros(3)}, "matches no latent site; nearest are q_proj.a"),
        ({"q_proj.a": jnp.zeros(3)}, r"'q_proj.a' needs shape \(3, 2, 16\); got \(3,\)"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        condition(classifier(), values)


def test_fixing_everything_is_refused():
    model = classifier()
    _, _, fixed = split(model, list(density(model, {}).shapes))
    with pytest.raises(ValueError, match="leave at least one free"):
        condition(model, fixed)
