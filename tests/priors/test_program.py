"""What a prior program declares, and what it observes or weighs itself, against a prior written without that.

w ~ N(0, 1) with a factor N(m; w, s^2) is, up to the constant N(m; 0, 1 + s^2), w ~ N(m / (1 + s^2), s^2 /
(1 + s^2)): the same posterior, and evidences that differ by the log of that constant.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from builders.diagnosed import BASE, exact, inputs, problem
from numpyro.distributions import constraints
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import AutoNormal
from scipy.special import logsumexp
from scipy.stats import norm
from scipy.stats import t as student

import bnlora as bl
from bnlora.assess.diagnostics import divergence, khat
from bnlora.infer.mcmc.elliptical import normal_moments
from bnlora.infer.svi.elbo import elbo_terms, initial_parameters
from bnlora.priors.declared import declared, weighed
from bnlora.program.density import density

KEY = jax.random.key(0)
M, S = 1.5, 0.8
CONSTANT = norm(0, np.hypot(1, S)).logpdf(M)
CENTRE, SPREAD = M / (1 + S**2), S / np.hypot(1, S)


def by_factor(w):
    numpyro.factor("belief", dist.Normal(w, S).log_prob(M).sum())


def by_two_factors(w):
    """The same in two halves, one of them scaled as in a power prior."""
    with numpyro.handlers.scale(scale=0.5):
        for name in ("one", "two"):
            numpyro.factor(name, dist.Normal(w, S).log_prob(M).sum())


def by_observation(w):
    numpyro.sample("belief", dist.Normal(w[0, 0, 0], S), obs=M)


def nothing(w):
    pass


def model_of(law, weigh):
    def prior(sites):
        w = numpyro.sample("lm_head.b", law.expand([1, 1, 1]).to_event(3))
        weigh(w)
        b = jnp.concatenate([jnp.zeros_like(w), w], axis=1)
        return {"lm_head": {"a": inputs(1, 0.0), "b": b}}

    return bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))


WEIGHED = {"factor": by_factor, "scaled factors": by_two_factors, "observed site": by_observation}
PLAIN = model_of(dist.Normal(CENTRE, SPREAD), nothing)
MODELS = {name: model_of(dist.Normal(0.0, 1.0), weigh) for name, weigh in WEIGHED.items()}
TRAIN = problem(scale=1.0, rank=1, rows=40).train


def fitted(model, num_steps=12):
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.3))
    return bl.fit(KEY, model, guide, TRAIN, optax.adam(0.05), num_steps=num_steps, batch_size=len(TRAIN))


def fitted_law(made):
    return dist.Normal(*(made.params[f"lm_head.b.q.{name}"].item() for name in ("loc", "scale")))


@pytest.fixture(scope="module")
def plain():
    return fitted(PLAIN)


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    return fitted(MODELS[request.param])


def test_what_the_prior_weighs_is_in_its_density():
    plain = density(PLAIN, {})
    vectors = jnp.linspace(-2, 2, 5)[:, None]
    for name, model in MODELS.items():
        view = density(model, {})
        difference = jax.vmap(view.log_prior)(vectors) - jax.vmap(plain.log_prior)(vectors)
        np.testing.assert_allclose(difference, CONSTANT, rtol=1e-5, err_msg=name)
        expected = norm(vectors[:, 0], S).logpdf(M)
        np.testing.assert_allclose(jax.vmap(view.log_observed)(vectors), expected, rtol=1e-5)
        mean, variance = normal_moments(view)  # what elliptical slice sampling draws its ellipses from
        np.testing.assert_allclose((mean[0], variance[0]), (CENTRE, SPREAD**2), rtol=1e-4)
    assert plain.log_observed(vectors[0]) == 0


@pytest.mark.slow
def test_what_the_prior_weighs_is_in_the_priors_part_of_the_bound(made, plain):
    terms = elbo_terms(KEY, plain.params, made.model, made.guide, BASE.weights, TRAIN)
    expected = elbo_terms(KEY, plain.params, plain.model, plain.guide, BASE.weights, TRAIN)
    np.testing.assert_allclose(terms["data"], expected["data"], rtol=1e-6)
    # One draw of the factor estimates its mean; the rest is in closed form.
    placed = numpyro.handlers.substitute(made.guide, data=plain.params)
    draw = numpyro.handlers.seed(placed, jax.random.split(KEY)[1])()["lm_head.b"]
    q = fitted_law(plain)
    by_hand = dist.kl_divergence(q, dist.Normal(0.0, 1.0)) - norm(draw.item(), S).logpdf(M)
    np.testing.assert_allclose(terms["inducing_kl"], by_hand, rtol=1e-4)


@pytest.mark.slow
def test_draws_and_diagnostics_of_a_fit_count_it(made, plain):
    """At the same draws, the log prior is that of the plain prior plus the constant; the rest is equal."""
    still = optax.adam(0.0)
    other = bl.fit(
        KEY,
        made.model,
        made.guide,
        TRAIN,
        still,
        optimisation=bl.Optimisation(scale_optimizer=still),
        num_steps=1,
        batch_size=40,
        init_params=plain.params,
    )
    tree, expected = (bl.to_arviz(KEY, f, TRAIN, num_draws=100) for f in (other, plain))
    log_p = [x["sample_stats"]["log_p"] for x in (tree, expected)]
    np.testing.assert_allclose(log_p[0] - log_p[1], CONSTANT, rtol=1e-3)
    by_site = tree["log_prior"].to_dataset()
    assert set(by_site) == {"lm_head", *density(made.model, {}).observed}
    total = sum(by_site[name] for name in by_site)
    np.testing.assert_allclose(total - expected["log_prior"]["lm_head"], CONSTANT, rtol=1e-3)
    value, wanted = (khat(bl.diagnostics.sample(KEY, f)).overall.value for f in (other, plain))
    np.testing.assert_allclose(value, wanted, atol=1e-3)
    parts = divergence(other)
    error = np.linalg.norm([part.error for part in parts])
    exact_kl = dist.kl_divergence(fitted_law(plain), dist.Normal(CENTRE, SPREAD)) - CONSTANT
    assert abs(sum(part.total for part in parts) - exact_kl) < 4 * error


@pytest.mark.slow
def test_evidence_of_smc_is_that_of_quadrature():
    given = problem(scale=1.0, rank=1, rows=40)
    grid = exact(given, scale=1.0)
    joint = norm(CENTRE, SPREAD).logpdf(grid.grid) + grid.log_likelihood.sum(1)
    evidence = logsumexp(joint) + np.log(grid.grid[1] - grid.grid[0])
    mean = (np.exp(joint - logsumexp(joint)) * grid.grid).sum()
    for model, expected in ((PLAIN, evidence), (MODELS["factor"], evidence + CONSTANT)):
        runs = bl.sample_smc(KEY, model, given.train, num_runs=8, num_draws=200, num_moves=2)
        found = np.stack([runs.record["log_evidence"], runs.vectors[..., 0].mean(1)], axis=1)
        score = (found.mean(0) - [expected, mean]) / (found.std(0, ddof=1) / len(found) ** 0.5)
        assert np.all(np.abs(score) < student(len(found) - 1).isf(1e-5))
    assert found[:, 0].std() < 0.1 * abs(CONSTANT)  # or the test could not see the constant


IMPROPER = dist.ImproperUniform(constraints.positive, (), ())


def with_improper(**infer):
    def prior(sites):
        tau = numpyro.sample("tau", IMPROPER, infer=infer)
        w = numpyro.sample("lm_head.b", dist.Normal(0.0, 1.0).expand([1, 1, 1]).to_event(3))
        return {"lm_head": {"a": inputs(1, 0.0), "b": tau * jnp.concatenate([jnp.zeros_like(w), w], axis=1)}}

    return bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))


def test_an_improper_law_works_where_a_density_is_enough():
    model = with_improper(init=0.7)
    view = density(model, {})
    found = view.sites(view.start(KEY))
    np.testing.assert_allclose(found["tau"], 0.7, rtol=1e-5)
    vector = jnp.array([0.3, -0.5])
    np.testing.assert_allclose(
        view.log_prior(vector), norm.logpdf(-0.5) + 0.3, rtol=1e-5
    )  # log |d tau / du| = u
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.1))
    made = one_step(model, guide)
    loc, scale = (float(made.params[f"tau.q.{name}"]) for name in ("loc", "scale"))
    np.testing.assert_allclose(loc, np.log(0.7), rtol=1e-5)
    drawn = bl.diagnostics.sample(made.draw_key, made, num_draws=40)
    log_tau = np.log(np.asarray(drawn.drawn[0].sites["tau"], np.float64))
    expected = norm.logpdf(np.asarray(drawn.drawn[0].sites["lm_head.b"])).ravel()
    np.testing.assert_allclose(drawn.drawn[0].log_prior, expected, rtol=1e-4)
    log_q = norm(loc, scale).logpdf(log_tau) - log_tau
    np.testing.assert_allclose(drawn.drawn[0].log_q_of["tau"], log_q, rtol=1e-3)
    with pytest.raises(ValueError, match="'tau' has an improper law, ImproperUniform; use a proper law"):
        assert drawn.prior_adapters
    page = bl.diagnose(made.draw_key, made, TRAIN, num_draws=40)
    assert page["prior predictive"].status == "not asked"
    assert "'tau' has an improper law" in page["prior predictive"].sentence
    assert (page.shrinkage, page.overlap, page.prior_predictive) == (None, None, None)
    assert "nan" not in repr(page)


def one_step(model, guide=None):
    chosen = guide or bl.guides.Guide(model.prior, bl.guides.mean_field())
    return bl.fit(KEY, model, chosen, TRAIN, optax.adam(0.0), num_steps=1, batch_size=40)


def fitted_point(model):
    return one_step(model, bl.guides.Guide(model.prior, bl.guides.delta()))


STARTED, UNSTARTED, OUTSIDE = with_improper(init=1.0), with_improper(), with_improper(init=-1.0)
NO_DRAW, NO_START = (
    "'tau' has an improper law, ImproperUniform; use a proper law",
    "'tau' has .* give it a start value: infer=",
)
WITHOUT = {
    "prior predictive": (lambda: bl.prior_predictive(KEY, STARTED, TRAIN), NO_DRAW),
    "SMC": (lambda: bl.sample_smc(KEY, STARTED, TRAIN), NO_DRAW),
    "start at the prior": (lambda: bl.sample_nuts(KEY, STARTED, TRAIN, init_strategy="prior"), NO_DRAW),
    "simulation": (lambda: bl.sbc.simulate(KEY, STARTED, BASE.weights, TRAIN, {}), NO_DRAW),
    "start of a fit": (lambda: one_step(UNSTARTED), NO_START),
    "start of a chain": (lambda: bl.sample_nuts(KEY, UNSTARTED, TRAIN), NO_START),
    "start outside": (lambda: one_step(OUTSIDE), "the start of 'tau.q.loc' must lie inside its constraint"),
    "factor": (
        lambda: bl.prior_predictive(KEY, MODELS["factor"], TRAIN),
        "ignores its numpyro.factor 'belief', which depends on 'lm_head.b'; write that part",
    ),
    "observed site": (
        lambda: bl.sbc.simulate(KEY, MODELS["observed site"], BASE.weights, TRAIN, {}),
        "ignores its observed site 'belief', which depends on 'lm_head.b'",
    ),
    "Laplace": (
        lambda: bl.approximate.laplace(fitted_point(MODELS["factor"]), TRAIN),
        "needs a prior of independent centred normals",
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_draws_of_the_prior_says_so(name):
    call, message = WITHOUT[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_start_value_may_be_the_guides():
    model = with_improper()
    start = init_to_value(values={"tau": 0.4})
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(), init_loc_fn=start)
    made, constrain = initial_parameters(KEY, model, guide)
    np.testing.assert_allclose(constrain(made)["tau.q.loc"], np.log(0.4), rtol=1e-5)


def test_what_is_observed_and_weighs_nothing_leaves_the_prior_to_be_drawn():
    """As in a classifier with sites held at values: their density is a constant."""
    model = bl.condition(model_of_two(), {"first": jnp.ones(())})
    assert weighed(model.prior) == {}
    assert declared(model.prior).observed["first"].law == "Normal"
    assert bl.prior_predictive(KEY, model, TRAIN[:4], num_draws=4).logits.shape == (4, 4, 2)


def model_of_two():
    def prior(sites):
        first = numpyro.sample("first", dist.Normal(0.0, 1.0))
        w = first * numpyro.sample("lm_head.b.z", dist.Normal(0.0, 1.0).expand([1, 1, 1]).to_event(3))
        return {"lm_head": {"a": inputs(1, 0.0), "b": jnp.concatenate([jnp.zeros_like(w), w], axis=1)}}

    return bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))


def named(name, kind="sample"):
    def prior(sites):
        if kind == "plate":
            with numpyro.plate(name, 3):
                numpyro.sample("tau", dist.HalfNormal(1.0))
        elif kind == "param":
            numpyro.param(name, jnp.ones(()))
        elif kind == "deterministic":
            numpyro.deterministic(name, jnp.ones(()))
        elif kind == "discrete":
            numpyro.sample(name, dist.Bernoulli(0.5))
        else:
            numpyro.sample(name, dist.HalfNormal(1.0))
        return bl.priors.normal()(sites)

    return bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))


NAMED = {
    "label": (named("y"), "must not use the name 'y', which belongs to the labels that the model observes"),
    "label as a parameter": (named("y", "param"), "must not use the name 'y'"),
    "label as a value": (named("y", "deterministic"), "must not use the name 'y'"),
    "plate over rows": (
        named("data", "plate"),
        "name 'data', which belongs to the model's plate over the rows",
    ),
    "site like the plate": (named("data"), "must not use the name 'data'"),
    "no name": (named(""), "every site of the prior needs a name"),
    "discrete": (
        named("k", "discrete"),
        "must be continuous; 'k' is Bernoulli.*: sum it out in the prior, as dist.MixtureSameFamily and "
        "priors.spike_and_slab do",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_of_others_and_discrete_sites_are_refused_before_anything_runs(name):
    model, message = NAMED[name]
    with pytest.raises(ValueError, match=message):
        bl.fit(KEY, model, AutoNormal(model.prior), TRAIN, optax.adam(0.1), num_steps=1, batch_size=40)
    for sample in (bl.sample_nuts, bl.sample_smc):
        with pytest.raises(ValueError, match=message):
            sample(KEY, model, TRAIN)
    if "discrete" not in name:
        with pytest.raises(ValueError, match=message):
            bl.prior_predictive(KEY, model, TRAIN)


def test_a_name_that_a_guide_has_for_its_parameter_is_refused():
    message = "must not use the name 'lm_head.b.q.loc', which belongs to a guide's parameter of 'lm_head.b'"
    for kind in ("sample", "param"):
        model = named("lm_head.b.q.loc", kind)
        with pytest.raises(ValueError, match=message):
            initial_parameters(KEY, model, AutoNormal(model.prior))
    with pytest.raises(ValueError, match=message):
        bl.guides.Guide(named("lm_head.b.q.loc").prior, bl.guides.mean_field())
