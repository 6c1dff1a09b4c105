"""Answers with controlled risk: how often the guarantee fails in simulations, and tests by hand."""

import copy
import pickle

import numpy as np
import pytest
from scipy.stats import binom

import bnlora as bl
from bnlora.prediction.predict import Prediction
from bnlora.prediction.risk_control import _fallback, control_risk
from bnlora.prediction.selective import DOUBTS, doubt


def two_classes(margin):
    """A prediction of two classes with these log-odds."""
    return Prediction(-np.logaddexp(0, np.stack([margin, -margin], -1))[None])


def draw(random, num_rows, overconfidence=1.0):
    """A prediction, its labels, and the true probability that its answer is wrong."""
    margin = 4 * random.normal(size=num_rows)
    labels = (random.random(num_rows) < 1 / (1 + np.exp(-margin))).astype(int)
    return two_classes(overconfidence * margin), labels, 1 / (1 + np.exp(np.abs(margin)))


@pytest.mark.parametrize("overconfidence", [1.0, 2.0], ids=["calibrated", "overconfident"])
def test_the_risk_is_above_its_bound_at_most_as_often_as_stated(overconfidence):
    random, repeats = np.random.default_rng(0), 200
    new, _, chance = draw(random, 50_000, overconfidence)
    order = np.argsort(doubt(new))
    doubts, risk = doubt(new)[order], np.cumsum(chance[order]) / np.arange(1, 50_001)
    answered = []
    for _ in range(repeats):
        prediction, labels, _ = draw(random, 400, overconfidence)
        rule = control_risk(prediction, labels, max_risk=0.08, level=0.9)
        answered.append(np.searchsorted(doubts, rule.threshold, "right"))
    broken = sum(risk[count - 1] > 0.08 for count in answered if count)
    assert broken <= binom.ppf(0.999, repeats, 0.1)
    assert np.mean(answered) > 0.7 * (risk <= 0.08).sum()


def test_a_doubt_without_any_information_keeps_the_level():
    """Every threshold has a risk just above the bound: any answer is a failure, and there are some."""
    random, repeats, failures = np.random.default_rng(1), 300, 0
    for _ in range(repeats):
        prediction = two_classes(4 * np.abs(random.normal(size=300)))
        labels = 1 - (random.random(300) < 0.1001).astype(int)
        failures += control_risk(prediction, labels, max_risk=0.1, level=0.9).num_answered > 0
    assert 0.01 * repeats < failures <= binom.ppf(0.999, repeats, 0.1)


def test_one_threshold_is_the_exact_binomial_test():
    """No error among 59 rows: 0.95 ** 59 = 0.0485; 58 rows are too few."""
    for num_rows, passes in ((58, False), (59, True)):
        prediction = two_classes(np.full(num_rows, 3.0))
        rule = control_risk(prediction, np.ones(num_rows, int), max_risk=0.05, thresholds=[0.4])
        assert (rule.num_answered == num_rows) == passes
        assert rule.threshold == (0.4 if passes else -np.inf)


def test_the_sequences_by_hand():
    """Five starts have 0.01 each: 0.01 of the second, 0.02 of the third, and the fifth begins anew."""
    pvalues = np.array([0.5, 0.01, 0.02, 0.9, 0.011])
    assert _fallback(pvalues, 0.05) == 2
    assert _fallback(np.append(pvalues[:4], 0.01), 0.05) == 4
    assert _fallback(np.array([0.0, 0.02, 0.03, 0.04, 0.05]), 0.05) == 4
    assert _fallback(np.array([0.02, 0.05]), 0.05) == 1  # two starts with 0.025 each
    assert _fallback(np.array([0.03, 0.03]), 0.05) is None
    assert _fallback(np.full(20, 0.011), 0.05) is None
    between = np.ones(20)
    between[5] = 0.001  # not a start: these are 0, 4, 8, 12 and 16
    assert _fallback(between, 0.05) is None
    between[4] = 0.01
    assert _fallback(between, 0.05) == 5


@pytest.mark.parametrize("by", sorted(DOUBTS))
def test_a_rule_answers_by_its_doubt_and_counts(by):
    random = np.random.default_rng(2)
    margin = 8 * random.normal(size=1000)
    labels = (random.random(1000) < 1 / (1 + np.exp(-margin))).astype(int)
    pair = np.stack([margin + 0.5, margin - 0.5])
    prediction = Prediction(-np.logaddexp(0, np.stack([pair, -pair], -1)))
    rule = bl.risk_control.control_risk(prediction, labels, by=by)
    answers = rule.answers(prediction)
    np.testing.assert_array_equal(answers, DOUBTS[by](prediction) <= rule.threshold)
    assert 0 < answers.sum() == rule.num_answered < 1000
    assert (prediction.probs.argmax(1) != labels)[answers].sum() == rule.num_wrong
    assert rule.coverage == answers.mean()
    assert rule.caution == ""


def test_a_rule_that_answers_nothing_says_so():
    prediction = two_classes(np.zeros(50))
    rule = control_risk(prediction, np.arange(50) % 2)
    assert not rule.answers(prediction).any()
    assert rule.coverage == 0
    assert "the rule answers no row" in rule.caution
    some = control_risk(two_classes(np.full(200, 5.0)), np.ones(200, int))
    for shown in (rule, some):
        assert "<table>" in shown._repr_html_()
        for again in (copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
            assert again == shown
            assert again._repr_html_() == shown._repr_html_()
    assert "answers no row" in rule._repr_html_()


@pytest.mark.parametrize(
    ("num_rows", "labels", "options", "message"),
    [
        (20, [2] * 20, {}, r"must be in 0..1; got 2..2"),
        (20, [0], {}, "one label each"),
        (0, [], {}, "n >= 1 rows"),
        (20, [0] * 20, {"level": 1.0}, r"level must lie in \(0, 1\); got 1.0"),
        (20, [0] * 20, {"max_risk": 0.0}, r"max_risk must lie in \(0, 1\); got 0.0"),
        (20, [0] * 20, {"by": "entropie"}, "nearest is 'entropy'"),
        (20, [0] * 20, {"thresholds": [0.1, np.nan]}, "thresholds must be a vector of finite numbers"),
        (20, [0] * 20, {"thresholds": []}, "thresholds must be a vector of finite numbers"),
    ],
)
def test_bad_input_gets_one_sentence(num_rows, labels, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        control_risk(two_classes(np.zeros(num_rows)), labels, **options)
    assert "\n" not in str(raised.value)
