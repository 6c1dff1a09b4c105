"""Diagnostics that are functions of draws, against closed forms and simulation."""

import jax
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from bnlora.assess.diagnostics import class_counts, effective_rank, randomised_pit
from bnlora.assess.diagnostics.overlap import overlap_of_draws
from bnlora.assess.diagnostics.shrinkage import spread
from bnlora.assess.diagnostics.tree import tree_of_draws
from bnlora.metrics.monte_carlo import nested_rhat, pareto_k, power_sensitivity, smoothed_weights


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 3.0, 3.0], 3.0), ([5.0, 0.0, 0.0], 1.0), ([2.0, 1.0, 1.0], 2**1.5), ([0.0, 0.0, 0.0], 0.0)],
)
def test_effective_rank_of_known_spectra(values, expected):
    np.testing.assert_allclose(effective_rank(np.array(values)), expected)
    np.testing.assert_allclose(effective_rank(1e-6 * np.array([values, values])), [expected, expected])


@pytest.mark.parametrize("factor", ["a", "b", "update"])
def test_spread_is_that_of_the_entries(factor):
    pair = {"a": random(0).normal(size=(40, 2, 3, 5)), "b": random(1).normal(size=(40, 2, 4, 3))}
    values = {**pair, "update": 0.5 * np.einsum("slor,slri->sloi", pair["b"], pair["a"])}[factor][:, 1]
    expected = np.sqrt(values.var(0, ddof=1).mean())
    got, relative = spread(pair, 1, factor, 0.5)
    np.testing.assert_allclose(got, expected)
    assert 0 < relative < 1


def test_standard_error_of_a_spread_is_that_of_repetitions():
    found = np.array([spread({"a": random(s).normal(size=(100, 1, 1, 4))}, 0, "a", 1.0) for s in range(400)])
    claimed = (found[:, 0] * found[:, 1]).mean()
    # The standard deviation of 400 values has a relative error of 1/sqrt(800), that of a claim is less.
    np.testing.assert_allclose(found[:, 0].std(ddof=1), claimed, rtol=4 / 800**0.5)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (0.0, 3.0)])
def test_overlap_of_two_normals(shift, scale):
    first, second = random(0).normal(size=4000), random(1).normal(shift, scale, size=4000)

    def smaller(x):
        return min(norm.pdf(x), norm.pdf(x, shift, scale))

    expected = quad(smaller, -15, 15, limit=400, points=[-1, 0, 1, shift])[0]
    value, error = overlap_of_draws(first, second)
    # Kernels widen both laws by h^2 / 2 = 1.8 % of their spread, which moves an overlap by less than 0.02.
    assert abs(value - expected) < 4 * error + 0.02
    assert overlap_of_draws(np.exp(first), np.exp(second)) == (value, error)


def test_nested_rhat_of_shifted_normals():
    """Two superchains of equal spread whose means are d apart: (1 + d^2 / 2)^(1/2)."""
    draws = random(0).normal(size=(8, 1000, 2))
    draws[4:, :, 1] += 1.0
    same, shifted = nested_rhat(draws, size=4)
    assert same < 1.01
    np.testing.assert_allclose(shifted, 1.5**0.5, rtol=0.03)


def test_smoothed_weights_sum_to_one_and_keep_the_means():
    draws = random(0).normal(size=4000)
    weights = smoothed_weights(np.stack([np.zeros(4000) + 1e-9 * draws, 0.5 * draws - 0.125], axis=1))
    np.testing.assert_allclose(weights.sum(0), 1.0)
    # exp(x / 2 - 1 / 8) carries N(0, 1) to N(1 / 2, 1); its mean has a variance near e^(1/4) (1 + 1/4) / S.
    assert abs((weights[:, 1] * draws).sum() - 0.5) < 4 * (np.exp(0.25) * 1.25 / 4000) ** 0.5


def test_weights_whose_largest_are_equal_have_no_tail():
    """A posterior that is nearly the guide: float32 leaves a few values of the log-ratio."""
    draws = np.random.default_rng(5).normal(size=400)
    rounded = np.minimum(np.round(draws), 0.0) * 1e-6
    assert pareto_k(rounded) == -np.inf
    assert np.isfinite(pareto_k(np.minimum(draws, 2.0)))
    assert pareto_k(np.where(draws > 0, 0.0, 700 * draws)) == -np.inf
    assert pareto_k(np.where(np.arange(400) < 60, 0.0, -700.0)) == np.inf


def test_power_scaling_of_a_posterior_that_is_the_prior():
    draws = random(0).normal(size=2000)
    tree = tree_of_draws(
        {
            "posterior": {"value": draws[:, None]},
            "log_prior": {"theta": -0.5 * draws**2},
            "log_likelihood": {"y": np.zeros((2000, 3))},
        },
        dims={"value": ["function"], "y": ["row"]},
    )
    assert power_sensitivity(tree, "likelihood")["value"][0] == pytest.approx(0.0, abs=1e-9)
    assert power_sensitivity(tree, "prior")["value"][0] > 0.05


def labels_from(probs: np.ndarray, seed: int) -> np.ndarray:
    return (random(seed).random((len(probs), 1)) > probs.cumsum(1)[:, :-1]).sum(1)


def some_probs(seed: int, rows: int = 300) -> np.ndarray:
    return random(seed).dirichlet([2.0, 1.0, 1.0], size=rows)


def test_transforms_lie_where_the_class_has_its_mass():
    probs, labels = np.array([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]), np.array([1, 2, 0])
    found = randomised_pit(jax.random.key(0), probs, labels)
    assert 0.2 <= found.values[0] <= 0.7 <= found.values[1] <= 1.0
    np.testing.assert_allclose(found.ecdf[-1], (found.values <= found.grid[-1]).mean())


@pytest.mark.slow
def test_bands_of_transforms_and_counts_hold_as_often_as_they_say():
    """For labels from the predictions: 100 repetitions, of which 10 should leave a band of 90 %."""
    probs = some_probs(0, rows=80)
    left = np.zeros(2)
    for seed in range(100):
        labels = labels_from(probs, seed)
        pit = randomised_pit(jax.random.key(seed + 1000), probs, labels, level=0.9)
        counts = class_counts(jax.random.key(seed + 2000), probs, labels, bins=3, level=0.9)
        outside = (counts.observed < counts.low - 1e-9) | (counts.observed > counts.high + 1e-9)
        left += [not pit.inside, outside.any()]
    assert (np.abs(left - 10) < 4 * (100 * 0.1 * 0.9) ** 0.5).all()


def test_wrong_probabilities_are_found():
    probs = some_probs(1, rows=1000)  # enough to find them with any seed
    flattened = 0.5 * probs + 0.5 / 3
    labels = labels_from(probs, 3)
    assert class_counts(jax.random.key(0), probs, labels).p_value > 1e-3
    assert randomised_pit(jax.random.key(0), probs, labels).p_value > 1e-3
    assert class_counts(jax.random.key(0), flattened, labels).p_value < 0.01
    assert randomised_pit(jax.random.key(0), probs[:, ::-1], labels).p_value < 0.01


def test_counts_are_those_of_the_rows():
    probs, labels = some_probs(2, rows=100), labels_from(some_probs(2, rows=100), 5)
    found = class_counts(jax.random.key(0), probs, labels)
    np.testing.assert_array_equal(found.observed.sum(1), np.bincount(labels, minlength=3))
    np.testing.assert_allclose(found.expected.sum(1), probs.sum(0))
    top = np.argsort(probs[:, 1], kind="stable")[-20:]
    assert found.observed[1, -1] == (labels[top] == 1).sum()
    assert len(found.table) == 3 * 5
    with pytest.raises(ValueError, match="number of rows must be at least 200"):
        class_counts(jax.random.key(0), probs, labels, bins=200)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_levels_lie_between_zero_and_one(level):
    probs, labels = some_probs(0), np.zeros(300, int)
    for check in (class_counts, randomised_pit):
        with pytest.raises(ValueError, match=r"level must lie in \(0, 1\)"):
            check(jax.random.key(0), probs, labels, level=level)


def test_the_same_random_numbers_give_the_same_checks():
    probs, labels = some_probs(0), np.zeros(300, int)
    first, second = (randomised_pit(jax.random.key(7), probs, labels) for _ in range(2))
    assert jax.tree.map(np.array_equal, first.values, second.values)
    assert first.p_value == second.p_value


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, 2], [0.0, 1.0, 0.0], [[0], [1], [0]]])
def test_labels_are_class_numbers(labels):
    for check in (randomised_pit, class_counts):
        with pytest.raises(ValueError, match="must be in 0..1|class numbers, integers|one label each"):
            check(jax.random.key(0), np.full((3, 2), 0.5), labels)
