"""Figures of comparisons show the numbers of their arguments."""

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import ks_2samp

from bnlora import plots
from bnlora.assess.comparison import Draws, compare_draws
from bnlora.prediction.predict import Prediction

NAMES = ("margin[0]", "margin[1]", "norm", "log_likelihood")


def independent(values):
    return Draws(NAMES, values[None], "independent")


def prediction(random, scale):
    margin = np.linspace(-2, 2, 15) + scale * random.normal(size=(200, 15))
    return Prediction(-np.logaddexp(0, np.stack([margin, -margin], -1)))


@pytest.fixture(scope="module")
def found():
    random = np.random.default_rng(0)
    values = random.normal(size=(300, 4))
    values[:, 1] = 0.5 * values[:, 1]
    values[:, 2] += 1.0
    values[:, 3] = 0.8 * values[:, 2] + 0.6 * values[:, 3]
    reference = independent(random.normal(size=(400, 4)))
    return compare_draws(
        jax.random.key(0),
        independent(values),
        reference,
        predictions=(prediction(random, 0.3), prediction(random, 1.0)),
    )


def caption(figure):
    return figure.get_supxlabel().replace("\n", " ")


def test_forest_shows_medians_in_units_of_the_reference(found):
    figure = plots.forest(found)
    reference, posterior = (line.get_xdata() for line in figure.axes[0].lines[1:3])
    unit = (found.posterior.pooled - found.reference.mean) / found.reference.sd
    np.testing.assert_allclose(posterior, np.median(unit, axis=0))
    np.testing.assert_allclose(reference, 0, atol=0.3)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(NAMES)
    assert "300 independent draws" in caption(figure)
    assert "400 independent draws" in caption(figure)


def test_pairs_are_those_of_the_worst_functions(found):
    figure = plots.worst_pairs(found, count=2)
    (panel,) = figure.axes
    assert {panel.get_xlabel(), panel.get_ylabel()} == {"norm", "log_likelihood"}
    k = NAMES.index(panel.get_xlabel())
    np.testing.assert_array_equal(panel.lines[1].get_xdata(), found.posterior.thinned(300)[:, k])
    assert len(plots.worst_pairs(found).axes) == 3
    with pytest.raises(ValueError, match="pairs need two functions; got count=1 of 4"):
        plots.worst_pairs(found, count=1)


def test_predictions_are_against_each_other(found):
    left, right = plots.predictive_scatter(found).axes
    np.testing.assert_allclose(left.lines[0].get_xdata(), found.predictive.reference.probs[:, 1])
    np.testing.assert_allclose(right.lines[0].get_ydata(), found.predictive.posterior.mutual_information)
    assert "15 rows by 200 draws" in caption(plots.predictive_scatter(found))


def test_ranks_lie_outside_the_band_where_smirnov_rejects(found):
    figure = plots.rank_difference(found)
    for k, panel in enumerate(figure.axes):
        tested = ks_2samp(found.posterior.thinned(300)[:, k], found.reference.thinned(300)[:, k])
        colour = to_hex(panel.lines[1].get_color()).upper()
        assert colour == (plots.ORANGE if tested.pvalue < 0.05 / 4 else plots.BLUE)
        largest = np.abs(panel.lines[1].get_ydata()).max()
        assert largest == pytest.approx(tested.statistic, abs=1.5 / 300)  # seen after each step alone
    assert "300 draws of the approximation within 300 of the reference" in caption(figure)


@pytest.mark.parametrize(
    ("draw", "count"),
    [(plots.forest, 1), (plots.worst_pairs, 3), (plots.predictive_scatter, 2), (plots.rank_difference, 4)],
)
def test_axes_may_be_passed(found, draw, count):
    figure = Figure()
    assert draw(found, ax=figure.subplots(1, count)) is figure
    assert figure.get_supxlabel() == ""
    with pytest.raises(ValueError, match=f"`ax` must contain {count} axes"):
        draw(found, ax=figure.subplots(1, count + 1))


def test_pictures_of_predictions_need_predictions(found):
    bare = compare_draws(jax.random.key(0), found.posterior, found.reference)
    with pytest.raises(ValueError, match="expected a comparison with predictions"):
        plots.predictive_scatter(bare)
