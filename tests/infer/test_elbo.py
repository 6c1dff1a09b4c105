"""The bound against exact evidence, numpyro's other estimator, finite differences and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders.slopes import assert_slopes
from builders.thorough import sample_of
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from bnlora import guides, priors
from bnlora.infer.svi.elbo import elbo_terms, initial_parameters
from bnlora.priors import gp
from bnlora.program.draws import adapters_at, draw_adapters, draw_sites
from bnlora.testing import linear_gaussian, maximise_bound

SIGMA, SHAPE = 0.8, (3, 4)


def toy(inducing="frames", rows=2, cols=3):
    program = partial(
        priors.sparse_gp_matrices,
        "w",
        (1, *SHAPE),
        sigma=SIGMA,
        plate="layer",
        rows=rows,
        cols=cols,
        inducing=inducing,
    )
    return linear_gaussian(jax.random.key(0), program, shape=SHAPE)


def estimates(model, guide, params, size=400, seed=1):
    draw = jax.jit(jax.vmap(lambda k: elbo_terms(k, params, model, guide)))
    return {n: np.asarray(x) for n, x in draw(jax.random.split(jax.random.key(seed), size)).items()}


def optimise(model, guide, steps=1500, rate=0.02, learn=lambda name: True):
    return maximise_bound(jax.random.key(2), model, guide, num_steps=steps, learning_rate=rate, learn=learn)


def mean_and_error(x):
    return x.mean(), x.std(ddof=1) / len(x) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("inducing", sample_of(["frames", "bases"], ["frames"]))
def test_fitted_flow_bound_stays_below_the_exact_evidence(inducing):
    model = toy(inducing)
    guide = guides.SiteFlow(model.prior)
    params = optimise(model, guide)
    bound, error = mean_and_error(estimates(model, guide, params)["elbo"])
    assert bound + 4 * error < model.log_evidence(SIGMA)


def test_learning_the_sides_tightens_the_bound():
    model = toy()
    guide = guides.SiteFlow(model.prior)
    fixed = optimise(model, guide, learn=lambda name: ".q." in name)
    learned = optimise(model, guide)
    low, low_error = mean_and_error(estimates(model, guide, fixed)["elbo"])
    high, high_error = mean_and_error(estimates(model, guide, learned)["elbo"])
    assert high - low > 4 * np.hypot(low_error, high_error)


@pytest.mark.slow
def test_bound_equals_evidence_where_the_family_contains_the_posterior():
    """A full-covariance Gaussian over (V, E) holds the posterior, so log p / q is one constant."""
    with jax.enable_x64(True):
        model = toy("bases")
        guide = AutoMultivariateNormal(model.prior, init_loc_fn=guides.init_to_base)
        params = optimise(model, guide, steps=6000, rate=0.03, learn=lambda name: name.startswith("auto"))
        bound, error = mean_and_error(estimates(model, guide, params)["elbo"])
    exact = model.log_evidence(SIGMA)
    assert bound - 4 * error < exact
    assert exact - bound < 0.02 + 4 * error


def test_full_inducing_matrix_at_lam_one_reaches_the_evidence():
    """k_r = d_o, k_c = d_i, P near I, lam = 1, full covariance over V: nothing is left to lose."""
    with jax.enable_x64(True):
        program = partial(
            priors.sparse_gp_matrices,
            "w",
            (1, *SHAPE),
            sigma=SIGMA,
            plate="layer",
            reliability=1 - 1e-6,
        )
        model = linear_gaussian(jax.random.key(0), program, shape=SHAPE)
        size = SHAPE[0] * SHAPE[1]

        def guide(*_):
            loc = numpyro.param("loc", jnp.zeros(size))
            tril = numpyro.param("tril", 0.3 * jnp.eye(size), constraint=dist.constraints.lower_cholesky)
            with numpyro.plate("layer", 1):
                V = dist.MultivariateNormal(loc[None], scale_tril=tril[None])
                reshape = dist.transforms.ReshapeTransform(SHAPE, (size,))
                numpyro.sample("w.V", dist.TransformedDistribution(V, reshape))
                numpyro.sample("w.E", dist.Normal(jnp.zeros((1, *SHAPE)), 1.0).to_event(2))

        params = optimise(model, guide, steps=6000, rate=0.03, learn=lambda name: name in ("loc", "tril"))
        bound, error = mean_and_error(estimates(model, guide, params)["elbo"])
    assert abs(bound - model.log_evidence(SIGMA)) < 0.02 + 4 * error


@pytest.mark.slow
def test_analytic_and_sampled_conditional_kl_agree_in_mean():
    model = toy()
    guide = guides.SiteFlow(model.prior, lam_init=0.5)
    start, constrain = initial_parameters(jax.random.key(5), model, guide)
    params = constrain(start)
    analytic, error = mean_and_error(estimates(model, guide, params, size=4000)["elbo"])
    by_draws = jax.jit(jax.vmap(lambda k: -Trace_ELBO().loss(k, params, model, guide)))
    sampled = by_draws(jax.random.split(jax.random.key(6), 4000))
    other, other_error = mean_and_error(np.asarray(sampled))
    assert abs(analytic - other) < 4 * np.hypot(error, other_error)


def test_terms_add_up_and_the_conditional_kl_is_the_closed_form():
    model = toy()
    guide = guides.SiteFlow(model.prior, lam_init=0.03)
    start, constrain = initial_parameters(jax.random.key(7), model, guide)
    terms = estimates(model, guide, constrain(start), size=10)
    np.testing.assert_allclose(
        terms["elbo"], terms["data"] - terms["inducing_kl"] - terms["conditional_kl"], rtol=1e-5
    )
    expected = gp.conditional_kl(SHAPE[0] * SHAPE[1], jnp.array(0.03))
    np.testing.assert_allclose(terms["conditional_kl"], expected, rtol=1e-5)


def test_inducing_kl_of_an_identity_flow_is_the_gaussian_closed_form():
    model = toy()
    guide = guides.SiteFlow(model.prior)
    start, constrain = initial_parameters(jax.random.key(8), model, guide)
    params = constrain(start)
    params["w.V.q.flow"] = jax.tree.map(jnp.zeros_like, params["w.V.q.flow"])
    loc, scale = params["w.V.q.loc"], 0.7 * jnp.ones_like(params["w.V.q.scale"])
    terms = estimates(model, guide, {**params, "w.V.q.scale": scale}, size=4000)
    expected = jnp.sum(0.5 * (scale**2 + loc**2 - 1) - jnp.log(scale))
    mean, error = mean_and_error(terms["inducing_kl"])
    assert abs(mean - expected) < 4 * error
    np.testing.assert_array_equal(terms["flow_logdet"], 0)


def test_flow_logdet_is_the_difference_between_base_and_flow_densities():
    """For one draw: log q(V) = log q0(v0) - logdet, with log q from the flow's own inverse."""
    model = toy()
    guide = guides.SiteFlow(model.prior)
    start, constrain = initial_parameters(jax.random.key(9), model, guide)
    key = jax.random.key(10)
    params = constrain(start)
    params["w.V.q.flow"] = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(key, x.shape), params["w.V.q.flow"]
    )
    terms = elbo_terms(key, params, model, guide)
    sub = numpyro.handlers.substitute(numpyro.handlers.seed(guide, jax.random.split(key)[1]), params)
    site = numpyro.handlers.trace(sub).get_trace()["w.V"]
    base = dist.Normal(params["w.V.q.loc"], params["w.V.q.scale"]).to_event(2)
    v0 = site["fn"].transforms[0].inv(site["value"])
    expected = site["fn"].log_prob(site["value"]) - base.log_prob(v0)
    np.testing.assert_allclose(terms["flow_logdet"], expected[0], rtol=1e-3)


@pytest.mark.slow
def test_gradient_of_each_term_against_finite_differences():
    """One program has the values and gradients of all terms."""
    with jax.enable_x64(True):
        model = toy()
        guide = guides.SiteFlow(model.prior, lam_init=0.3, init_scale=0.3)
        start, constrain = initial_parameters(jax.random.key(11), model, guide)
        key, terms = jax.random.key(12), ("data", "inducing_kl", "conditional_kl")

        def values(params):
            made = elbo_terms(key, constrain(params), model, guide)
            return jnp.stack([made[term] for term in terms])

        assert_slopes(values, start, tolerance=1e-5)


def test_lam_to_zero_and_scale_to_zero_is_the_deterministic_adapter():
    """W becomes sigma F_r V F_c^T, the same for every draw."""
    model = toy()
    guide = guides.SiteFlow(model.prior)
    start, constrain = initial_parameters(jax.random.key(13), model, guide)
    params = constrain(start)
    params |= {"w.V.q.scale": jnp.full((1, 2, 3), 1e-12), "w.E.q.lam": jnp.full((1,), 1e-12)}
    draws = draw_adapters(jax.random.key(14), model, guide, params, 5)
    np.testing.assert_allclose(draws, jnp.broadcast_to(draws[:1], draws.shape), atol=1e-6)
    sides = [gp.frame_side(params[f"w.{s}.frame"], params[f"w.{s}.reliability"]) for s in ("rows", "cols")]
    V = draw_sites(jax.random.key(15), model, guide, params).sites["w.V"]
    np.testing.assert_allclose(draws[0], SIGMA * gp.conditional_mean(V, *sides), atol=1e-6)
    sites = {"w.V": V, "w.E": jnp.zeros((1, *SHAPE))}
    np.testing.assert_allclose(adapters_at(model, params, sites), draws[0], atol=1e-6)
