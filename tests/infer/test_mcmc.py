"""Markov chains against closed forms, importance sampling, NumPyro's own sampler, and themselves."""

import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from builders.thorough import sample_of
from numpyro.infer import MCMC, NUTS

import bnlora as bl
from bnlora.assess.prior_draws import draw_prior
from bnlora.data.batch import Batch
from bnlora.infer import mcmc
from bnlora.infer.mcmc.certificate import autocorrelation
from bnlora.infer.mcmc.elliptical import normal_moments
from bnlora.infer.mcmc.hamiltonian import _method
from bnlora.infer.mcmc.pieces import Pieces
from bnlora.infer.mcmc.run import Plan, run
from bnlora.infer.mcmc.samplers import Hmc, Nuts
from bnlora.infer.mcmc.target import Target
from bnlora.metrics.monte_carlo import chain_mcse
from bnlora.prediction.functions import evaluate, identifiable, log_likelihood
from bnlora.program.conditional import condition
from bnlora.program.density import density
from bnlora.program.draws import adapters_at
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
SIGMA, NOISE, N = 0.9, 0.7, 12
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(N, 3)) * [1.5, 0.5, 0.1]
Y = X @ [0.8, -0.6, 0.3] + NOISE * RANDOM.normal(size=N)
PRECISION = X.T @ X / NOISE**2 + np.eye(3) / SIGMA**2
MEAN = np.linalg.solve(PRECISION, X.T @ Y) / NOISE**2
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS = tiny_rows(jax.random.key(2), 12)


class Regression:
    """A linear regression: conjugate."""

    base = SimpleNamespace(weights=None)

    def prior(self, *args):
        return numpyro.sample("w", dist.Normal(jnp.zeros(3), SIGMA).to_event(1))

    def __call__(self, params, batch, n_total=None):
        w = self.prior()
        numpyro.sample("y", dist.Normal(jnp.asarray(X) @ w, NOISE).to_event(1), obs=jnp.asarray(Y))


def conjugate():
    batch = Batch(jnp.zeros((N, 1), int), jnp.ones((N, 1), bool), jnp.zeros(N, int))
    return Target(density(Regression(), {}), batch, batch)


@cache  # a model keeps its programs
def classifier(prior=None, targets=("lm_head",), rank=1):
    sites = bl.select(BASE, list(targets), rank=rank)
    return bl.Classifier(BASE, sites, prior or bl.priors.normal(scale=1.0), label_ids=(3, 5))


def moments(values):
    """Mean, standard deviation and their Monte Carlo standard errors, by function."""
    mean_error, sd_error = chain_mcse(values)
    return values.mean((0, 1)), values.std((0, 1)), mean_error, sd_error


def assert_agree(first, second):
    """Means and spreads within 4 standard errors of their difference."""
    mean, sd, mean_error, sd_error = moments(first)
    other, other_sd, other_mean_error, other_sd_error = moments(second)
    assert np.all(np.abs(mean - other) < 4 * np.hypot(mean_error, other_mean_error))
    assert np.all(np.abs(sd - other_sd) < 4 * np.hypot(sd_error, other_sd_error))


@pytest.mark.parametrize(
    ("kind", "mass"),
    [
        (Nuts(), "diagonal"),
        pytest.param(Nuts(), "dense", marks=pytest.mark.thorough),
        pytest.param(Hmc(8), "diagonal", marks=pytest.mark.thorough),
        (Hmc(8), "dense"),
    ],
)
def test_conjugate_posterior_is_the_closed_form(kind, mass):
    target = conjugate()
    method = _method(kind, 500, 0.9, mass, 0.1)
    chains = run(KEY, target, method, Plan(4, 1000), jnp.zeros((4, 3)), None)
    values = chains.vectors.astype(np.float64)
    mean, sd, mean_error, sd_error = moments(values)
    assert np.all(np.abs(mean - MEAN) < 4 * mean_error)
    assert np.all(np.abs(sd - np.sqrt(np.diag(np.linalg.inv(PRECISION)))) < 4 * sd_error)
    # The covariance is the mean of products about the known mean, with the standard error of these chains.
    centred = values - MEAN
    products = (centred[..., :, None] * centred[..., None, :]).reshape(*values.shape[:2], 9)
    covariance, _, error, _ = moments(products)
    assert np.all(np.abs(covariance - np.linalg.inv(PRECISION).ravel()) < 4 * error)
    assert chains.stats["divergent"].sum() == 0
    assert 0.8 < chains.stats["acceptance"].mean() <= 1
    assert chains.num_gradients["warm-up"] > 2000


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    model = classifier()
    options = {"num_warmup": 30, "num_draws": 12, "piece": 4, "num_chains": 2}
    whole = mcmc.sample_nuts(KEY, model, ROWS, **options)
    mcmc.sample_nuts(KEY, model, ROWS, folder=tmp_path, **options)
    (tmp_path / "draws-00002.npz").unlink()
    (tmp_path / "draws-00001.npz").unlink()
    again = mcmc.sample_nuts(KEY, model, ROWS, folder=tmp_path, **options)
    np.testing.assert_array_equal(again.vectors, whole.vectors)
    for name, value in whole.stats.items():
        np.testing.assert_array_equal(again.stats[name], value)
    with pytest.raises(ValueError, match="pieces of another run .*num_warmup.*pass the same arguments"):
        mcmc.sample_nuts(KEY, model, ROWS, folder=tmp_path, **{**options, "num_warmup": 31})
    with pytest.raises(ValueError, match="pieces of another run .*target"):
        mcmc.sample_nuts(KEY, model, ROWS[:9], folder=tmp_path, **options)


def test_pieces_of_another_run_or_place_are_refused(tmp_path):
    about = {"sampler": "none", "options": {}, "plan": {}, "versions": {}, "log_density": [-10.0]}

    def opened(name, **changes):
        return Pieces.open(tmp_path / name, about | {"key": [0, 0]} | changes, conjugate(), jnp.zeros((1, 3)))

    def piece(scale):
        return lambda: (scale * jnp.ones(3), jnp.arange(2))

    one, other = opened("one"), opened("other", key=[0, 1])
    for pieces in (one, other):
        for index in range(2):
            pieces.draws(index, piece(index))
    np.testing.assert_array_equal(opened("one").draws(1, piece(5))[0], np.ones(3))  # as it was stored
    first, second = (tmp_path / "one" / f"draws-{i:05d}.npz" for i in range(2))
    kept = first.read_bytes()
    for wrong in (second, tmp_path / "other" / first.name):
        shutil.copy(wrong, first)
        with pytest.raises(ValueError, match="another piece, or of another run; remove it"):
            one.draws(0, piece(0))
    first.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match="draws-00000.npz' is corrupt .*; remove it"):
        one.draws(0, piece(0))
    np.savez(first, leaf0=np.full(3, 7, np.float32), leaf1=np.arange(2, dtype=np.int32))  # as before the mark
    np.testing.assert_array_equal(one.draws(0, piece(0))[0], np.full(3, 7))
    np.savez(first, leaf0=np.zeros(4, np.float32), leaf1=np.arange(2, dtype=np.int32))
    with pytest.raises(ValueError, match="of another run; remove it"):
        one.draws(0, piece(0))
    opened("one", log_density=[-10.001])
    with pytest.raises(ValueError, match=r"another run \(log_density: \[-10.0\] then, \[-11.0\] now\)"):
        opened("one", log_density=[-11.0])
    (tmp_path / "one" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json' is corrupt"):
        opened("one")


def test_an_interrupt_hands_over_what_was_drawn(monkeypatch):
    target, method = conjugate(), _method(Hmc(4), 50, 0.8, "diagonal", 0.1)
    plan, starts = Plan(2, 20, piece=5), jnp.zeros((2, 3))
    whole = run(KEY, target, method, plan, starts, None)
    plain = Pieces.draws

    def interrupted(self, index, compute):
        if index == 2:
            raise KeyboardInterrupt
        return plain(self, index, compute)

    monkeypatch.setattr(Pieces, "draws", interrupted)
    part = run(KEY, target, method, plan, starts, None)
    np.testing.assert_array_equal(part.vectors, whole.vectors[:, :10])
    assert "interrupted: 20 draws of each chain were requested" in repr(part)
    assert "interrupted" not in repr(whole)


def test_a_fit_of_another_prior_is_refused():
    model, other = classifier(), classifier(bl.priors.sparse_gp(rows=2, cols=4))
    guide = bl.guides.Guide(other.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, other, guide, ROWS, optax.adam(1e-2), num_steps=1, batch_size=12)
    with pytest.raises(ValueError, match="fit of the same prior; it has no site 'lm_head.a', only"):
        mcmc.sample_nuts(KEY, model, ROWS, given=fit)


SCRIPT = """
import sys
import jax
import bnlora as bl
from bnlora.infer import mcmc
from bnlora.testing import tiny_base, tiny_rows

base = tiny_base(jax.random.key(1), num_layers=2)
sites = bl.select(base, ["lm_head"], rank=1)
model = bl.Classifier(base, sites, bl.priors.normal(scale=1.0), label_ids=(3, 5))
mcmc.sample_nuts(
    jax.random.key(0),
    model,
    tiny_rows(jax.random.key(2), 12),
    folder=sys.argv[1],
    num_warmup=50,
    num_draws=1200,
    piece=20,
)
"""


@pytest.mark.thorough
def test_a_killed_process_loses_no_piece_and_changes_no_draw(tmp_path):
    """SIGKILL in the middle of a run, then again in another process: the draws of an unbroken run."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"

    killed = subprocess.Popen([sys.executable, "-c", SCRIPT, broken])
    try:
        deadline = time.monotonic() + 300
        while len(list(broken.glob("draws-*.npz"))) < 3:
            assert killed.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no piece was written"
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
    finally:
        killed.kill()
        killed.wait()
    before = {p.name: p.read_bytes() for p in broken.glob("draws-*.npz")}
    assert 3 <= len(before) < 60
    options = {"num_warmup": 50, "num_draws": 1200, "piece": 20}
    again, unbroken = (
        mcmc.sample_nuts(KEY, classifier(), ROWS, folder=folder, **options) for folder in (broken, whole)
    )
    assert all((broken / name).read_bytes() == data for name, data in before.items())
    assert all((whole / name).read_bytes() == data for name, data in before.items())
    np.testing.assert_array_equal(again.vectors, unbroken.vectors)


def weighted_pool(key, model, rows, *, chunks=20, size=16384):
    """Prior draws of the adapters by chunks, with the log-likelihood of the rows at each."""
    weigh = jax.jit(
        lambda weights, x: jax.lax.map(lambda a: log_likelihood(model, weights, a, rows), x, batch_size=512)
    )
    pools, weights = [], []
    for k in jax.random.split(key, chunks):
        pool = draw_prior(k, model, {}, size, num_together=512)
        pools.append(jax.tree.map(np.asarray, pool))
        weights.append(np.asarray(weigh(model.base.weights, pool), np.float64))
    return jax.tree.map(lambda *x: np.concatenate(x), *pools), np.concatenate(weights)


def exact_values(weighted, model, rows, functions):
    """Functions at 2,000 draws of importance resampling from a weighted pool, as four chains."""
    pool, log_weights = weighted
    share = np.exp(log_weights - log_weights.max())
    share /= share.sum()
    assert 1 / (share**2).sum() > 2000  # so that resampling repeats few
    picked = np.random.default_rng(0).choice(len(share), 2000, p=share)
    adapters = jax.tree.map(lambda x: jnp.asarray(x[picked]), pool)
    _, values = evaluate(functions, model, adapters, rows)
    return values.reshape(4, 500, -1)


@cache
def pool_of_the_plain_model():
    return weighted_pool(jax.random.key(5), classifier(), ROWS)


@pytest.fixture(scope="module")
def exact():
    model = classifier()
    return exact_values(pool_of_the_plain_model(), model, ROWS, identifiable(model, ROWS[:8]))


@cache
def nuts():
    """Chains that three tests compare with others."""
    return mcmc.sample_nuts(KEY, classifier(), ROWS, num_warmup=300, num_draws=500, thinning=3)


SAMPLERS = {
    "NUTS": lambda model: nuts(),
    "NUTS from the prior, dense": lambda model: mcmc.sample_nuts(
        KEY, model, ROWS, num_warmup=300, num_draws=500, thinning=3, init_strategy="prior", mass="dense"
    ),
    "HMC from Pathfinder": lambda model: mcmc.sample_hmc(
        KEY,
        model,
        ROWS,
        num_integration_steps=8,
        num_warmup=300,
        num_draws=500,
        thinning=3,
        init_strategy="pathfinder",
    ),
    "elliptical slice": lambda model: mcmc.sample_elliptical(
        KEY, model, ROWS, num_draws=500, steps_per_draw=40
    ),
    "SMC": lambda model: mcmc.sample_smc(KEY, model, ROWS, num_draws=500),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(SAMPLERS, ("NUTS", "elliptical slice", "SMC")))
def test_every_exact_sampler_agrees_with_importance_sampling(name, exact):
    chains = SAMPLERS[name](classifier())
    _, values = chains.values()
    assert_agree(values, exact)


@pytest.mark.slow
def test_evidence_of_smc_is_that_of_importance_sampling():
    """log of the mean likelihood under the prior, with the delta method's standard error."""
    model = classifier()
    chains = mcmc.sample_smc(KEY, model, ROWS, num_draws=1000)
    _, log_weights = pool_of_the_plain_model()
    weights = np.exp(log_weights - log_weights.max())
    expected = np.log(weights.mean()) + log_weights.max()
    error = weights.std() / weights.mean() / len(weights) ** 0.5
    found = np.array(chains.record["log_evidence"])
    assert abs(found.mean() - expected) < 4 * np.hypot(error, found.std(ddof=1) / len(found) ** 0.5)


@pytest.mark.slow
def test_microcanonical_draws_are_close_and_never_certified():
    model = classifier()
    chains = mcmc.sample_mclmc(KEY, model, ROWS, num_draws=500)
    certificate = chains.certificate
    assert not certificate.passed
    assert "no accept step" in certificate.failures[-1]
    _, values = chains.values()
    _, reference = nuts().values()
    shift = np.abs(values.mean((0, 1)) - reference.mean((0, 1))) / reference.std((0, 1))
    assert shift.max() < 0.15  # its bias is no error to be tested away; a broken kernel is far beyond this


@pytest.mark.thorough
def test_inducing_variables_are_auxiliary():
    """HMC over (V, E) and HMC over W with its marginal N(0, sigma^2) give one posterior of B A and logits."""
    sparse = classifier(bl.priors.sparse_gp(rows=2, cols=4, scale=1.5, frames=jax.random.key(9)))
    plain = classifier(bl.priors.normal(scale=1.5))
    guide = bl.guides.Guide(sparse.prior, bl.guides.mean_field(init_scale=0.1))
    fit = bl.fit(KEY, sparse, guide, ROWS, optax.adam(1e-2), num_steps=50, batch_size=12)
    options = {"num_warmup": 300, "num_draws": 500, "thinning": 2, "target_acceptance": 0.9}
    auxiliary = mcmc.sample_nuts(KEY, sparse, ROWS, given=fit, **options)
    direct = mcmc.sample_nuts(jax.random.key(7), plain, ROWS, **options)
    assert {n.rsplit(".", 1)[-1] for n in auxiliary.target.view.shapes} == {"V", "E"}
    assert_agree(auxiliary.values()[1], direct.values()[1])


@pytest.mark.slow
def test_numpyros_own_sampler_agrees():
    model = classifier()
    sampler = MCMC(NUTS(model), num_warmup=300, num_samples=1500, num_chains=1, progress_bar=False)
    sampler.run(jax.random.key(3), BASE.weights, ROWS)
    drawn = {n: jnp.asarray(x) for n, x in sampler.get_samples().items()}
    adapters = jax.lax.map(lambda x: adapters_at(model, {}, x), drawn)
    names, values = evaluate(identifiable(model, ROWS[:8]), model, adapters, ROWS)
    chains = nuts()
    assert names == chains.values()[0]
    assert_agree(values.reshape(1, 1500, -1), chains.values()[1])


@pytest.mark.slow
def test_some_sites_alone_with_the_others_held():
    model = classifier(targets=("q_proj", "lm_head"))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.1))
    fit = bl.fit(KEY, model, guide, ROWS, optax.adam(1e-2), num_steps=100, batch_size=12)
    options = {"num_warmup": 200, "num_draws": 300, "thinning": 3, "num_chains": 2}
    chains = mcmc.sample_hmc(
        KEY, model, ROWS, sites=["lm_head"], given=fit, num_integration_steps=8, **options
    )
    assert chains.model.first_layer == 2
    assert chains.target.train.tokens.shape == (12, 1)  # the head reads the last position alone
    assert "q_proj.a, q_proj.b held at the mean of 256 draws of a fit" in repr(chains)
    names, values = chains.values()
    assert "norm[q_proj]" not in names
    fixed = {n: chains.model.fixed[n] for n in ("q_proj.a", "q_proj.b")}
    functions = identifiable(chains.model, ROWS[:8])
    held = condition(model, fixed)
    reference = exact_values(weighted_pool(jax.random.key(5), held, ROWS), held, ROWS, functions)
    assert_agree(values, reference)


def one_direction(sites):
    """A single number moves the head, so the posterior is one-dimensional and nearly normal."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    shapes = sites["lm_head"].shapes
    b = jnp.zeros(shapes["b"]).at[0, 1, 0].set(w)
    return {"lm_head": {"a": jnp.full(shapes["a"], 0.25), "b": b}}


EASY = {"one number": one_direction, "normal": bl.priors.normal(scale=1.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(EASY, ["one number"]))
def test_defaults_are_certified_on_easy_problems(name):
    """Neighbours in one dimension are correlated, and the effective number suffices all the same."""
    chains = mcmc.sample_nuts(KEY, classifier(EASY[name]), ROWS)
    assert chains.certificate.passed, chains.certificate.verdict
    step = chains.certificate.keep_every
    assert step > 1
    _, values = chains.thin(step).values()
    # The estimate for so many draws has an error of 1 / sqrt(draws).
    assert autocorrelation(values).max() < 0.05 + 4 / (4 * (1000 // step)) ** 0.5


def test_starts_and_options_are_checked():
    model = classifier()
    wrong = {
        "init_strategy='fit' needs `given`": {"init_strategy": "fit"},
        "init_strategy must be one of": {"init_strategy": "pathfindr"},
        "mass must be one of": {"mass": "full"},
        r"target_acceptance must lie in \(0, 1\); got 1.5": {"target_acceptance": 1.5},
        "num_warmup must be at least 20": {"num_warmup": 3},
        r"`piece` must divide num_draws=10; got 3 .nearest valid: 2": {"num_draws": 10, "piece": 3},
        "nearest is 'num_chains'": {"num_chain": 2},
        "sites must be a list": {"sites": "lm_head"},
        "'lm_hed' matches no latent site; nearest are lm_head": {"sites": ["lm_hed"]},
        "pass `given`, a fit": {"sites": ["lm_head.a"]},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            mcmc.sample_nuts(KEY, model, ROWS, **options)


def test_elliptical_slices_need_a_normal_prior():
    mean, variance = normal_moments(density(classifier(bl.priors.normal(scale=0.5)), {}))
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    assert set(np.round(variance, 4)) == {round(0.25 / 16, 4), 0.25}  # width-scaled A, and B
    with pytest.raises(ValueError, match="prior is normal with independent entries"):
        mcmc.sample_elliptical(KEY, classifier(bl.priors.laplace(scale=1.0)), ROWS)


def test_thinning_keeps_the_last_draw_and_every_report():
    target = conjugate()
    chains = run(KEY, target, _method(Hmc(4), 50, 0.8, "diagonal", 0.1), Plan(2, 20), jnp.zeros((2, 3)), None)
    thin = chains.thin(3)
    np.testing.assert_array_equal(thin.vectors, chains.vectors[:, [4, 7, 10, 13, 16, 19]])
    assert thin.thinning == 3
    assert thin.stats["divergent"].shape == (2, 20)
    with pytest.raises(ValueError, match="leave four of 20 draws; got 6"):
        chains.thin(6)
    with pytest.raises(ValueError, match="keep 40 draws"):
        chains.draw_adapters(KEY, 41)


def test_a_start_without_density_is_refused():
    target = conjugate()
    starts = jnp.zeros((2, 3)).at[1, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="not finite where chain 1 starts"):
        run(KEY, target, _method(Hmc(4), 50, 0.8, "diagonal", 0.1), Plan(2, 20), starts, None)
