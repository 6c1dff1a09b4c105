"""The rule that stops a fit, on bounds whose growth and noise are known."""

import numpy as np
import pytest

import bnlora as bl


def stops_at(rule: bl.Plateau, bound: np.ndarray) -> int | None:
    """The first step at which the rule stops a fit with this bound."""
    return next((n for n in range(1, len(bound) + 1) if rule.reached(bound[:n])), None)


@pytest.mark.parametrize("window", [5, 25])
def test_a_bound_that_grows_by_more_than_the_tolerance_over_a_window_never_stops(window):
    rule = bl.Plateau(window=window, tolerance=0.5)
    growth = 1.01 * 0.5 / window  # from the middle of a window to that of the next
    assert stops_at(rule, growth * np.arange(2000)) is None
    assert stops_at(rule, 0.5 * growth * np.arange(2000)) is not None


def test_growth_that_ends_is_noticed_when_the_windows_are_past_it():
    bound = np.minimum(np.arange(400.0), 100.0)  # 100 nats in 100 steps, then flat
    step = stops_at(bl.Plateau(window=25), bound)
    assert 100 + 25 < step <= 200  # at 200 steps both windows, a quarter of the run each, are flat


def test_a_flat_bound_stops_as_soon_as_there_are_two_windows():
    assert stops_at(bl.Plateau(window=10), np.full(100, -3.0)) == 20
    assert stops_at(bl.Plateau(window=25), np.full(100, -3.0)) == 50
    assert not bl.Plateau(window=10).reached(np.zeros(0))
    assert not bl.Plateau(window=10).reached([-3.0] * 19)


def test_a_bound_that_falls_slowly_stops():
    assert stops_at(bl.Plateau(window=10), -0.1 * np.arange(100.0)) == 20


def test_a_noisy_flat_bound_stops_when_the_windows_are_long_enough():
    """Twice the standard error of the growth is 2 sqrt(2 / half) with noise of deviation one."""
    rule, alternating = bl.Plateau(window=10, tolerance=0.2), np.tile([-1.0, 1.0], 2000)
    half = 2 * (2 / 0.2) ** 2  # 200 steps: 2 sqrt(2 / 200) = 0.2
    step = stops_at(rule, alternating)
    assert abs(step / (4 * half) - 1) < 0.02  # a window is a quarter of the run
    quiet = stops_at(rule, 0.1 * alternating)
    assert quiet == 20
    assert stops_at(bl.Plateau(window=10, tolerance=0.4), alternating) == pytest.approx(step / 4, rel=0.05)


def test_noise_does_not_hide_growth():
    generator = np.random.default_rng(0)
    bound = 0.05 * np.arange(1200) + generator.normal(size=1200)  # 15 nats over a window of 300 steps
    assert stops_at(bl.Plateau(window=20, tolerance=0.5), bound) is None


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_bound_that_is_not_finite_does_not_stop(broken):
    rule, bound = bl.Plateau(window=10), np.full(40, 2.0)
    assert rule.reached(bound)
    for place in (-1, -15):
        one = bound.copy()
        one[place] = broken
        assert not rule.reached(one)
    before = bound.copy()
    before[0] = broken
    assert rule.reached(before), "steps before the windows are not read"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be at least 2; got 1"),
        ({"window": 2.5}, "window must be an integer of at least 2; got 2.5"),
        ({"tolerance": 0.0}, "tolerance must be a positive number; got 0.0"),
        ({"tolerance": -1}, "tolerance must be a positive number; got -1"),
        ({"tolerance": float("nan")}, "tolerance must be a positive number; got nan"),
        ({"tolerance": "much"}, "tolerance must be a positive number; got 'much'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bl.Plateau(**options)
