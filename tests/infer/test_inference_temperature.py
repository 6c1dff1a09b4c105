"""Temperature: against logistic regression, by hand for a mixture, and where there is none."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from bnlora import metrics
from bnlora.infer.approximate import fit_temperature, tempered
from bnlora.prediction.predict import Prediction

RANDOM = np.random.default_rng(0)
LOGITS = 4 * RANDOM.normal(size=(2, 200, 2))
LABELS = (RANDOM.random(200) < softmax(LOGITS[0] / 3, axis=-1)[:, 1]).astype(int)


def test_one_draw_is_logistic_regression_on_its_log_odds():
    """Guo et al. (2017): 1/T is the slope of a regression without intercept or penalty."""
    log_odds = LOGITS[0][:, 1:] - LOGITS[0][:, :1]
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(log_odds, LABELS)
    found = fit_temperature(Prediction(log_softmax(LOGITS[:1], axis=-1)), LABELS)
    np.testing.assert_allclose(found, 1 / regression.coef_[0, 0], rtol=1e-4)
    assert 2 < found < 4.5  # the labels were drawn at temperature 3


def test_mixture_by_hand_and_its_minimum():
    prediction = Prediction(log_softmax(LOGITS, axis=-1))
    found = fit_temperature(prediction, LABELS)
    by_hand = {t: np.mean(softmax(LOGITS / t, axis=-1), axis=0) for t in (found, 0.98 * found, 1.02 * found)}
    np.testing.assert_allclose(tempered(prediction, found).probs, by_hand[found], atol=1e-12)
    loss = {t: -np.log(p[np.arange(200), LABELS]).mean() for t, p in by_hand.items()}
    assert min(loss, key=loss.get) == found
    np.testing.assert_allclose(metrics.nll(tempered(prediction, found).log_probs, LABELS), loss[found])


def test_temperature_one_changes_nothing_and_a_high_one_everything():
    prediction = Prediction(log_softmax(LOGITS, axis=-1))
    np.testing.assert_allclose(tempered(prediction, 1.0).draw_log_probs, prediction.draw_log_probs)
    np.testing.assert_allclose(tempered(prediction, 1e9).probs, 0.5, atol=1e-6)


def test_the_lower_of_two_minima_is_found():
    """0.77 nats at a temperature of 0.27, which a search of the whole range ends at, and 0.66 at 26."""
    margins = np.array([[-0.2, -0.6, 0.0, 0.4, -0.3, -0.4], [-8.0, 57.5, -2.4, -12.0, -8.9, 4.2]])
    labels, logits = np.array([1, 1, 0, 1, 0, 0]), np.stack([0 * margins, margins], -1)
    temperatures = np.exp(np.linspace(-5, 5, 2001))
    by_hand = [softmax(logits / t, axis=-1).mean(0)[np.arange(6), labels] for t in temperatures]
    best = temperatures[(-np.log(by_hand).mean(1)).argmin()]
    found = fit_temperature(Prediction(log_softmax(logits, axis=-1)), labels)
    np.testing.assert_allclose(found, best, rtol=0.005)  # the step of this grid


@pytest.mark.parametrize("margin", [10.0, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_are_all_right_have_no_temperature(margin, dtype):
    """With clear margins the loss is exactly zero below a temperature: any point of it would do."""
    labels = np.arange(40) % 2
    logits = np.where(np.eye(2)[labels] > 0, margin, 0.0)[None].astype(dtype)
    with pytest.raises(ValueError, match="has no minimum between the temperatures 0.0067 and 148"):
        fit_temperature(Prediction(log_softmax(logits, axis=-1)), labels)


def test_where_the_least_loss_is_at_an_end_the_reason_is_said():
    """All rows right: at the lowest. All wrong: at the highest. No class preferred: at every temperature."""
    logits = LOGITS[:1]
    right = logits[0].argmax(1)
    for given, labels, reason in (
        (
            logits,
            right,
            "smallest at the lowest, as if every row were classified correctly; use more validation",
        ),
        (logits, 1 - right, "smallest at the highest, so equal probabilities would do as well"),
        (0 * logits, right, "the same at all of them, as if every class were equally probable"),
    ):
        with pytest.raises(ValueError, match=reason):
            fit_temperature(Prediction(log_softmax(given, axis=-1)), labels)


def test_a_class_of_probability_zero():
    """Zero under every draw: no temperature makes the loss finite. Zero under one draw of two: one does."""
    right = np.array([[0.7, 0.3], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3]])
    with np.errstate(divide="ignore"):
        draws = np.log([np.concatenate([[[0.0, 1.0]], right]), np.concatenate([[[0.1, 0.9]], right])])
    labels = np.zeros(5, int)
    assert np.isinf(metrics.nll(tempered(Prediction(draws[:1]), 100.0), labels))
    with pytest.raises(ValueError, match=r"infinite at every temperature: .* in 1 of 5 rows, .* is row 0"):
        fit_temperature(Prediction(draws[:1]), labels)
    found = fit_temperature(Prediction(draws), labels)
    near = [
        np.log(softmax(draws / t, axis=-1).mean(0)[:, 0]).mean() for t in (0.98 * found, found, 1.02 * found)
    ]
    assert np.isfinite(near).all()
    assert max(near) == near[1]


def test_bad_input():
    with pytest.raises(ValueError, match="must be class numbers, integers; got '0'"):
        fit_temperature(Prediction(log_softmax(LOGITS, axis=-1)), LABELS.astype(str))
    prediction = Prediction(log_softmax(LOGITS, axis=-1))
    with pytest.raises(ValueError, match="temperature must be a positive number; got 0"):
        tempered(prediction, 0)
    right = LOGITS.mean(0).argmax(1)
    separable = Prediction(log_softmax(LOGITS.mean(0, keepdims=True), axis=-1))
    with pytest.raises(ValueError, match="has no minimum between the temperatures 0.0067 and 148"):
        fit_temperature(separable, right)
