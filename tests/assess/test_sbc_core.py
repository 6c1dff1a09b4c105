"""Inferences of a tangent model at fixed scales, their calibration, and calibration under a posterior."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from builders.linearised import BASE, FEW, KEY, ROWS, exact, frames, tangent_of
from scipy import optimize, stats

import bnlora as bl
from bnlora.assess import sbc
from bnlora.assess.sbc.core import (
    LEAST,
    STEP,
    around_mode,
    chain,
    gaussian_inference,
    laplace_inference,
    nuts_inference,
)
from bnlora.metrics.monte_carlo import chain_mcse
from bnlora.prediction.functions import identifiable
from bnlora.priors import learned
from bnlora.program.density import density

TWO = frames("o_proj", "lm_head")
SCALES = {"o_proj": 0.8, "lm_head": 2.0}
THREE = frames("v_proj", "lm_head", label_ids=(3, 5, 9))
LABELS = replace(ROWS, labels=jnp.asarray(np.random.default_rng(0).integers(0, 3, len(ROWS))))
CASES = {
    "coordinates fewer than rows": (TWO, SCALES, ROWS),
    "rows fewer than coordinates": (TWO, SCALES, FEW),
    "three classes": (THREE, {"v_proj": 1.5, "lm_head": 1.0}, LABELS),
}
HEAD = frames("lm_head", size=5)
"""Two rows inform two of its five coordinates."""
SCALE, RARE = 4.0, 1e-3


def drawn(tangent, inference, rows, key=KEY) -> np.ndarray:
    """Draws of the vector of cores, by the coordinates of their adapters."""
    adapters = jax.jit(inference)(key, BASE.weights, tangent.prepare(rows))
    view = density(tangent, {})
    weights = tangent.coordinates(view.adapters(jnp.ones(view.size)))
    return np.asarray(jax.vmap(tangent.coordinates)(adapters) / weights, float)


def moments(around) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the vector."""
    V, centre, gains = (np.asarray(x, float) for x in around[:3])
    return V @ centre, np.eye(len(V)) + (V * (gains**2 - 1)) @ V.T


# ---- Laplace --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("made", "scales", "rows"), CASES.values(), ids=CASES)
def test_mean_and_covariance_are_those_of_laplace(made, scales, rows):
    tangent = tangent_of(made, scale=scales)
    assert_same(tangent, rows, atol=1e-5)


@pytest.mark.thorough
def test_in_double_precision_only_the_rounding_of_the_features_is_left():
    tangent = tangent_of(TWO, scale=SCALES)
    with jax.enable_x64(True):
        assert_same(tangent, ROWS, atol=1e-6)


def assert_same(tangent, rows, atol):
    view, gaussian = density(tangent, {}), bl.laplace(tangent, rows)
    find = jax.jit(lambda weights, batch: around_mode(view, weights, batch))
    mean, covariance = moments(find(BASE.weights, tangent.prepare(rows)))
    np.testing.assert_allclose(mean, gaussian.loc, atol=atol)
    np.testing.assert_allclose(covariance, gaussian.covariance(), atol=atol)


def test_families_of_two_priors_keep_their_scales_and_their_order():
    parts = {"lm_head": bl.priors.core(TWO, scale=2.0), "o.*": bl.priors.core(TWO, scale=0.8)}
    tangent = bl.Tangent(bl.Classifier(BASE, TWO.sites, bl.priors.by_family(parts), label_ids=(3, 5)))
    assert_same(tangent, ROWS, atol=1e-5)


@pytest.mark.parametrize("name", ["coordinates fewer than rows", "rows fewer than coordinates"])
def test_draws_of_laplace_have_its_mean_and_covariance(name):
    made, scales, rows = CASES[name]
    tangent = tangent_of(made, scale=scales)
    draws = drawn(tangent, laplace_inference(tangent, num_draws=20_000), rows)
    gaussian = bl.laplace(tangent, rows)
    assert_drawn(draws, gaussian.loc, gaussian.covariance())


def assert_drawn(draws, mean, covariance):
    """Mean and covariance of independent draws, within their standard errors."""
    variance, count = np.diag(covariance), len(draws)
    z = (draws.mean(0) - mean) / np.sqrt(variance / count)
    assert np.abs(z).max() < stats.norm.isf(RARE / 2 / len(z))
    stderr = np.sqrt((np.outer(variance, variance) + covariance**2) / count)
    z = ((np.cov(draws.T) - covariance) / stderr)[np.triu_indices(len(variance))]
    assert np.abs(z).max() < stats.norm.isf(RARE / 2 / len(z))


def test_the_wrong_one_has_half_the_spread_along_informed_directions_alone():
    tangent = tangent_of(HEAD, scale=SCALE)
    gaussian = bl.laplace(tangent, FEW)
    V = gaussian.affine.vectors
    expected = np.eye(5) + (V * ((0.5 * gaussian.affine.gains) ** 2 - 1)) @ V.T
    draws = drawn(tangent, laplace_inference(tangent, num_draws=20_000, spread=0.5), FEW)
    assert_drawn(draws, gaussian.loc, expected)


# ---- NUTS and the fitted Gaussian on two rows, against quadrature ---------------------------------------


@pytest.fixture(scope="module")
def grid():
    """Tangent model, directions that two rows inform, and their posterior on a fine grid."""
    tangent = tangent_of(HEAD, scale=SCALE)
    linear = exact(tangent, FEW, {"lm_head": SCALE})
    V = np.linalg.svd(linear.design[:, 0], full_matrices=False)[2].T
    axis = np.linspace(-8, 8, 401)
    c = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log = linear.log_likelihood(c @ V.T) + stats.norm.logpdf(c).sum(1)
    return tangent, V, c, log - np.logaddexp.reduce(log)


def test_nuts_has_the_moments_of_quadrature_and_draws_of_the_prior_elsewhere(grid):
    tangent, V, c, log = grid
    inference = nuts_inference(tangent, num_draws=1500)
    u = np.stack([drawn(tangent, inference, FEW, key) for key in jax.random.split(KEY, 4)])
    found, weights = u @ V, np.exp(log)
    mean = weights @ c
    sd = np.sqrt(weights @ (c - mean) ** 2)
    for_mean, for_sd = chain_mcse(found)
    assert (np.abs(found.mean((0, 1)) - mean) < 4 * for_mean).all()
    assert (np.abs(found.reshape(-1, 2).std(0) - sd) < 4 * for_sd).all()
    # The posterior is skewed, so that Laplace's Gaussian is told from it.
    assert (np.abs(V.T @ bl.laplace(tangent, FEW).loc - mean) > 8 * for_mean).any()
    rest = u.reshape(-1, 5) @ np.linalg.svd(V.T)[2][2:].T
    limit = stats.norm.isf(RARE / 2 / 9) / len(rest) ** 0.5
    assert np.abs(rest.mean(0)).max() < limit
    assert np.abs(np.cov(rest.T) - np.eye(3)).max() < limit * 2**0.5
    assert np.abs(np.corrcoef(rest.T, found.reshape(-1, 2).T)[:3, 3:]).max() < limit


@pytest.mark.thorough
def test_draws_of_a_chain_are_nearly_independent():
    tangent = tangent_of(frames("v_proj", "lm_head", size=5), scale=3.0)
    view, count = density(tangent, {}), 2000

    def run(key, weights, batch):
        return chain(key, around_mode(view, weights, batch), count, 50, 4, STEP)

    z, report = jax.jit(run)(KEY, BASE.weights, tangent.prepare(ROWS))
    assert report.acceptance.mean() > LEAST
    assert not report.divergent.any()
    for values in (np.asarray(z, float), np.asarray(z, float) ** 2):
        x = (values - values.mean(0)) / values.std(0)
        lag = (x[1:] * x[:-1]).mean(0)
        # A correlation of 0.1 leaves four draws in five; the rest is the error of an estimate.
        assert np.abs(lag).max() < 0.1 + stats.norm.isf(RARE / 2 / len(lag)) / count**0.5


@pytest.mark.thorough
def test_a_chain_that_hardly_moves_is_not_taken_for_draws():
    tangent = tangent_of(HEAD, scale=SCALE)
    inference = nuts_inference(tangent, num_draws=20, num_warmup=0, step_size=8.0)
    assert np.isnan(drawn(tangent, inference, FEW)).all()


def gap(mean, covariance, c, log) -> float:
    """KL divergence of a Gaussian of c from the posterior on the grid, whose cells have 0.04^2."""
    q = stats.multivariate_normal(mean, covariance).logpdf(c) + 2 * np.log(c[1, 1] - c[0, 1])
    return float(np.exp(q) @ (q - log))


@pytest.mark.thorough
def test_the_fitted_gaussian_comes_near_the_best_one(grid):
    tangent, V, c, log = grid
    gaussian = bl.laplace(tangent, FEW)
    begin = V.T @ gaussian.loc, V.T @ gaussian.covariance() @ V

    def placed(x):
        root = np.array([[np.exp(x[2]), 0.0], [x[3], np.exp(x[4])]])
        return x[:2], root @ root.T

    root = np.linalg.cholesky(begin[1])
    first = np.array([*begin[0], np.log(root[0, 0]), root[1, 0], np.log(root[1, 1])])
    best = optimize.minimize(lambda x: gap(*placed(x), c, log), first, method="Nelder-Mead").fun
    draws = drawn(tangent, gaussian_inference(KEY, tangent, num_draws=20_000), FEW) @ V
    found = gap(draws.mean(0), np.cov(draws.T), c, log)
    assert best < found < best + 0.2 * (gap(*begin, c, log) - best)


def test_the_fitted_gaussian_starts_at_that_of_laplace():
    tangent = tangent_of(TWO, scale=SCALES)
    inference = gaussian_inference(KEY, tangent, num_draws=20_000, num_steps=1, learning_rate=1e-9)
    gaussian = bl.laplace(tangent, FEW)
    assert_drawn(drawn(tangent, inference, FEW), gaussian.loc, gaussian.covariance())


# ---- calibration ----------------------------------------------------------------------------------------

SMALL = tangent_of(frames("lm_head", size=4), scale=3.0)
EIGHT = SMALL.prepare(ROWS[:8])
NUTS = nuts_inference(SMALL, num_draws=31)


def run(inference, count=100):
    return sbc.run(jax.random.key(5), SMALL, inference, EIGHT, num_simulations=count)


@pytest.mark.slow
def test_nuts_passes():
    """With as many simulations as find half the spread, below."""
    assert run(NUTS).adjusted.min() > RARE


def test_half_the_spread_fails_as_too_narrow():
    result = run(laplace_inference(SMALL, num_draws=31, spread=0.5))
    by_name = dict(zip(result.names, result.adjusted, strict=True))
    assert not result.passed
    assert all(by_name[f"margin[{i}]"] < RARE for i in range(3))
    assert "too narrow" in result.directions


@pytest.fixture(scope="module")
def truths():
    """Draws of the posterior of eight rows."""
    return jax.jit(nuts_inference(SMALL, num_draws=100, thinning=8))(KEY, BASE.weights, EIGHT)


def run_posterior(inference, truths, **options):
    return sbc.run_posterior(jax.random.key(6), SMALL, inference, EIGHT, truths, **options)


@pytest.mark.thorough
def test_nuts_passes_under_the_posterior(truths):
    assert run_posterior(NUTS, truths).adjusted.min() > RARE


@pytest.mark.thorough
def test_whoever_ignores_the_new_labels_is_found_by_the_likelihood_alone(truths):
    """Truths and draws are then both of the first posterior, and exchangeable but for what reads the data."""

    def ignores(key, weights, batch):
        return NUTS(key, weights, batch[: len(batch) // 2])

    result = run_posterior(ignores, truths)
    rejected = [n for n, p in zip(result.names, result.adjusted, strict=True) if p < RARE]
    assert rejected == ["log_likelihood"]


def test_twice_the_spread_fails_under_the_posterior(truths):
    result = run_posterior(laplace_inference(SMALL, num_draws=31, spread=2.0), truths)
    assert result.adjusted.max() < RARE
    margins = [result.names.index(f"margin[{i}]") for i in range(3)]
    assert (result.ranks[:, margins].var(0) < 0.8 * (32**2 - 1) / 12).all()


@pytest.mark.parametrize("model", [SMALL, SMALL.network], ids=["features", "activations"])
def test_the_inference_gets_the_rows_with_their_own_labels_and_with_those_of_the_truth(model, truths):
    seen, prepared = [], model.prepare(EIGHT.plain)

    def record(labels, cached):
        seen.append((np.asarray(labels), np.asarray(cached)))

    def infer(key, weights, batch):
        assert len(batch) == 16
        cached = batch.cached.hidden if batch.features is None else batch.features.phi
        jax.debug.callback(record, batch.labels, cached)
        return jax.tree.map(lambda x: x[:3], truths)

    functions = identifiable(model, prepared[:1])
    sbc.run_posterior(KEY, model, infer, EIGHT.plain, truths, functions=functions)
    jax.effects_barrier()
    labels = np.stack([one for one, _ in seen])
    assert labels.shape == (100, 16)
    assert (labels[:, :8] == np.asarray(EIGHT.labels)).all()
    cached = prepared.cached.hidden if prepared.features is None else prepared.features.phi
    for _, twice in seen[:3]:
        np.testing.assert_allclose(twice, np.concatenate([cached, cached]), atol=1e-5)
    logits = jax.vmap(lambda one: model.logits(BASE.weights, one, prepared))(truths)
    p = np.asarray(jax.nn.softmax(logits)[..., 1], float)
    # Callbacks may come in any order, so the labels are held against the mean over the truths.
    z = (labels[:, 8:].mean(0) - p.mean(0)) / np.sqrt((p * (1 - p)).sum(0)) * len(p)
    assert np.abs(z).max() < stats.norm.isf(RARE / 2 / 8)


# ---- bad input ------------------------------------------------------------------------------------------


def heavy(sites):
    """A prior whose sites have the right names, and cores of another law."""
    U = numpyro.sample("lm_head.U", dist.Laplace(0.0, 1.0).expand([1, 1, 5]).to_event(3))
    frame = HEAD["lm_head"]
    return {"lm_head": {"a": jnp.swapaxes(jnp.asarray(frame.right), 1, 2), "b": jnp.asarray(frame.left) @ U}}


heavy.frames = HEAD


def other(scale) -> bl.Tangent:
    return tangent_of(TWO, scale={"o_proj": 0.8, "lm_head": scale})


INFERENCES = {
    "laplace": lambda model, **options: laplace_inference(model, **{"num_draws": 3} | options),
    "nuts": lambda model, **options: nuts_inference(model, **{"num_draws": 3} | options),
    "gaussian": lambda model, **options: gaussian_inference(KEY, model, **{"num_draws": 3} | options),
}
SITES = "sites of priors.core at fixed scales, o_proj.U, lm_head.U; got"
MISTAKES = {
    "a network": (lambda: SMALL.network, {}, r"a tangent model, bl.Tangent\(classifier\); got a Classifier"),
    "a random scale": (
        lambda: other(dist.HalfNormal(1.0)),
        {},
        f"{SITES} o_proj.U, lm_head.scale, lm_head.U",
    ),
    "a learned scale": (lambda: other(learned(1.0)), {}, f"{SITES} o_proj.U, lm_head.U, lm_head.scale"),
    "another law": (
        lambda: bl.Tangent(bl.Classifier(BASE, HEAD.sites, heavy, label_ids=(3, 5))),
        {},
        "the cores must be standard normal, as those of priors.core are",
    ),
    "no draws": (lambda: SMALL, {"num_draws": 0}, "num_draws must be at least 1; got 0"),
}


@pytest.mark.parametrize("make", INFERENCES.values(), ids=INFERENCES)
@pytest.mark.parametrize(("model", "options", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_what_no_inference_can_take_is_refused(make, model, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make(model(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("laplace", {"spread": 0.0}, "spread must be a positive number; got 0.0"),
        ("nuts", {"thinning": 0}, "thinning must be at least 1; got 0"),
        ("nuts", {"num_warmup": -1}, "num_warmup must be at least 0; got -1"),
        ("nuts", {"step_size": float("nan")}, "step_size must be a positive number; got nan"),
        ("gaussian", {"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ("gaussian", {"learning_rate": -1.0}, "learning_rate must be a positive number; got -1.0"),
    ],
)
def test_bad_options_are_refused(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        INFERENCES[name](SMALL, **options)


def test_bad_input_of_posterior_calibration_gets_one_sentence(truths):
    def refused(sentence, rows=EIGHT, given=truths, **options):
        with pytest.raises(ValueError, match=sentence):
            sbc.run_posterior(KEY, SMALL, NUTS, rows, given, **options)

    one = jax.tree.map(lambda x: x[:1], truths)
    refused("the observed rows have no labels", replace(EIGHT, labels=EIGHT.labels - 1))
    refused("the observed rows must be at least one; got none", EIGHT[:0])
    refused("at least two simulations, one row and a level.*got 1 truths, 8 rows, level=0.05", given=one)
    refused("got 100 truths, 8 rows, level=2", level=2)
    uneven = {"lm_head": truths["lm_head"] | {"a": truths["lm_head"]["a"][:7]}}
    refused(
        "a leading axis of simulations with the same length in all factors; got lengths 7, 100", given=uneven
    )
    refused("layer axis first", given=jax.tree.map(lambda x: x[:, 0], truths))
    refused(
        "the functions must be finite at the truths; not so: bad", functions=lambda *_: {"bad": jnp.log(-1.0)}
    )


def test_a_start_must_have_the_parameters_of_the_guide():
    guide = bl.guides.Guide(SMALL.prior, bl.guides.mean_field())

    def start(key, weights, batch):
        return {"lm_head.U.q.loc": jnp.zeros((1, 1, 4))}

    inference = sbc.svi_inference(
        KEY, SMALL, guide, optax.adam(0.1), num_steps=1, num_draws=3, init_params=start
    )
    with pytest.raises(ValueError, match="the start lacks 'lm_head.U.q.scale'; nearest is 'lm_head.U.q.loc'"):
        inference(KEY, BASE.weights, EIGHT)
