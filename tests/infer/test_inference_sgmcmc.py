"""Stochastic-gradient MCMC against closed forms: of the posterior, and of the discretised chain itself."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bnlora as bl
from bnlora.assess.comparison.compare import UncertifiedReference
from bnlora.data.batch import Batch, CachedActivations, minibatches
from bnlora.infer.approximate import ChainDiverged, Schedule, sghmc, sgld
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
SIGMA, NOISE, N = 0.9, 0.7, 12
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(N, 2)) * [1.5, 0.5]
Y = X @ [0.8, -0.6] + NOISE * RANDOM.normal(size=N)
ROWS = Batch(
    tokens=jnp.zeros((N, 1), jnp.int32),
    mask=jnp.ones((N, 1), bool),
    labels=jnp.zeros(N, jnp.int32),
    cached=CachedActivations(jnp.asarray(np.column_stack([X, Y]), jnp.float32)[:, None, :], depth=0),
)


class Regression:
    """A linear regression on rows of a batch, with the one plate of a classifier: conjugate."""

    base = SimpleNamespace(weights=None)
    num_classes = 2

    def prior(self, *args):
        return numpyro.sample("w", dist.Normal(jnp.zeros(2), SIGMA).to_event(1))

    def __call__(self, params, batch, n_total=None):
        w, rows = self.prior(), len(batch)
        with numpyro.plate("data", n_total, subsample_size=rows if rows < n_total else None):
            mean = batch.cached.hidden[:, 0, :2] @ w
            numpyro.sample("y", dist.Normal(mean, NOISE), obs=batch.cached.hidden[:, 0, 2])


PRECISION = X.T @ X / NOISE**2 + np.eye(2) / SIGMA**2
MEAN = np.linalg.solve(PRECISION, X.T @ Y) / NOISE**2
CURVATURES, AXES = np.linalg.eigh(PRECISION)
START = {"w": jnp.zeros(2)}


def run(sampler, key=KEY, start=START, num_draws=4000, num_warmup=400, batch_size=N, **options):
    schedule = Schedule(num_draws=num_draws, num_warmup=num_warmup, batch_size=batch_size)
    return sampler(key, Regression(), ROWS, schedule, init_values=start, prefix_cache="off", **options)


def assert_moments(chain, variance, factor):
    """Mean and variance along each axis of the posterior, within four standard errors.

    Along an axis the chain is a first-order autoregression with the given factor, which has these errors.
    """
    along = np.asarray(chain.vectors[0], np.float64) @ AXES
    n = len(along)
    mean_error = np.sqrt(variance / n * (1 + factor) / (1 - factor))
    variance_error = variance * np.sqrt(2 / n * (1 + factor**2) / (1 - factor**2))
    assert (np.abs(along.mean(0) - MEAN @ AXES) < 4 * mean_error).all()
    assert (np.abs(along.var(0) - variance) < 4 * variance_error).all()


def test_sgld_has_the_moments_of_the_posterior_with_its_stated_bias():
    """At a step that doubles the variance along the steepest axis, of which the errors allow a tenth."""
    step = 1 / CURVATURES.max()
    variance = 1 / (CURVATURES * (1 - step * CURVATURES / 2))
    assert_moments(run(sgld, step_size=step), variance, 1 - step * CURVATURES)


def sghmc_law(step, friction, updates):
    """Variance of the chain along each axis, and the factor of its autoregression, from its linear map."""
    variance, factor = [], []
    for h in CURVATURES:
        M = np.array([[1, step], [-step * h, 1 - friction * step]])
        powers = [np.linalg.matrix_power(M, k) for k in range(updates + 1)]
        fresh = powers[-1][0, 1] ** 2 + 2 * friction * step * sum(P[0, 1] ** 2 for P in powers[:-1])
        factor.append(powers[-1][0, 0])
        variance.append(fresh / (1 - factor[-1] ** 2))
    return np.array(variance), np.array(factor)


def test_sghmc_has_the_moments_of_its_discretised_chain():
    # Here half the friction would move the variance of one axis by eight of its standard errors.
    step, friction, updates = 0.2 / CURVATURES.max() ** 0.5, 10.0, 20
    chain = run(sghmc, step_size=step, friction=friction, num_integration_steps=updates)
    variance, factor = sghmc_law(step, friction, updates)
    assert_moments(chain, variance, factor)


def test_a_diverged_chain_hands_over_its_finite_draws():
    options = {"num_warmup": 0, "step_size": 50.0}
    with pytest.raises(
        ChainDiverged, match="draws are finite; lower `step_size`, which must stay below 2 ov"
    ) as e:
        run(sgld, num_draws=200, **options)
    chain = e.value.chains
    assert 0 < chain.num_draws < 200
    np.testing.assert_allclose(chain.vectors, run(sgld, num_draws=chain.num_draws, **options).vectors)
    assert chain.sites()["w"].shape == chain.vectors.shape
    assert "diverged: 200 draws of each chain were requested" in repr(chain)


def test_sghmc_is_stable_up_to_friction_over_the_largest_curvature():
    """By half on either side of it, where the square of the step is a quarter of what SGLD allows."""
    steepest = CURVATURES.max()
    step = 0.7 / steepest**0.5
    options = {"num_draws": 100, "num_warmup": 0, "step_size": step, "num_integration_steps": 60}
    assert np.abs(run(sghmc, friction=1.5 * step * steepest, **options).vectors).max() < 100
    with pytest.raises(ChainDiverged, match="`step_size`, which must stay below `friction` over the largest"):
        run(sghmc, friction=0.5 * step * steepest, **options)


def test_minibatches_are_those_of_fit_and_scaled_to_the_data_set():
    """The noise cancels in the difference of two chains; what is left is the product of the curvatures."""
    step, T, B = 0.02, 7, 4
    starts = [{"w": jnp.array(w)} for w in ([0.0, 0.0], [3.0, -2.0])]
    options = {"num_draws": T, "num_warmup": 0, "batch_size": B, "step_size": step}
    first, second = (run(sgld, start=start, **options).vectors[0] for start in starts)
    chain_key = jax.random.split(KEY)[1]
    stream = minibatches(jax.random.split(chain_key)[0], N, B)
    difference = np.array([3.0, -2.0])
    for t in range(T):
        rows = X[next(stream)]
        difference = (
            difference - step * (N / B * rows.T @ rows / NOISE**2 + np.eye(2) / SIGMA**2) @ difference
        )
        np.testing.assert_allclose(second[t] - first[t], difference, atol=1e-4)


def test_thinning_and_burn_in_only_choose_what_is_stored():
    options = {"step_size": 0.02, "init_values": START, "prefix_cache": "off"}
    every, some = (
        sgld(KEY, Regression(), ROWS, schedule, **options).vectors[0]
        for schedule in (Schedule(9, 0, 4), Schedule(2, 3, 4, thinning=3))
    )
    np.testing.assert_allclose(some, every[[5, 8]], rtol=1e-6)


@pytest.mark.slow
def test_minibatch_noise_vanishes_with_the_step():
    """With 4 of 12 rows, the posterior's variances within the errors of the chain and a bias of order eps."""
    step = 0.02 / CURVATURES.max()
    chain = run(sgld, num_draws=60_000, num_warmup=4000, batch_size=4, step_size=step)
    along, factor = chain.vectors[0] @ AXES, 1 - step * CURVATURES
    error = np.sqrt(2 / len(along) * (1 + factor**2) / (1 - factor**2))
    # The variance of a gradient of 4 rows, from shuffled epochs, is below that of independent rows.
    rows = (X @ MEAN - Y)[:, None] * X / NOISE**2
    noise = N**2 / 4 * np.diag(AXES.T @ np.cov(rows.T) @ AXES)
    bias = step * CURVATURES / 2 + step * noise / 2
    assert (np.abs(along.var(0) * CURVATURES - 1) < 4 * error + 2 * bias).all()


@functools.cache
def classifier():
    base = tiny_base(jax.random.key(1), num_layers=1)
    return bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5))


def test_chain_of_a_classifier_predicts_from_stored_draws():
    rows = tiny_rows(jax.random.key(2), 12)
    chain = sgld(KEY, classifier(), rows, Schedule(5, 2, 6), step_size=1e-3)
    assert repr(chain).startswith("Chains(SGLD: 1 chain of 5 draws, every 1, 18 coordinates)")
    assert chain.num_gradients == {"warm-up": 2, "sampling": 5}
    draws = chain.draw_adapters(KEY, 5)["lm_head"]
    stored = chain.sites()
    order = (
        np.argsort(np.asarray(draws["b"])[:, 0, 0, 0]),
        np.argsort(np.asarray(stored["lm_head.b"])[0, :, 0, 0, 0]),
    )
    for factor in ("a", "b"):
        np.testing.assert_allclose(
            draws[factor][order[0]], stored[f"lm_head.{factor}"][0, order[1]], rtol=1e-6
        )
    prediction = bl.predict(KEY, chain, rows, num_draws=4)
    np.testing.assert_allclose(prediction.probs.sum(1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="keep 5 draws; num_draws must be at most that, got 6"):
        chain.draw_adapters(KEY, 6)


def test_a_single_chain_without_an_accept_step_is_no_reference():
    rows = tiny_rows(jax.random.key(2), 12)
    chain = sgld(KEY, classifier(), rows, Schedule(60, 2, 6), step_size=1e-3)
    with pytest.raises(ValueError, match="single chain of SGLD cannot be certified: .*; use bl.sample_nuts"):
        chain.certificate  # noqa: B018  # which is a property
    with pytest.raises(UncertifiedReference, match="SGLD cannot be certified: .* Or, to compare without"):
        bl.compare(KEY, chain, chain, rows)


def test_sghmc_keeps_its_record_and_counts_every_update():
    rows = tiny_rows(jax.random.key(2), 12)
    options = {"step_size": 1e-3, "friction": 2.0, "num_integration_steps": 3}
    chain = sghmc(KEY, classifier(), rows, Schedule(4, 2, 6, thinning=2), **options)
    assert chain.record["options"] == options
    assert (chain.record["sampler"], chain.record["bias"], chain.thinning) == ("SGHMC", "step", 2)
    assert chain.num_gradients == {"warm-up": 6, "sampling": 24}
    assert chain.target.train.cached is None  # the cache is not kept


def test_bad_input():
    with pytest.raises(ValueError, match="step_size must be a positive number; got 0"):
        run(sgld, step_size=0)
    with pytest.raises(ValueError, match="friction . step_size must be at most 1; got 2, lower friction to"):
        run(sghmc, step_size=0.2, friction=10.0)
    with pytest.raises(ValueError, match="num_draws must be at least 1; got 0"):
        Schedule(0, 0, 4)
    for sampler, options in ((sgld, {}), (sghmc, {"friction": 1.0})):
        with pytest.raises(ValueError, match=f"rows; got {N + 1} for {N} rows, nearest is {N}"):
            run(sampler, step_size=0.1, batch_size=N + 1, **options)
    with pytest.raises(ValueError, match="num_warmup must be at least 0; got -1"):
        Schedule(1, -1, 4)
    with pytest.raises(ValueError, match="prefix_cache must be one of .*; got 'disk'"):
        sgld(KEY, Regression(), ROWS, Schedule(1, 0, 4), step_size=0.1, prefix_cache="disk")
