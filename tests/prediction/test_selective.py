"""Risk-coverage curves and separation against a count by hand, scipy and the metric of the same name."""

import jax
import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu

import bnlora as bl
from bnlora.prediction.predict import Prediction
from bnlora.prediction.selective import doubt, risk_coverage, separation

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def prediction():
    margin = np.random.default_rng(0).normal(size=(6, 40))
    return Prediction(-np.logaddexp(0, np.stack([margin, -margin], -1)))


LABELS = np.random.default_rng(1).integers(0, 2, 40)


@pytest.mark.parametrize("by", ["confidence", "entropy", "mutual_information"])
def test_curve_is_a_count_of_errors_among_the_first_rows(prediction, by):
    found = risk_coverage(KEY, prediction, LABELS, by=by, num_resamples=20)
    score = -prediction.probs.max(1) if by == "confidence" else getattr(prediction, by)
    wrong = (prediction.probs.argmax(1) != LABELS)[np.argsort(score)]
    for i in range(1, 41):
        errors = int(sum(wrong[:i]))
        assert found.coverage[i - 1] == i / 40
        assert found.risk[i - 1] == pytest.approx(errors / i)
        interval = binomtest(errors, i).proportion_ci(0.95, method="wilson")
        assert (found.low[i - 1], found.high[i - 1]) == pytest.approx(tuple(interval), abs=1e-9)
    assert found.aurc.value == pytest.approx(np.mean([sum(wrong[:i]) / i for i in range(1, 41)]))
    assert found.aurc.low <= found.aurc.value <= found.aurc.high


def test_area_and_its_interval_are_those_of_the_metric(prediction):
    found = risk_coverage(KEY, prediction, LABELS, num_resamples=50)
    metric = bl.metrics.summary(KEY, prediction, LABELS, num_resamples=50, metrics={"aurc": bl.metrics.aurc})[
        "aurc"
    ]
    np.testing.assert_allclose([*vars(found.aurc).values()], [*vars(metric).values()])


def test_rows_of_equal_doubt_enter_together():
    """Two rows tied, one of them wrong: half an error each, whichever comes first."""
    same = Prediction(np.log([[[0.2, 0.8], [0.2, 0.8], [0.4, 0.6]]]))
    for labels in ([0, 1, 1], [1, 0, 1]):
        np.testing.assert_allclose(risk_coverage(KEY, same, labels, num_resamples=2).risk, [0.5, 0.5, 1 / 3])


def test_separation_is_the_statistic_of_mann_and_whitney():
    random = np.random.default_rng(2)
    inside, outside = random.integers(0, 6, 30) / 6, random.integers(1, 8, 50) / 6
    expected = mannwhitneyu(outside, inside).statistic / (30 * 50)
    assert separation(inside, outside) == pytest.approx(expected)


def test_bad_input_gets_one_sentence(prediction):
    with pytest.raises(ValueError, match="nearest is 'entropy'"):
        doubt(prediction, "entropie")
    with pytest.raises(ValueError, match="one label each"):
        risk_coverage(KEY, prediction, LABELS[:3])
