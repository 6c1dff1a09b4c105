"""Decisions against closed forms, brute force over actions, and numbers by hand."""

import copy
import pickle

import jax
import numpy as np
import pytest

import bnlora as bl
from bnlora.prediction.decisions import (
    Costs,
    cost_difference,
    decide,
    posterior_value,
    realised_cost,
    review_threshold,
    zero_one,
)

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def rows():
    """Log-probabilities of 300 rows of three classes, and labels drawn from them."""
    random = np.random.default_rng(0)
    probs = random.dirichlet([0.6] * 3, 300)
    return np.log(probs), np.array([random.choice(3, p=p) for p in probs])


def test_actions_are_the_best_by_brute_force(rows):
    log_probs, _ = rows
    costs = Costs(np.random.default_rng(1).normal(size=(3, 5)))
    found = decide(log_probs, costs)
    for p, action, expected in zip(np.exp(log_probs), found.actions, found.expected, strict=True):
        by_action = [sum(p[c] * costs.matrix[c, a] for c in range(3)) for a in range(5)]
        assert action == int(np.argmin(by_action))
        assert expected == pytest.approx(min(by_action))


@pytest.mark.parametrize("price", [0.05, 0.2, 0.45, 0.5, 0.9])
def test_two_classes_with_a_review_have_the_threshold_of_chow(price):
    p = np.linspace(0.001, 0.999, 401)
    found = decide(np.log(np.stack([1 - p, p], 1)), zero_one(2, review=price))
    confidence = np.maximum(p, 1 - p)
    clear = np.abs(confidence - review_threshold(price)) > 1e-9
    expected = np.where(confidence < 1 - price, 2, (p > 0.5).astype(int))
    np.testing.assert_array_equal(found.actions[clear], expected[clear])
    np.testing.assert_allclose(found.expected, np.minimum(1 - confidence, price))
    assert (found.actions == 2).any() == (price < 0.5)


def test_many_classes_have_the_same_threshold(rows):
    log_probs, _ = rows
    reviewed = decide(log_probs, zero_one(3, review=0.3)).actions == 3
    np.testing.assert_array_equal(reviewed, np.exp(log_probs).max(1) < review_threshold(0.3))


def test_without_a_review_the_cost_is_the_error_rate(rows):
    log_probs, labels = rows
    found = realised_cost(KEY, log_probs, labels, zero_one(3), num_resamples=50)
    accuracy = bl.metrics.summary(
        KEY, log_probs, labels, num_resamples=50, metrics={"accuracy": bl.metrics.accuracy}
    )["accuracy"]
    expected = [1 - accuracy.value, 1 - accuracy.high, 1 - accuracy.low]
    np.testing.assert_allclose([found.value, found.low, found.high], expected)


def test_costs_by_hand():
    """Discharge costs 20 for the ill, admission 5 for the healthy: admit from 0.8 on, and ask from 0.05."""
    costs = Costs([[0, 5, 1], [20, 0, 1]], actions=["discharge", "admit", "ask"])
    ill = np.array([0.01, 0.04, 0.1, 0.5, 0.85])
    prediction, labels = np.log(np.stack([1 - ill, ill], 1)), np.array([0, 1, 0, 1, 0])
    found = decide(prediction, costs)
    assert [costs.actions[a] for a in found.actions] == ["discharge", "discharge", "ask", "ask", "admit"]
    np.testing.assert_allclose(found.expected, [0.2, 0.8, 1, 1, 0.75])
    assert realised_cost(KEY, prediction, labels, costs).value == (0 + 20 + 1 + 1 + 5) / 5


def test_expected_cost_is_realised_where_the_prediction_is_right(rows):
    log_probs, labels = rows
    costs = Costs([[0, 4, 9, 1], [1, 0, 4, 1], [9, 1, 0, 1]])
    found = realised_cost(KEY, log_probs, labels, costs, num_resamples=500)
    error = (found.high - found.low) / (2 * 1.96)
    assert found.value == pytest.approx(decide(log_probs, costs).expected.mean(), abs=4 * error)


def test_a_difference_is_that_of_the_costs_with_a_paired_interval(rows):
    log_probs, labels = rows
    other = np.log(0.97 * np.exp(log_probs) + 0.01)
    costs = zero_one(3, review=0.25)
    found = cost_difference(KEY, other, log_probs, labels, costs)
    single = [realised_cost(KEY, x, labels, costs) for x in (other, log_probs)]
    assert found.value == pytest.approx(single[0].value - single[1].value)
    assert found.low <= found.value <= found.high
    assert 0 < found.high - found.low < single[0].high - single[0].low
    same = cost_difference(KEY, log_probs, log_probs, labels, costs)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_value_of_the_posterior_by_hand():
    """A point that is sure answers both rows, of which one is wrong; the mixture reviews both."""
    mixture = bl.Prediction(np.log([[[0.98, 0.02]] * 2, [[0.42, 0.58]] * 2]))  # 0.7 and 0.3
    point = bl.Prediction(np.log([[[0.98, 0.02]] * 2]))
    found = posterior_value(KEY, mixture, point, [0, 1], zero_one(2, review=0.1))
    assert found.saving.value == pytest.approx(0.5 - 0.1)
    assert found.expected_saving == pytest.approx(0.3 - 0.1)
    assert found.changed == 1
    nothing = posterior_value(KEY, point, point, [0, 1], zero_one(2))
    assert (nothing.saving.value, nothing.expected_saving, nothing.changed) == (0, 0, 0)


def test_a_right_mixture_saves_what_it_expects_and_a_worse_one_loses(rows):
    log_probs, labels = rows
    sharp = 4 * log_probs - np.logaddexp.reduce(4 * log_probs, axis=1, keepdims=True)
    costs = zero_one(3, review=0.2)
    found = posterior_value(KEY, log_probs, sharp, labels, costs)
    assert found.saving.low < found.expected_saving < found.saving.high
    assert found.saving.low > 0
    back = posterior_value(KEY, sharp, log_probs, labels, costs)
    assert back.expected_saving > 0 > back.saving.high  # its own opinion, and what the labels say


def test_results_show_themselves_and_survive_copies(rows):
    log_probs, labels = rows
    costs = zero_one(3, review=0.2)
    value = posterior_value(KEY, log_probs, log_probs, labels, costs, num_resamples=2)
    for shown in (costs, decide(log_probs, costs), decide(log_probs[:1], Costs(np.eye(3))), value):
        assert "<table>" in shown._repr_html_()
        for again in (copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
            assert repr(again) == repr(shown)
    assert "review" in repr(decide(log_probs, costs))
    assert bl.decisions.zero_one is zero_one


def test_costs_do_not_change_with_the_array_they_came_from():
    matrix = np.eye(2)
    costs = Costs(matrix)
    matrix[0, 0] = 7
    assert costs.matrix[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        costs.matrix[0, 0] = 2


GOOD = np.log(np.full((4, 2), 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Costs([0.0, 1.0]), r"shape \(class, action\), at least \(1, 1\); got \(2,\)"),
        (lambda: Costs(np.zeros((2, 0))), r"at least \(1, 1\); got \(2, 0\)"),
        (lambda: Costs([[0, 1], [1]]), "numbers in rows of equal length"),
        (lambda: Costs([["a", "b"]]), "numbers in rows of equal length"),
        (lambda: Costs([[0, np.nan], [1, 0]]), "costs must be finite; got nan for class 0 and action 1"),
        (lambda: Costs(np.eye(2), ["one"]), "a name for each of 2 actions; got 1"),
        (lambda: zero_one(0), "num_classes must be at least 1"),
        (lambda: zero_one(2, review=1.5), r"must lie in \[0, 1\]"),
        (lambda: review_threshold(float("nan")), r"must lie in \[0, 1\]"),
        (lambda: decide(GOOD, zero_one(3)), "the costs are for 3 classes and the prediction has 2"),
        (lambda: decide(GOOD[:0], zero_one(2)), "n >= 1 rows"),
        (lambda: decide(np.exp(GOOD), zero_one(2)), "row 0 is not a distribution"),
        (lambda: realised_cost(KEY, GOOD, [0, 0, 0, 2], zero_one(2)), r"must be in 0..1; got 0..2"),
        (lambda: realised_cost(KEY, GOOD, [0, 0, 0], zero_one(2)), "one label each"),
        (
            lambda: realised_cost(KEY, GOOD, [0] * 4, zero_one(2), level=1.0),
            "level must lie strictly between",
        ),
        (lambda: realised_cost(7, GOOD, [0] * 4, zero_one(2)), "key must be a random key"),
        (lambda: cost_difference(KEY, GOOD, GOOD[:3], [0] * 4, zero_one(2)), "one label each"),
        (lambda: posterior_value(KEY, GOOD, GOOD, [0] * 4, zero_one(3)), "the costs are for 3 classes"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
