"""Likelihoods of grades, votes, values and texts: densities against scipy, posteriors against quadrature."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.special
import scipy.stats
from builders.thorough import sample_of
from numpyro.infer.util import log_density

import bnlora as bl
from bnlora.data.batch import Choices
from bnlora.prediction.predict import log_likelihood_by_draw, outputs_with_draws
from bnlora.program.adapter_prior import parameters_of
from bnlora.program.likelihoods import Likelihood, Upper, likelihood_from
from bnlora.testing import tiny_base

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=3)
ROWS, LENGTH, SPAN = 12, 10, 6
WORDS = bl.likelihoods.Words((3, 5))
GRADES = 4
RATES = np.array([0.1, 0.4, 0.3, 0.2])
LOCATION, UNIT, INTERCEPT, SCALE, DF = 2.5, 1.5, 0.3, 0.8, 3.0
RANDOM = np.random.default_rng(5)
TOKENS = jnp.asarray(RANDOM.integers(0, BASE.config.vocab_size, (ROWS, LENGTH)))
MASK = jnp.ones((ROWS, LENGTH), bool)
PLAIN = bl.Batch(TOKENS, MASK, jnp.asarray(RANDOM.integers(0, GRADES, ROWS)))
VOTES = jnp.asarray(RANDOM.integers(0, 4, (ROWS, 2)) + np.array([1, 0]), jnp.float32)
VALUES = jnp.asarray(RANDOM.normal(LOCATION, 2.0, ROWS), jnp.float32)


def texts() -> bl.Batch:
    """Rows of one text each, of one to six scored tokens."""
    counts = RANDOM.integers(1, SPAN + 1, ROWS)
    scored = (LENGTH - np.arange(LENGTH) <= counts[:, None])[:, None]
    choices = Choices(jnp.asarray(scored), jnp.ones((ROWS, 1)), SPAN)
    return bl.Batch(TOKENS[:, None], MASK[:, None], jnp.zeros(ROWS, int), choices=choices)


@dataclass(frozen=True)
class Member:
    """A likelihood, rows for it, fixed values of its sites, and its density written with scipy."""

    likelihood: Likelihood
    rows: bl.Batch
    params: dict
    log_prob: Callable[[np.ndarray], np.ndarray]  # of the logits of the vocabulary at all positions


def contrasts(logits: np.ndarray) -> np.ndarray:
    return logits[:, -1, 5] - logits[:, -1, 3]


def ordinal(logits: np.ndarray) -> np.ndarray:
    cuts = scipy.special.logit(RATES.cumsum()[:-1])
    below = scipy.special.expit(cuts - contrasts(logits)[:, None])
    cdf = np.pad(below, ((0, 0), (1, 0))), np.pad(below, ((0, 0), (0, 1)), constant_values=1.0)
    return np.log(cdf[1] - cdf[0])[np.arange(ROWS), np.asarray(PLAIN.labels)]


def soft(logits: np.ndarray) -> np.ndarray:
    second = scipy.special.expit(contrasts(logits))
    votes = np.asarray(VOTES)
    return scipy.stats.binom.logpmf(votes[:, 1], votes.sum(1), second)


def value(noise) -> Callable[[np.ndarray], np.ndarray]:
    def log_prob(logits: np.ndarray) -> np.ndarray:
        loc = LOCATION + UNIT * (INTERCEPT + contrasts(logits))
        return noise.logpdf((np.asarray(VALUES) - loc) / (UNIT * SCALE)) - np.log(UNIT * SCALE)

    return log_prob


TEXTS = texts()


def text(logits: np.ndarray) -> np.ndarray:
    log_probs = scipy.special.log_softmax(logits, axis=-1)[:, :-1]
    own = np.take_along_axis(log_probs, np.asarray(TOKENS)[:, 1:, None], axis=2)[..., 0]
    return np.where(np.asarray(TEXTS.choices.scored)[:, 0, 1:], own, 0.0).sum(1)


VALUE_ROWS = replace(PLAIN, labels=jnp.zeros(ROWS, int), outcomes=VALUES)
NOISE = {"likelihood.intercept": INTERCEPT, "likelihood.scale": SCALE}
REGRESSION = bl.likelihoods.Regression(WORDS, location=LOCATION, unit=UNIT)
MEMBERS = {
    "ordinal": Member(bl.likelihoods.Ordinal(WORDS, GRADES), PLAIN, {"likelihood.rates": RATES}, ordinal),
    "soft labels": Member(
        bl.likelihoods.SoftLabels(WORDS),
        replace(PLAIN, labels=jnp.asarray(np.asarray(VOTES).argmax(1)), outcomes=VOTES),
        {},
        soft,
    ),
    "regression": Member(REGRESSION, VALUE_ROWS, NOISE, value(scipy.stats.norm)),
    "student": Member(
        replace(REGRESSION, noise="student_t", df=DF), VALUE_ROWS, NOISE, value(scipy.stats.t(DF))
    ),
    "texts": Member(bl.likelihoods.Texts(), TEXTS, {}, text),
}
each = pytest.mark.parametrize("name", MEMBERS)


def line(sites):
    """One number along a fixed direction."""
    s = numpyro.sample("s", dist.Normal(0.0, 2.0))
    fixed = {}
    for name, site in sites.items():
        keys = jax.random.split(jax.random.key(len(name)))
        a, b = (jax.random.normal(k, shape) for k, shape in zip(keys, site.shapes.values(), strict=True))
        fixed[name] = {"a": a, "b": s * b}
    return fixed


@cache
def model_of(name: str, modules: tuple[str, ...] = ("lm_head",), prior=line) -> bl.Classifier:
    sites = bl.select(BASE, list(modules), rank=1, layers=slice(-2, None))
    return bl.Classifier(BASE, sites, prior, likelihood=MEMBERS[name].likelihood)


def held(name: str, **options) -> bl.Classifier:
    """The model with the likelihood's own sites at fixed values."""
    params = {site: jnp.asarray(x, jnp.float32) for site, x in MEMBERS[name].params.items()}
    return bl.condition(model_of(name, **options), params)


def log_probs(name: str, s: float) -> np.ndarray:
    """Log-probability of every row's outcome, from the logits of the whole model at all positions."""
    return MEMBERS[name].log_prob(np.asarray(whole_model(name)(s), np.float64))


@cache
def whole_model(name: str) -> Callable[[float], jax.Array]:
    """The logits of the vocabulary at all positions as a function of s, in one program."""
    model = model_of(name)

    @jax.jit
    def logits(s):
        adapters = numpyro.handlers.substitute(numpyro.handlers.seed(model.prior, KEY), {"s": s})()
        head = {f: x[0] for f, x in adapters["lm_head"].items()}
        if name != "texts":  # the likelihood reads the two words only
            rows = jnp.zeros((BASE.config.vocab_size, 1)).at[jnp.array([3, 5])].set(head["b"])
            head = {"a": head["a"], "b": rows}
        scale = {"a": 1.0, "b": model.sites["lm_head"].scale}
        placed = {"lm_head": {f: x[None] * scale[f] for f, x in head.items()}}
        return BASE.module(TOKENS, MASK, adapters=placed)

    return logits


@each
def test_the_density_is_that_of_scipy(name):
    member, model = MEMBERS[name], held(name)
    density = jax.jit(lambda s: log_density(model, (BASE.weights, member.rows), {}, {"s": s})[0])
    at_zero = {site: jnp.asarray(x, jnp.float32) for site, x in member.params.items()}
    seeded = numpyro.handlers.seed(model_of(name).prior, KEY)
    params = numpyro.handlers.trace(numpyro.handlers.substitute(seeded, {"s": 0.0, **at_zero})).get_trace()
    own = sum(float(params[site]["fn"].log_prob(x)) for site, x in at_zero.items())
    for s in (-1.5, 0.0, 0.7):
        expected = log_probs(name, s).sum() + scipy.stats.norm.logpdf(s, 0, 2) + own
        assert float(density(s)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
@each
def test_log_prob_of_outputs_is_the_density_of_the_distribution(name):
    member, model = MEMBERS[name], model_of(name)
    likelihood = member.likelihood
    adapters = numpyro.handlers.seed(model.prior, KEY)()
    logits = jax.jit(model.logits)(BASE.weights, adapters, member.rows)
    params = parameters_of(adapters)
    distribution = likelihood.distribution(logits, params, member.rows)
    assert distribution.batch_shape == (ROWS,)
    expected = distribution.log_prob(likelihood.observed(member.rows))
    outputs = likelihood.outputs(logits, params)
    np.testing.assert_allclose(likelihood.log_prob(outputs, member.rows), expected, rtol=1e-5, atol=1e-5)
    draws = jax.tree.map(lambda x: jnp.stack([x, x]), adapters)
    kept = outputs_with_draws(model, draws, member.rows)
    np.testing.assert_allclose(
        log_likelihood_by_draw(model, kept, member.rows), np.stack([expected] * 2), rtol=1e-5, atol=1e-4
    )
    assert likelihood_from(likelihood.record()) == likelihood


def test_probabilities_of_grades_sum_to_one_far_from_the_cutpoints():
    likelihood = MEMBERS["ordinal"].likelihood
    logits = jnp.array([[0.0, x] for x in (-60.0, -5.0, 0.0, 5.0, 60.0)])
    log_p = likelihood.outputs(logits, {"rates": jnp.asarray(RATES, jnp.float32)})
    np.testing.assert_allclose(jnp.exp(log_p).sum(1), 1.0, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(log_p[2]), RATES, rtol=1e-5)
    # Far below, P(y = c) is pi-odds times exp(eta): the gap of log-probabilities is exact, not cancelled.
    odds = RATES.cumsum()[:-1] / (1 - RATES.cumsum()[:-1])
    expected = np.log(1 / odds[:-1] - 1 / odds[1:]) - 60
    np.testing.assert_allclose(log_p[0, 1:3], expected, rtol=1e-4)
    assert np.isfinite(
        np.asarray(jax.jit(jax.jacobian(lambda x: likelihood.outputs(x, {"rates": RATES})))(logits))
    ).all()


def test_two_grades_with_even_rates_are_the_softmax_of_the_words():
    likelihood = bl.likelihoods.Ordinal(WORDS, 2)
    logits = jax.random.normal(KEY, (5, 2))
    got = likelihood.outputs(logits, {"rates": jnp.array([0.5, 0.5])})
    np.testing.assert_allclose(got, jax.nn.log_softmax(logits), atol=1e-5)


def quadrature(name: str) -> tuple[float, float]:
    """Mean and standard deviation of s given the outcomes."""
    grid = np.linspace(-7, 7, 141)
    log_joint = np.array([log_probs(name, s).sum() for s in grid]) + scipy.stats.norm.logpdf(grid, 0, 2)
    weights = np.exp(log_joint - log_joint.max())
    mean = (weights * grid).sum() / weights.sum()
    return mean, ((weights * (grid - mean) ** 2).sum() / weights.sum()) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(MEMBERS, ["ordinal"]))
def test_nuts_has_the_posterior_of_quadrature(name):
    mean, sd = quadrature(name)
    chains = bl.mcmc.sample_nuts(
        KEY, held(name), MEMBERS[name].rows, num_chains=2, num_warmup=150, num_draws=300
    )
    draws = chains.sites()["s"].ravel()
    # Four standard errors, if at least a sixth of the draws are independent.
    assert abs(draws.mean() - mean) < 4 * sd / (len(draws) / 6) ** 0.5
    assert draws.std() == pytest.approx(sd, rel=0.25)


@pytest.mark.slow
def test_regression_on_the_tangent_model_has_the_gaussian_posterior():
    """With intercept and scale fixed the posterior of the core is Gaussian, in closed form."""
    options = {"likelihood": REGRESSION, "size": 2, "layers": slice(-1, None)}
    frames = bl.frames(KEY, BASE, ["v_proj"], VALUE_ROWS, **options)
    network = bl.Classifier(BASE, frames.sites, bl.priors.core(frames, scale=1.5), likelihood=REGRESSION)
    tangent = bl.condition(bl.Tangent(network), {n: jnp.asarray(x) for n, x in NOISE.items()})
    rows = bl.cache_prefix(tangent, VALUE_ROWS)
    phi = UNIT * np.asarray(rows.features.phi[:, 0], np.float64)
    base = np.asarray(rows.features.offset, np.float64)
    residual = np.asarray(VALUES) - LOCATION - UNIT * (INTERCEPT + base[:, 1] - base[:, 0])
    sd = prior_sd(tangent)
    precision = np.diag(1 / sd**2) + phi.T @ phi / (UNIT * SCALE) ** 2
    mean = np.linalg.solve(precision, phi.T @ residual / (UNIT * SCALE) ** 2)
    chains = bl.mcmc.sample_nuts(KEY, tangent, rows, num_chains=2, num_warmup=200, num_draws=400)
    adapters = chains.draw_adapters(KEY, 800)
    draws = np.asarray(jax.vmap(tangent.coordinates)(adapters))
    error = np.sqrt(np.diag(np.linalg.inv(precision))) / (800 / 8) ** 0.5
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean), 4.5 * error)


def prior_sd(tangent) -> np.ndarray:
    """Standard deviation of every coordinate under the prior: its coordinates at cores of ones."""
    with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=0):
        tangent.prior()
    cores = {n: site for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
    ones = {n: jnp.ones_like(site["value"]) for n, site in cores.items()}
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.substitute(data=ones):
        return np.asarray(tangent.coordinates(tangent.prior()), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(MEMBERS, ["student", "texts"]))
def test_from_a_fit_to_its_file(name, tmp_path):
    rows, model = MEMBERS[name].rows, model_of(name, ("v_proj", "lm_head"), bl.priors.normal())
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    stop = bl.EarlyStopping(every=2, patience=2, num_draws=2)
    fit = bl.fit(
        KEY, model, guide, rows, optax.adam(0.01), num_steps=4, batch_size=6, validation=rows[:4],
        early_stopping=stop,
    )  # fmt: skip
    assert np.isfinite(fit.history["elbo"]).all()
    assert np.isfinite(fit.validation["nll"]).all()
    bl.save_fit(fit, tmp_path / "fit")
    again = bl.load_fit(tmp_path / "fit", model, guide)
    jax.tree.map(np.testing.assert_array_equal, again.train.plain, rows)
    draws = fit.draw_adapters(KEY, 3), again.draw_adapters(KEY, 3)
    outputs = [outputs_with_draws(model, drawn, rows) for drawn in draws]
    np.testing.assert_array_equal(*outputs)
    tree = bl.to_arviz(KEY, fit, rows, num_draws=8)
    assert tree["log_likelihood"]["y"].shape == (4, 2, ROWS)
    own = {site.replace("/", ".") for site in MEMBERS[name].params}
    assert own <= set(tree["posterior"].data_vars)
    assert ("posterior_predictive" in tree.children) == (name != "texts")


@pytest.mark.parametrize("name", sample_of(MEMBERS, ["soft labels"]))
def test_a_bound_in_parts_is_that_of_the_whole_minibatch(name):
    model = model_of(name, ("v_proj",), bl.priors.normal())
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    bounds = [
        bl.fit(
            KEY, model, guide, MEMBERS[name].rows, optax.adam(0.01), num_steps=2, batch_size=6,
            memory=bl.Memory(accumulate=parts),
        ).history["elbo"]
        for parts in (1, 3)
    ]  # fmt: skip
    np.testing.assert_allclose(*bounds, rtol=1e-4)


def test_a_prior_may_bring_the_parameters_of_the_likelihood():
    def mine(sites):
        scale = numpyro.sample("my_noise", dist.LogNormal(0.0, 0.5))
        return {**line(sites), "likelihood": {"intercept": jnp.zeros(()), "scale": scale}}

    model = bl.Classifier(BASE, model_of("regression").sites, mine, likelihood=REGRESSION)
    assert sorted(bl.guides.Guide(model.prior, bl.guides.mean_field()).latent) == ["my_noise", "s"]
    chains = bl.mcmc.sample_nuts(KEY, model, VALUE_ROWS, num_chains=2, num_warmup=20, num_draws=20)
    assert set(chains.sites()) == {"my_noise", "s"}


class Poisson(bl.likelihoods.Likelihood):
    """Counts, as a user writes a likelihood: the log-rate is the contrast of two words."""

    num_classes = 0
    num_logits = 2
    outcome = "value"

    def check(self, base):
        WORDS.check(base)

    def check_rows(self, batch):
        WORDS.check_rows(batch)

    def check_outcomes(self, name, batch):
        if batch.outcomes is None or (np.asarray(batch.outcomes) < 0).any():
            raise ValueError(f"the {name} rows must have counts")

    def sites(self, sites):
        return WORDS.sites(sites)

    def logits(self, upper: Upper, batch):
        return WORDS.logits(upper, batch)

    def distribution(self, logits, params, batch):
        return dist.Poisson(jnp.exp(logits[:, 1] - logits[:, 0]))

    def observed(self, batch):
        return batch.outcomes

    def outputs(self, logits, params):
        return jnp.exp(logits[:, 1:] - logits[:, :1])

    def log_prob(self, outputs, batch):
        return dist.Poisson(outputs[..., 0]).log_prob(batch.outcomes)

    def facts(self, base):
        return {"outcome": "counts"}

    def record(self):
        return {"kind": "counts"}


@pytest.mark.slow
def test_a_likelihood_of_ones_own():
    rows = replace(PLAIN, outcomes=jnp.asarray(RANDOM.poisson(2.0, ROWS)))
    sites = bl.select(BASE, ["lm_head"], rank=1)
    model = bl.Classifier(BASE, sites, bl.priors.normal(), likelihood=Poisson())
    assert "Classifier(values" in repr(model)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, rows, optax.adam(0.01), num_steps=2, batch_size=6)
    assert np.isfinite(fit.history["elbo"]).all()
    assert bl.to_arviz(KEY, fit, rows, num_draws=4)["log_likelihood"]["y"].shape == (4, 1, ROWS)
    chains = bl.mcmc.sample_nuts(KEY, model, rows, num_chains=2, num_warmup=20, num_draws=20)
    assert np.isfinite(chains.vectors).all()


@pytest.mark.thorough  # comparisons and diagnoses read likelihoods through functions that other tests call
@pytest.mark.parametrize("name", ["ordinal", "soft labels"])
def test_grades_and_votes_are_compared_and_grades_are_diagnosed(name):
    rows, model = MEMBERS[name].rows, model_of(name, ("lm_head",), bl.priors.normal())
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, rows, optax.adam(0.02), num_steps=30, batch_size=ROWS)
    if name == "soft labels":
        with pytest.raises(ValueError, match="bl.diagnose compares predictions with one label for each row"):
            bl.diagnose(KEY, fit, rows, num_draws=40)
    else:
        page = str(bl.diagnose(KEY, fit, rows, num_draws=40))
        assert "guessing among 4 classes -16.6" in page  # 12 rows, -12 log 4
    chains = bl.mcmc.sample_nuts(KEY, model, rows, num_chains=2, num_warmup=60, num_draws=150)
    comparison = bl.compare(KEY, fit, chains, rows, num_draws=50, against="anything")
    # Margins of eight rows, by class, the norm of the head and the log-likelihood.
    functions = 8 * (model.num_classes - 1) + 2
    assert f"in {functions} functions" in repr(comparison)


def test_what_needs_classes_says_so():
    model, rows = model_of("regression"), VALUE_ROWS
    point = bl.PointPosterior(model, numpyro.handlers.seed(model.prior, KEY)())
    with pytest.raises(ValueError, match="bl.predict needs a model of classes; got a model of values"):
        bl.predict(KEY, point, rows)
    with pytest.raises(ValueError, match="bl.predict_texts needs a model of texts .*; got a model of values"):
        bl.predict_texts(KEY, point, rows)
    with pytest.raises(ValueError, match="bl.fit_core needs classes whose probabilities are the softmax"):
        bl.fit_core(KEY, BASE, PLAIN, likelihood=MEMBERS["ordinal"].likelihood)
    frames = bl.frames(KEY, BASE, ["v_proj"], PLAIN, likelihood=WORDS, size=2)
    prior, texts = bl.priors.core(frames), bl.likelihoods.Texts()
    language = bl.Classifier(BASE, frames.sites, prior, likelihood=texts)
    with pytest.raises(ValueError, match="a tangent model of texts would be linear in their log-likelihood"):
        bl.Tangent(language)


def test_outcomes_must_fit_the_likelihood():
    def checked(name, **changes):
        MEMBERS[name].likelihood.check_outcomes("training", replace(MEMBERS[name].rows, **changes))

    with pytest.raises(ValueError, match=r"must have votes of shape \(12, 2\), .*; got none"):
        checked("soft labels", outcomes=None)
    with pytest.raises(ValueError, match="votes of the training rows must be at least 0, and not all 0"):
        checked("soft labels", outcomes=VOTES.at[3].set(0.0))
    with pytest.raises(ValueError, match=r"must have one value each, .*; got an array of shape \(12, 2\)"):
        checked("regression", outcomes=VOTES)
    with pytest.raises(ValueError, match="values of the training rows must be finite"):
        checked("regression", outcomes=VALUES.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="labels up to 7, but the model has 4 classes"):
        checked("ordinal", labels=PLAIN.labels.at[0].set(7))
    with pytest.raises(ValueError, match="reads rows of one text with scored tokens"):
        MEMBERS["texts"].likelihood.check_outcomes("training", PLAIN)
    with pytest.raises(ValueError, match="Ordinal reads the contrast of two words, .*; got 3 words"):
        bl.likelihoods.Ordinal(bl.likelihoods.Words((1, 2, 3)), 4)
    with pytest.raises(ValueError, match="SoftLabels reads the logits of classes, .*; got Texts"):
        bl.likelihoods.SoftLabels(bl.likelihoods.Texts())
