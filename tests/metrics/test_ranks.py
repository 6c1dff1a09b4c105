"""The tests of uniform ranks, compared with enumerated null distributions and with SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, ks_2samp

from bnlora.metrics import ranks

RANDOM = np.random.default_rng


def least_tail(sample, num_draws):
    """The statistic of `uniformity` by its definition."""
    tails = []
    for j in range(1, num_draws + 1):
        count, z = sum(r < j for r in sample), j / (num_draws + 1)
        tails += [binom.cdf(count, len(sample), z), binom.sf(count - 1, len(sample), z)]
    return min(tails)


def test_uniformity_is_exact():
    """Every p-value is the share of all 4^5 equally likely rank vectors with a statistic as extreme."""
    num_draws, size = 3, 5
    every = list(itertools.product(range(num_draws + 1), repeat=size))
    statistics = {}
    for sample in every:  # the statistic knows no order
        key = tuple(sorted(sample))
        if key not in statistics:
            statistics[key] = least_tail(key, num_draws)
    values = np.array([statistics[tuple(sorted(sample))] for sample in every])
    for sample, statistic in statistics.items():
        expected = (values <= statistic * (1 + 1e-9)).mean()
        np.testing.assert_allclose(ranks.uniformity(np.array(sample), num_draws), expected, atol=1e-12)


def test_symmetry_is_exact():
    """Every p-value is the share of all sign flips of p - 1/2 with a distance as great, by scipy."""
    num_draws = 6
    for sample in ([0, 1, 1, 4, 6, 6, 5, 3], [6, 6, 5, 6, 4, 4, 5, 6], [3, 3, 3, 3, 3], [0, 6, 1, 5, 2, 4]):
        sample = np.array(sample)

        def distance(r):
            return ks_2samp(2 * r - num_draws, num_draws - 2 * r).statistic  # integers: ties stay ties

        def flipped(signs, sample=sample):
            return np.where(np.array(signs) > 0, sample, num_draws - sample)

        got, p_value = ranks.symmetry(sample, num_draws)
        np.testing.assert_allclose(got, distance(sample), atol=1e-12)
        every = [distance(flipped(signs)) for signs in itertools.product([-1, 1], repeat=len(sample))]
        np.testing.assert_allclose(p_value, np.mean(np.array(every) >= got - 1e-9), atol=1e-12)


def test_walk_beyond_a_distance_in_closed_form():
    """All on one side: the walk reaches n in 2 of 2^n ways."""
    assert ranks.symmetry(np.arange(51, 63), 100)[1] == pytest.approx(2 * 0.5**12)


@pytest.fixture(scope="module")
def null_ranks():
    return RANDOM(0).integers(0, 64, (600, 100))


@pytest.fixture(scope="module")
def null_p_values(null_ranks):
    return {
        "uniformity": np.array([ranks.uniformity(r, 63) for r in null_ranks]),
        "symmetry": np.array([ranks.symmetry(r, 63)[1] for r in null_ranks]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("test", ["uniformity", "symmetry"])
def test_p_values_are_uniform_under_the_null(null_p_values, test):
    """At most a share `level` of p-values is below `level`, and not much less despite discreteness."""
    p_values = null_p_values[test]
    for level in (0.01, 0.05, 0.2, 0.5, 0.8):
        error = (level * (1 - level) / len(p_values)) ** 0.5
        assert (p_values <= level).mean() <= level + 3.5 * error
        assert (p_values <= level).mean() >= 0.75 * level - 3.5 * error


def test_the_two_sample_table_rejects_symmetry_too_often(null_ranks, null_p_values):
    """p and 1 - p are one sample: the usual Kolmogorov-Smirnov p-value is not valid for them."""
    theirs = np.array([ks_2samp(r / 63, 1 - r / 63, method="asymp").pvalue for r in null_ranks])
    ours = null_p_values["symmetry"]
    error = (0.05 * 0.95 / len(ours)) ** 0.5
    assert (theirs <= 0.05).mean() > 0.05 + 3.5 * error
    assert (ours <= 0.05).mean() < 0.05 + 3.5 * error


def test_bands_hold_what_they_promise(null_ranks, null_p_values):
    """Coverage by simulation, and agreement with the p-value: outside means rejected."""
    bounds = ranks.band(100, 63, level=0.9)
    points = np.round(bounds.z * 64)
    inside = []
    for sample in null_ranks:
        below = (sample[:, None] < points).mean(0)
        inside.append(bool(((below >= bounds.low - 1e-12) & (below <= bounds.high + 1e-12)).all()))
    np.testing.assert_array_equal(inside, null_p_values["uniformity"] > 0.1)
    assert 0.9 - 3.5 * (0.09 / 600) ** 0.5 < np.mean(inside) < 0.96


def test_many_draws_are_looked_at_on_a_grid():
    uniform = RANDOM(1).integers(0, 5001, 300)
    assert ranks.uniformity(uniform, 5000) > 0.01
    assert ranks.uniformity(uniform // 2, 5000) < 1e-6
    assert len(ranks.band(300, 5000).z) == ranks.GRID


def test_dispersion_tells_narrow_from_wide():
    ratio, score = ranks.dispersion(np.arange(64), 63)
    assert ratio == pytest.approx(1)
    assert score == pytest.approx(0)
    assert ranks.dispersion(np.array([0, 63] * 20), 63)[1] > 5
    assert ranks.dispersion(np.array([31, 32] * 20), 63)[1] < -5


def test_holm_steps_down():
    np.testing.assert_allclose(ranks.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(ranks.holm(np.array([0.9, 0.8])), [1.0, 1.0])


def test_ties_are_broken_at_random():
    keys = jax.random.split(jax.random.key(0), 2000)
    draws, truth = jnp.array([[0.0], [1.0], [1.0], [2.0]]), jnp.array([1.0])
    found = np.asarray(jax.vmap(lambda k: ranks.rank(k, draws, truth))(keys))[:, 0]
    counts = np.bincount(found, minlength=5)
    assert counts[[0, 4]].sum() == 0
    assert (abs(counts[1:4] - 2000 / 3) < 4 * (2000 * 2 / 9) ** 0.5).all()


def test_ranks_beyond_the_draws_are_refused():
    with pytest.raises(ValueError, match="ranks from 0 to num_draws=5; got 0 to 6"):
        ranks.uniformity(np.array([0, 6]), 5)
    with pytest.raises(ValueError, match="got none"):
        ranks.symmetry(np.array([], int), 5)
