"""Figures show the numbers of their arguments, and their captions are self-contained."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bnlora import plots
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.assess.sbc.calibration import Calibration


@pytest.fixture(scope="module")
def calibration():
    random = np.random.default_rng(0)
    columns = np.stack([random.integers(0, 32, 100), np.where(random.random(100) < 0.5, 0, 31)], 1)
    failed = np.arange(103) < 3
    return Calibration(("fine", "narrow"), columns, 31, failed)


@pytest.fixture(scope="module", params=[2, 3], ids="{} classes".format)
def predictive(request):
    random = np.random.default_rng(1)
    logits = random.normal(size=(40, 50, request.param))
    return PriorPredictive(logits, logits.mean(0))


def caption(figure):
    return figure.get_supxlabel().replace("\n", " ")


def test_prior_predictive_shows_draws_beside_the_base(predictive):
    figure = plots.prior_predictive(predictive, max_rows=20)
    left, right = figure.axes
    draws = left.patches[2:27]  # after the two grey edges
    classes = np.ones(50, int) if predictive.logits.shape[2] == 2 else predictive.base_logits.argmax(1)
    values = predictive.probs[:, np.arange(50), classes]
    expected = np.histogram(values, np.linspace(0, 1, 26))[0] / values.size
    np.testing.assert_allclose([bar.get_height() for bar in draws], expected)
    base = np.sort(predictive.base_probs[np.arange(50), classes])
    np.testing.assert_allclose(right.lines[0].get_ydata(), base[np.linspace(0, 49, 20).round().astype(int)])
    assert figure.get_suptitle().replace("\n", " ") == predictive.verdict
    for piece in ("40 draws", "50 rows", "no labels are used"):
        assert piece in caption(figure)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_sbc_shows_the_distribution_of_the_ranks_and_marks_rejections(calibration):
    figure = plots.sbc(calibration)
    fine, narrow = (axes.lines[1] for axes in figure.axes)
    z, difference = fine.get_xdata(), fine.get_ydata()
    expected = [(calibration.ranks[:, 0] < round(32 * x)).mean() - x for x in z]
    np.testing.assert_allclose(difference, expected, atol=1e-12)
    assert [to_hex(line.get_color()).upper() for line in (fine, narrow)] == [plots.BLUE, plots.ORANGE]
    assert figure.axes[1].get_title() == "narrow   p < 0.0001\ntoo narrow"
    assert "100 simulations, 3 more failed, L = 31" in caption(figure)


def test_vsbc_shows_probabilities_and_their_mirror_image(calibration):
    figure = plots.vsbc(calibration)
    filled, outline = figure.axes[1].containers[0], figure.axes[1].patches[-1]
    heights = np.array([bar.get_height() for bar in filled])
    np.testing.assert_allclose(heights.sum(), 1)
    assert heights[[0, -1]].sum() == pytest.approx(1)
    assert outline.get_xy()[:, 1].max() == pytest.approx(heights.max())
    assert "mirror image" in caption(figure)


@pytest.mark.parametrize(("num_draws", "bins"), [(1, 2), (7, 8), (30, 15), (31, 16), (33, 15), (99, 10)])
def test_the_dashed_line_is_the_histogram_of_uniform_ranks(num_draws, bins):
    """Every rank three times; the test counts the ranks in each bin with integers."""
    ranks = np.repeat(np.arange(num_draws + 1), 3)
    result = Calibration(("f",), ranks[:, None], num_draws, np.zeros(len(ranks), bool))
    panel = plots.vsbc(result).axes[0]
    heights = np.array([bar.get_height() for bar in panel.containers[0]])
    inside = [(2 * ranks + 1) * bins // (2 * num_draws + 2) == b for b in range(bins)]
    np.testing.assert_allclose(heights, np.mean(inside, axis=1))
    uniform = panel.lines[0].get_ydata()
    np.testing.assert_allclose(uniform, [heights[0], *heights])
    if (num_draws + 1) % bins == 0:
        np.testing.assert_allclose(heights, 1 / bins)
    outline = panel.patches[-1].get_xy()[:, 1]
    assert outline.max() == pytest.approx(heights.max())


def smoothed(values):
    """The smoothed line of the bound for a fit with this history."""
    history = dict.fromkeys(("elbo", "data", "inducing_kl", "conditional_kl"), values)
    fit = SimpleNamespace(history=history, validation={"step": np.zeros(0)})
    return plots.elbo({"fit": fit}).subfigs[0].axes[0].lines[1].get_ydata()


def test_smoothing_ignores_steps_that_are_not_finite():
    """Compare with the mean of the finite values of the last 15 steps, computed with a loop."""
    values = np.arange(1.0, 41.0)
    values[[5, 20]] = np.nan, np.inf
    expected = [np.mean([x for x in values[max(t - 14, 0) : t + 1] if np.isfinite(x)]) for t in range(40)]
    np.testing.assert_allclose(smoothed(values), expected)
    np.testing.assert_array_equal(smoothed(np.full(3, np.nan)), np.nan)
    assert len(smoothed(np.zeros(0))) == 0


@pytest.mark.parametrize("draw", [plots.sbc, plots.vsbc])
def test_axes_may_be_passed(calibration, draw):
    figure = Figure()
    assert draw(calibration, ax=figure.subplots(1, 2)) is figure
    assert figure.get_supxlabel() == ""
    with pytest.raises(ValueError, match="`ax` must contain 2 axes, one for each panel; got 3"):
        draw(calibration, ax=figure.subplots(1, 3))


def test_axes_may_be_passed_to_the_prior_predictive(predictive):
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert plots.prior_predictive(predictive, ax=axes) is figure
    assert axes[1].lines
