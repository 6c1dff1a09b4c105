"""Standard errors of chains against autoregressions whose errors are known, and of independent draws."""

import numpy as np
import pytest

from bnlora.assess.comparison.draws import Draws, evenly
from bnlora.assess.comparison.moments import moments, moments_null
from bnlora.assess.comparison.pairs import pairs

RANDOM = np.random.default_rng


def autoregression(random, correlation, shape):
    """Chains (chain, draw, function) of variance one whose neighbours have the given correlation."""
    noise = random.normal(size=shape)
    values = np.empty(shape)
    values[:, 0] = noise[:, 0]
    for t in range(1, shape[1]):
        values[:, t] = correlation * values[:, t - 1] + (1 - correlation**2) ** 0.5 * noise[:, t]
    return values


def named(values, kind):
    return Draws(tuple(f"f{k}" for k in range(values.shape[-1])), values, kind)


@pytest.mark.parametrize("r", [0.6, -0.6])
def test_errors_of_chains_are_those_of_the_autoregression(r):
    """Mean: time (1 + r) / (1 - r); standard deviation: time of r^2, over the square root of two."""
    chains, draws = 4, 2000
    found = named(autoregression(RANDOM(0), r, (chains, draws, 40)), "chains")
    total = chains * draws
    np.testing.assert_allclose(found.mcse_mean.mean(), ((1 + r) / (1 - r) / total) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(
        found.mcse_sd.mean(), ((1 + r**2) / (1 - r**2) / (2 * total)) ** 0.5, rtol=0.05
    )
    np.testing.assert_allclose(found.ess.mean(), min(total * (1 - r) / (1 + r), total), rtol=0.05)


def test_errors_of_independent_draws_in_closed_form():
    found = named(RANDOM(0).normal(size=(1, 20_000, 5)), "independent")
    np.testing.assert_allclose(found.mcse_mean, found.sd / 20_000**0.5)
    np.testing.assert_allclose(found.mcse_sd, 1 / (2 * 20_000) ** 0.5, rtol=0.05)
    assert found.independent_size == 20_000


def test_thinned_chains_have_neighbours_of_little_correlation():
    r = 0.8
    found = named(autoregression(RANDOM(1), r, (1, 40_000, 1)), "chains")
    kept = found.thinned(found.independent_size)[:, 0]
    expected = r ** (2 * (1 + r) / (1 - r))
    assert expected < np.exp(-4)
    assert abs(np.corrcoef(kept[1:], kept[:-1])[0, 1] - expected) < 4 / len(kept) ** 0.5


def test_halves_are_of_chains_or_of_draws():
    values = np.arange(5 * 9.0)[..., None].reshape(5, 9, 1)
    first, second = named(values, "chains").halves()
    np.testing.assert_array_equal(first.values, values[:2])
    np.testing.assert_array_equal(second.values, values[2:4])
    longer = np.arange(21.0).reshape(1, 21, 1)
    first, second = named(longer, "independent").halves()
    np.testing.assert_array_equal(np.concatenate([first.pooled, second.pooled]), longer[0, :20])


def test_even_spacing():
    np.testing.assert_array_equal(evenly(10, 5), [1, 3, 5, 7, 9])
    np.testing.assert_array_equal(evenly(7, 7), range(7))
    with pytest.raises(ValueError, match="between 1 and 7 draws; got 8"):
        evenly(7, 8)


def test_z_scores_are_standard_normal_under_the_null():
    """200 functions of chains against independent draws: mean square one, of means and deviations."""
    random = RANDOM(2)
    reference = named(autoregression(random, 0.5, (4, 1000, 200)), "chains")
    posterior = named(random.normal(size=(1, 1000, 200)), "independent")
    for found in (moments(posterior, reference), moments_null(reference)):
        for z in (found.shift_z, found.ratio_z):
            assert abs(z.mean()) < 4 / 200**0.5
            assert abs((z**2).mean() - 1) < 4 * (2 / 200) ** 0.5
    assert (moments(posterior, reference).shift_adjusted > 0.01).all()


def test_shift_and_ratio_are_found():
    random = RANDOM(3)
    reference = named(3 + 2 * random.normal(size=(1, 4000, 2)), "independent")
    changed = np.array([4, 3]) + np.array([2, 1.2]) * random.normal(size=(1, 4000, 2))
    posterior = named(changed, "independent")
    found = moments(posterior, reference)
    np.testing.assert_allclose(found.shift, [0.5, 0.0], atol=4 * found.shift_mcse.max())
    np.testing.assert_allclose(found.ratio, [1.0, 0.6], rtol=4 * found.ratio_mcse.max())
    assert found.shift_adjusted[0] < 1e-6 < 0.01 < found.shift_adjusted[1]
    assert found.ratio_adjusted[1] < 1e-6 < 0.01 < found.ratio_adjusted[0]


def test_a_point_has_no_spread():
    reference = named(RANDOM(4).normal(size=(1, 500, 1)), "independent")
    found = moments(named(np.zeros((1, 500, 1)), "independent"), reference)
    assert found.ratio_z == -np.inf
    assert found.ratio_adjusted == 0
    assert np.isfinite(found.shift_z)


def test_detectable_shift_is_found_half_of_the_time():
    random, found = RANDOM(5), []
    for _ in range(300):
        reference = named(random.normal(size=(1, 200, 1)), "independent")
        shift = (2 / 200) ** 0.5 * 1.959964
        made = moments(named(shift + random.normal(size=(1, 200, 1)), "independent"), reference)
        found.append(made.shift_adjusted[0] < 0.05)
        assert made.detectable_shift(0.05)[0] == pytest.approx(shift, rel=0.25)
    assert abs(np.mean(found) - 0.5) < 3.5 * (0.25 / 300) ** 0.5


def test_pairs_are_of_one_size_and_in_units_of_the_reference():
    random = RANDOM(6)
    reference = named(5 + 3 * autoregression(random, 0.5, (4, 500, 2)), "chains")
    posterior = named(5 + 3 * random.normal(size=(1, 300, 2)), "independent")
    found = pairs(posterior, reference)
    assert found.size == min(150, reference.independent_size // 2)
    assert found.posterior.shape == found.reference.shape == (2, found.size, 2)
    np.testing.assert_allclose(found.reference.reshape(-1, 2).std(0), 1, atol=0.2)
    assert pairs(posterior, reference, max_size=20).size == 20


def test_bad_draws_are_refused():
    good = np.zeros((2, 9, 1))
    with pytest.raises(ValueError, match="kind must be 'chains' or 'independent'; got 'iid'"):
        Draws(("f",), good, "iid")
    with pytest.raises(ValueError, match=r"one row, shape \(1, draw, k\); got \(2, 9, 1\)"):
        Draws(("f",), good, "independent")
    with pytest.raises(ValueError, match="one column for each of the different names"):
        Draws(("f", "g"), good, "chains")
    with pytest.raises(ValueError, match="at least 8 draws of each chain"):
        Draws(("f",), good[:, :3], "chains")
    with pytest.raises(ValueError, match="at least one function; got none"):
        Draws((), good[..., :0], "chains")
    with pytest.raises(ValueError, match="finite values in every draw; not so: f"):
        Draws(("f",), good + np.nan, "chains")


def test_sides_that_do_not_fit_are_refused():
    reference = Draws(("f",), RANDOM(7).normal(size=(1, 50, 1)), "independent")
    with pytest.raises(ValueError, match="same functions on both sides"):
        moments(Draws(("g",), reference.values, "independent"), reference)
    with pytest.raises(ValueError, match="vary under the reference; constant: f"):
        moments(reference, Draws(("f",), np.ones((1, 50, 1)), "independent"))
    with pytest.raises(ValueError, match="at least 20 draws on each side .* draw more"):
        pairs(Draws(("f",), reference.values[:, :12], "independent"), reference)
