"""Sequential Monte Carlo on a scale of the prior, where quadrature has the answer."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bnlora as bl
from bnlora.data.batch import Batch
from bnlora.infer.mcmc import smc
from bnlora.infer.mcmc.smc import _needed
from bnlora.infer.mcmc.target import Target
from bnlora.program.density import density
from bnlora.testing import tiny_base, tiny_rows

ROWS, INPUTS, SIZE = 200, 16, 250
RANDOM = np.random.default_rng(0)
H = RANDOM.normal(size=(ROWS, INPUTS)) / 4
Y = 2 * H @ RANDOM.normal(size=INPUTS) + RANDOM.normal(size=ROWS)


class Scaled:
    """y = tau (b_1 - b_0) H a + e, the margins of an adapter of rank one under a shared scale."""

    base = SimpleNamespace(weights=None)

    def prior(self, *args):
        tau = numpyro.sample("tau", dist.HalfNormal(5.0))
        b = numpyro.sample("b", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        a = numpyro.sample("a", dist.Normal(jnp.zeros(INPUTS), 1.0).to_event(1))
        return tau * (b[1] - b[0]) * a

    def __call__(self, params, batch, n_total=None):
        mean = jnp.asarray(H) @ self.prior()
        numpyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=jnp.asarray(Y))


class Regression(Target):
    """Its likelihood is normal, not that of label words."""

    def log_likelihood(self, vector, inputs):
        x = self.view.sites(vector)
        mean = jnp.asarray(H) @ (x["tau"] * (x["b"][1] - x["b"][0]) * x["a"])
        return dist.Normal(mean, 1.0).log_prob(jnp.asarray(Y)).sum()


def exact():
    """Mean and standard deviation of tau, and the log evidence.

    Given c = tau d with d = |b_1 - b_0|, half-normal, y is normal with covariance c^2 H H^T + I, so that a
    grid over tau and d has them all.
    """
    values, vectors = np.linalg.eigh(H @ H.T)
    turned = (vectors.T @ Y) ** 2
    c = np.exp(np.linspace(np.log(1e-8), np.log(250), 4000))
    variance = np.maximum(values, 0) * c[:, None] ** 2 + 1
    likelihood = -0.5 * (np.log(2 * np.pi * variance) + turned / variance).sum(1)
    log_tau, d = np.linspace(np.log(1e-4), np.log(30), 1500), (np.arange(400) + 0.5) / 50
    tau = np.exp(log_tau)
    log_p = np.interp(np.log(np.outer(tau, d)), np.log(c), likelihood)
    log_p += (np.log(2) - 0.5 * np.log(2 * np.pi * 25) - tau**2 / 50 + log_tau)[:, None]
    log_p += np.log(2) - 0.5 * np.log(2 * np.pi * 2) - d**2 / 4
    weights = np.exp(log_p - log_p.max())
    evidence = log_p.max() + np.log(weights.sum() * (log_tau[1] - log_tau[0]) * (d[1] - d[0]))
    share = weights.sum(1) / weights.sum()
    mean = share @ tau
    return mean, np.sqrt(share @ tau**2 - mean**2), evidence


@pytest.mark.slow
def test_a_scale_of_the_prior_is_that_of_quadrature():
    batch = Batch(jnp.zeros((ROWS, 1), int), jnp.ones((ROWS, 1), bool), jnp.zeros(ROWS, int))
    made = Regression(density(Scaled(), {}), batch, batch)
    stage = jax.jit(smc._stage(made, {"num_integration_steps": 8, "target_ess": 0.5}))

    def run(seed, limits):
        return smc._run(jax.random.key(seed), made, stage, SIZE, 0.5, limits, lambda power: None)

    mean, sd, evidence = exact()
    runs = [run(seed, (5, 100)) for seed in range(6)]
    means = np.array([np.exp(np.asarray(r.particles.positions[:, 0])).mean() for r in runs])
    error = np.hypot(means.std(ddof=1), sd / SIZE**0.5) / len(runs) ** 0.5
    assert abs(means.mean() - mean) < 4 * error
    assert error < 0.1 * sd  # runs of too few moves were off by 0.6 sd
    found = np.array([float(r.particles.log_evidence) for r in runs])
    assert abs(found.mean() - evidence) < 4 * found.std(ddof=1) / len(runs) ** 0.5 + 0.5 * found.var(ddof=1)
    assert all(max(r.moves) > 20 for r in runs)
    assert run(0, (5, 5)).correlation > 0.9


def test_moves_follow_what_the_last_ones_left():
    """Each move keeps a share of the correlation: 5 that leave 0.9 keep 0.9^(1/5) each, and 33 leave half."""
    assert _needed(5, 0.9, (5, 100)) == int(np.ceil(5 * np.log(0.5) / np.log(0.9))) == 33
    assert _needed(5, 0.9, (5, 20)) == 20
    assert _needed(40, 0.01, (5, 100)) == 7
    assert _needed(40, -0.1, (5, 100)) == 5
    assert _needed(40, 1.0, (5, 100)) == 100


def test_runs_of_a_killed_process_are_read_and_the_others_made(tmp_path, monkeypatch):
    """The particles are those of an unbroken call; files that were cut short or are of others are refused."""
    base = tiny_base(jax.random.key(1), num_layers=1)
    model = bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5))
    rows, sizes = tiny_rows(jax.random.key(2), 6), {"num_runs": 2, "num_draws": 12}

    def sampled(key=0, **options):
        return bl.sample_smc(jax.random.key(key), model, rows, **sizes, folder=tmp_path, **options)

    made = []

    def run(key, density, stage, num_draws, *_):
        """In the place of all stages, which take long to compile: a function of the key, like them."""
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return smc._Run(smc._start(density, num_draws, key), (1, 2), 0.25)

    monkeypatch.setattr(smc, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        sampled()
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "draws-00000.npz"}
    again = sampled()
    assert len(made) == 3  # the second run, and not the first one again
    whole = bl.sample_smc(jax.random.key(0), model, rows, **sizes)
    for name in ("log_evidence", "correlation", "moves"):
        assert again.record[name] == whole.record[name]
    np.testing.assert_array_equal(again.vectors, whole.vectors)
    with pytest.raises(ValueError, match="holds the pieces of another run .*key"):
        sampled(key=1)
    with pytest.raises(ValueError, match="holds the pieces of another run .*step_size"):
        sampled(step_size=0.25)
    path = tmp_path / "draws-00001.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="draws-00001.npz' is corrupt .*; remove it to draw it again"):
        sampled()
