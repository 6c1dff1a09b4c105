"""Refits against dense Gaussians written with NumPy, SciPy's optimiser, and fits of all rows at once."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy
from builders.linearised import BASE, KEY, NEW, ROWS, exact
from rich.console import Console

import bnlora as bl
from bnlora.infer.core.refit import earlier_of
from bnlora.program.density import density

QUIET = Console(quiet=True)
OLD, LATER, LAST = ROWS[:10], ROWS[10:18], ROWS[18:]


@pytest.fixture(scope="module")
def before() -> bl.CoreFit:
    options = {"label_ids": (3, 5), "targets": ["v_proj", "lm_head", "slope"], "size": 2, "num_steps": 30}
    return bl.fit_core(KEY, BASE, OLD, **options, console=QUIET)


@pytest.fixture(scope="module")
def after(before) -> bl.CoreFit:
    return bl.refit(KEY, before, LATER, num_steps=30, console=QUIET)


def dense(earlier) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision of a Gaussian over the cores."""
    V = np.asarray(earlier.vectors)
    return np.asarray(earlier.mean), np.eye(len(V)) + V @ np.diag(earlier.excess) @ V.T


def core_moments(fit, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the cores under a fit, from draws of its guide."""
    adapters = fit.draw_adapters(KEY, count)
    units = np.concatenate(
        [np.full(int(np.prod(f.size)), fit.scales.values[n] / f.unit) for n, f in fit.frames.items()]
    )
    u = np.asarray(jax.vmap(fit.model.coordinates)(adapters), np.float64) / units
    return u.mean(0), np.cov(u.T)


def model_of(fit, rows):
    """The linear model of some rows in the cores of a fit."""
    return exact(fit.model, rows, dict(fit.scales.values))


@pytest.mark.slow
def test_with_the_rows_kept_two_halves_in_turn_are_all_rows_at_once(before):
    in_turn = bl.refit(KEY, before, LATER, kept=OLD, num_steps=4, console=QUIET)
    linear = model_of(before, ROWS[:18])
    mode, H = linear.mode()
    np.testing.assert_allclose(in_turn.gaussian.loc, mode, atol=1e-5)
    np.testing.assert_allclose(in_turn.gaussian.covariance(), np.linalg.inv(H), atol=1e-5)
    assert in_turn.gaussian.log_evidence == pytest.approx(linear.log_evidence(), abs=1e-4)


def test_the_summary_has_the_moments_of_the_draws_of_the_fit(before, after):
    for fit in (before, after):
        mean, precision = dense(earlier_of(fit))
        found, covariance = core_moments(fit)
        expected = np.linalg.inv(precision)
        sd = np.sqrt(np.diag(expected) / 20_000)
        z = scipy.stats.norm.isf(1e-3 / 2 / len(mean))
        assert np.abs((found - mean) / sd).max() < z
        spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / 20_000)
        worst = np.abs((covariance - expected) / spread)[np.triu_indices(len(mean))].max()
        assert worst < scipy.stats.norm.isf(1e-3 / 2 / (len(mean) * (len(mean) + 1) / 2))


@pytest.mark.parametrize("keep", [1.0, 0.3, 0.0])
def test_a_part_that_is_kept_multiplies_precision_and_pull(before, keep):
    mean, precision = dense(earlier_of(before))
    eye = np.eye(len(mean))
    expected = eye + keep * (precision - eye)
    got = dense(earlier_of(before).forgotten(keep))
    np.testing.assert_allclose(got[1], expected, atol=1e-9)
    np.testing.assert_allclose(got[0], np.linalg.solve(expected, keep * precision @ mean), atol=1e-9)


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_posterior_after_a_summary_is_that_of_a_dense_optimiser(before, keep):
    """The prior N(m, P^-1) over the cores and the new rows, without the coordinates of the library."""
    fit = bl.refit(KEY, before, LATER, keep=keep, num_steps=4, console=QUIET)
    mean, precision = dense(earlier_of(before).forgotten(keep))
    linear = model_of(before, LATER)

    def negative(u):
        return 0.5 * (u - mean) @ precision @ (u - mean) - linear.log_likelihood(u)

    found = scipy.optimize.minimize(negative, mean, method="BFGS", options={"gtol": 1e-7})
    cores = fit.gaussian.model.prior.program.earlier.cores(np.asarray(fit.gaussian.loc, np.float64))
    np.testing.assert_allclose(cores, found.x, atol=2e-4)
    p = 1 / (1 + np.exp(-(linear.offset + linear.design @ found.x)))[:, 0]
    phi = linear.design[:, 0]
    H = precision + phi.T @ (phi * (p * (1 - p))[:, None])
    # Laplace: log p(y_new | y_old) = log p(y | u*) + log N(u*; m, P^-1) + d/2 log 2 pi - log|H|/2.
    evidence = -found.fun + 0.5 * (np.linalg.slogdet(precision)[1] - np.linalg.slogdet(H)[1])
    assert fit.gaussian.log_evidence == pytest.approx(evidence, abs=1e-3)
    root = fit.gaussian.covariance()
    spread = fit.gaussian.model.prior.program.earlier.spread
    np.testing.assert_allclose(spread(spread(root).T), np.linalg.inv(H), atol=1e-4)


def test_nothing_kept_is_the_fit_of_the_new_rows_alone(before):
    none = bl.refit(KEY, before, LATER, keep=0.0, num_steps=4, console=QUIET)
    alone = bl.laplace(before.model, LATER)
    np.testing.assert_allclose(none.gaussian.loc, alone.loc, atol=1e-5)
    assert none.gaussian.log_evidence == pytest.approx(alone.log_evidence, abs=1e-5)


def test_a_summary_of_a_summary_forgets_towards_the_core_prior(before, after):
    """Precisions add: those of the first summary and of the second, in the same coordinates."""
    last = bl.refit(KEY, after, LAST, num_steps=4, console=QUIET)
    mean, precision = dense(earlier_of(after))
    linear = model_of(before, LAST)
    carried = last.gaussian.model.prior.program
    np.testing.assert_allclose(dense(carried.earlier)[0], mean, atol=1e-9)
    np.testing.assert_allclose(dense(carried.earlier)[1], precision, atol=1e-9)
    assert carried.earlier.vectors.shape[1] <= before.frames.num_coordinates
    best = last.gaussian.model.prior.program.earlier.cores(np.asarray(last.gaussian.loc, np.float64))
    slope = precision @ (best - mean)
    p = 1 / (1 + np.exp(-(linear.offset + linear.design @ best)))[:, 0]
    np.testing.assert_allclose(slope, linear.design[:, 0].T @ (linear.labels - p), atol=1e-3)
    gone = earlier_of(last).forgotten(0.0)
    np.testing.assert_allclose(gone.mean, 0, atol=1e-9)
    np.testing.assert_allclose(gone.excess, 0, atol=1e-9)


@pytest.mark.slow
def test_it_is_a_prior_like_others(after):
    """The density and NUTS read it through its sample sites."""
    view = density(after.model, {})
    w = np.random.default_rng(0).normal(size=view.size).astype(np.float32)
    assert float(view.log_prior(w)) == pytest.approx(scipy.stats.norm.logpdf(w).sum(), abs=1e-3)
    options = {"mass": after.gaussian, "num_warmup": 200, "num_draws": 500, "num_chains": 2}
    chains = bl.sample_nuts(KEY, after.model, after.fit.train, **options, console=QUIET)
    sampled, fitted = (
        bl.predict(KEY, x, NEW, num_draws=1_000, console=QUIET).probs[:, 1] for x in (chains, after)
    )
    # The Gaussian is an approximation, so this only tells that both are of the same posterior.
    base = scipy.special.softmax(after.model.prepare(NEW).features.offset, axis=1)[:, 1]
    assert np.abs(sampled - fitted).mean() < 0.3 * np.abs(sampled - base).mean()


def test_a_refit_comes_back_from_its_folder(after, tmp_path):
    bl.save_core(after, tmp_path / "fit")
    again = bl.load_core(tmp_path / "fit", BASE)
    ours, theirs = (bl.predict(KEY, x, NEW, num_draws=20, console=QUIET).probs for x in (after, again))
    np.testing.assert_array_equal(ours, theirs)
    third, fourth = (bl.refit(KEY, x, LAST, num_steps=4, console=QUIET) for x in (after, again))
    np.testing.assert_allclose(third.gaussian.loc, fourth.gaussian.loc, atol=1e-5)


def test_what_cannot_be_done_is_said(before):
    with pytest.raises(ValueError, match="kept rows, forget by keeping fewer"):
        bl.refit(KEY, before, LATER, kept=OLD, keep=0.5)
    for keep in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="keep must be a number from 0"):
            bl.refit(KEY, before, LATER, keep=keep)
    with pytest.raises(ValueError, match="the new rows have no labels"):
        bl.refit(KEY, before, replace(LATER, labels=np.full(len(LATER), -1)))
    earlier = earlier_of(before)
    with pytest.raises(ValueError, match="scale must have each family"):
        bl.priors.carried(before.frames, scale={"lm_head": 1.0}, earlier=earlier)
    small = bl.priors.Earlier(np.zeros(1), np.eye(1), np.ones(1))
    with pytest.raises(ValueError, match="coordinates; what was learned has 1"):
        bl.priors.carried(before.frames, scale=before.scales.values, earlier=small)
