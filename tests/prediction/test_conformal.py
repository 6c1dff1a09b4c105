"""Prediction sets: coverage over many calibrations against the Beta law, and sets by hand and by MAPIE."""

import copy
import pickle
from fractions import Fraction

import jax
import numpy as np
import pytest
from scipy.stats import beta, kstest

import bnlora as bl
from bnlora.prediction.class_scores import class_scores
from bnlora.prediction.conformal import calibrate_sets, coverage_range, fewest_rows

KEY = jax.random.key(0)
CLASSES = 4
WEIGHTS = np.array([0.55, 0.25, 0.15, 0.05])


def draw(random, num_rows, sharpness=1.0):
    """Log-probabilities and labels; the former are right for a sharpness of one, and overconfident above."""
    labels = random.choice(CLASSES, num_rows, p=WEIGHTS)
    inputs = random.normal(size=(num_rows, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    logits = sharpness * (1.5 * inputs + np.log(WEIGHTS))  # Bayes' rule for Gaussians of unit variance
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), labels


def calibrations(score, repeats, num_rows, sharpness, **options):
    """Rules of independent calibration sets."""
    random = np.random.default_rng(7)
    for repeat in range(repeats):
        key = {"key": jax.random.key(repeat)} if score == "randomised" else {}
        name = "probability" if score == "probability" else "adaptive"
        yield calibrate_sets(*draw(random, num_rows, sharpness), score=name, **key, **options)


def pool(score, sharpness, num_rows=40_000):
    """Scores of the true classes of many new rows, and their classes."""
    random = np.random.default_rng(8)
    log_probs, labels = draw(random, num_rows, sharpness)
    places = random.random(num_rows) if score == "randomised" else np.ones(num_rows)
    name = "probability" if score == "probability" else "adaptive"
    return class_scores(log_probs, name, places)[np.arange(num_rows), labels], labels


@pytest.mark.parametrize("sharpness", [1.0, 4.0], ids=["calibrated", "overconfident"])
@pytest.mark.parametrize("score", ["probability", "randomised"])
def test_coverage_follows_the_beta_law(score, sharpness):
    repeats, num_rows, level = (150 if score == "randomised" else 400), 60, 0.8
    scores = np.sort(pool(score, sharpness)[0])
    rules = calibrations(score, repeats, num_rows, sharpness, level=level)
    coverage = [np.searchsorted(scores, rule.thresholds[0], "right") / len(scores) for rule in rules]
    law = beta(49, 12)  # the rank is ceil(61 * 0.8) = 49
    error = 4 * (law.std() / repeats**0.5 + (0.25 / len(scores)) ** 0.5)
    assert np.mean(coverage) == pytest.approx(49 / 61, abs=error)
    assert kstest(coverage, law.cdf).pvalue > 1e-3


def test_without_a_key_adaptive_sets_cover_at_least_as_often():
    scores = np.sort(pool("adaptive", 1.0)[0])
    rules = calibrations("adaptive", 200, 60, 1.0, level=0.8)
    coverage = [np.searchsorted(scores, rule.thresholds[0], "right") / len(scores) for rule in rules]
    assert np.mean(coverage) > 49 / 61 - 4 * beta(49, 12).std() / 200**0.5


def test_of_new_rows_each_set_contains_the_class_as_often_as_the_report_says():
    """One new row for each calibration: the plain statement of the guarantee, with its binomial error."""
    random, repeats, level = np.random.default_rng(9), 200, 0.8
    hits = 0
    for repeat in range(repeats):
        key = jax.random.key(repeat)  # the same key for both parts must do no harm
        rule = calibrate_sets(*draw(random, 19, 3.0), level=level, score="adaptive", key=key)
        log_probs, labels = draw(random, 1, 3.0)
        hits += rule.sets(log_probs, key=key)[0, labels[0]]
    assert hits / repeats == pytest.approx(16 / 20, abs=4 * (0.16 / repeats) ** 0.5)


def test_coverage_within_classes_holds_where_marginal_coverage_does_not():
    repeats, level, sharpness = 150, 0.8, 1.0
    scores, labels = pool("probability", sharpness)
    of_class = [np.sort(scores[labels == c]) for c in range(CLASSES)]
    means = {}
    for coverage in ("marginal", "class"):
        rules = calibrations("probability", repeats, 400, sharpness, level=level, coverage=coverage)
        found = [
            [np.searchsorted(x, t, "right") / len(x) for x, t in zip(of_class, rule.thresholds, strict=True)]
            for rule in rules
        ]
        means[coverage] = np.mean(found, 0)
    assert means["marginal"][3] < 0.6  # the rare class
    error = 4 * (0.16 / 21 / repeats + 0.16 / len(of_class[3])) ** 0.5  # about 20 rows of the rare class
    assert (means["class"] > level - error).all()
    assert (means["class"] < level + 1 / 15 + error).all()


@pytest.mark.parametrize("level", [0.5, 0.55, 0.7, 0.9, 0.95, 0.99])
def test_threshold_is_the_smallest_order_statistic_that_suffices(level):
    random, exact = np.random.default_rng(1), Fraction(str(level))
    for num_rows in (1, 2, 9, 10, 19, 20, 99, 100):
        log_probs, labels = draw(random, num_rows)
        rule = calibrate_sets(log_probs, labels, level=level)
        scores = np.sort(1 - np.exp(log_probs)[np.arange(num_rows), labels])
        enough = [k for k in range(1, num_rows + 1) if Fraction(k, num_rows + 1) >= exact]
        assert rule.thresholds[0] == (scores[enough[0] - 1] if enough else np.inf)
        assert (num_rows >= fewest_rows(level)) == bool(enough)
        assert bool(rule.caution) != bool(enough)
        assert rule.sets(log_probs).all() or enough


def test_sets_are_those_of_the_definition():
    random = np.random.default_rng(2)
    log_probs, labels = draw(random, 50)
    new, _ = draw(random, 20)
    probs = np.exp(new)
    plain = calibrate_sets(log_probs, labels, level=0.8)
    adaptive = calibrate_sets(log_probs, labels, level=0.8, score="adaptive")
    for row, first, second in zip(probs, plain.sets(new), adaptive.sets(new), strict=True):
        for c in range(CLASSES):
            assert first[c] == (1 - row[c] <= plain.thresholds[c])
            up_to = sum(p for p in row if p >= row[c])
            assert second[c] == (up_to <= adaptive.thresholds[c] + 1e-12)


def test_adaptive_scores_by_hand():
    """0.5, 0.3 and 0.2 with u = 0.25; of two equal classes the first comes first."""
    log_probs = np.log([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    found = class_scores(log_probs, "adaptive", np.array([0.25, 1.0]))
    np.testing.assert_allclose(found, [[0.85, 0.125, 0.575], [0.4, 0.8, 1.0]])


def test_thresholds_and_sets_are_those_of_mapie():
    """MAPIE 1.6.0, a prefit `SplitConformalClassifier` with `conformity_score="lac"`, on the same numbers."""
    random = np.random.default_rng(5)
    probs = random.dirichlet([0.7] * 4, 60)
    labels = np.array([random.choice(4, p=p) for p in probs])
    new = random.dirichlet([0.7] * 4, 25)
    new_labels = np.array([random.choice(4, p=p) for p in new])
    stored = {
        0.8: (0.76204378, "3121122222212212232221112", 0.84, 1.76),
        0.9: (0.93521601, "3241223322333233234424422", 1.0, 2.72),
        0.95: (0.94300572, "3241223323333233234424422", 1.0, 2.76),
    }
    for level, (threshold, sizes, coverage, size) in stored.items():
        rule = calibrate_sets(np.log(probs), labels, level=level)
        np.testing.assert_allclose(rule.thresholds, threshold, rtol=1e-7)
        assert "".join(map(str, rule.sets(np.log(new)).sum(1))) == sizes
        report = rule.report(np.log(new), new_labels)
        assert (report.coverage.value, report.mean_size) == (coverage, size)


def test_a_report_counts():
    p = np.array([0.1, 0.9, 0.6, 0.4, 0.7, 0.2, 0.3, 0.8, 0.45])
    rule = calibrate_sets(np.log(np.stack([1 - p, p], 1)), np.ones(9, int), level=0.5)  # p >= 0.45
    new = np.log([[0.5, 0.5], [0.1, 0.9], [0.9, 0.1], [0.8, 0.2]])
    report = rule.report(new, [0, 0, 0, 0])
    np.testing.assert_array_equal(report.sizes, [0, 3, 1])
    assert (report.coverage.value, report.mean_size, report.singletons, report.empty) == (0.75, 1.25, 0.75, 0)
    assert report.class_coverage[0] == report.coverage
    assert np.isnan(report.class_coverage[1].value)
    low, high = bl.metrics.wilson(np.array(3), np.array(4))
    assert (report.coverage.low, report.coverage.high) == (low, high)
    assert calibrate_sets(np.log([[0.1, 0.9]] * 9), np.ones(9, int)).report(new, [1] * 4).empty == 0.5


def test_a_range_holds_as_many_coverages_as_it_says():
    low, high = coverage_range(100, level=0.9, probability=0.8)
    law = beta(91, 10)
    assert law.cdf(high) - law.cdf(low) == pytest.approx(0.8)
    assert coverage_range(8, level=0.9) == (1.0, 1.0)


def test_a_prediction_and_its_log_probs_give_the_same_sets():
    random = np.random.default_rng(3)
    draws = np.stack([draw(random, 30)[0] for _ in range(3)])
    prediction, labels = bl.Prediction(draws), random.choice(CLASSES, 30)
    rule = bl.conformal.calibrate_sets(prediction, labels)
    same = calibrate_sets(prediction.log_probs, labels)
    np.testing.assert_array_equal(rule.sets(prediction), same.sets(prediction.log_probs))


def test_a_key_gives_the_same_sets_again_and_another_key_others():
    log_probs, labels = draw(np.random.default_rng(4), 200)
    rule = calibrate_sets(log_probs, labels, score="adaptive", key=KEY)
    np.testing.assert_array_equal(rule.sets(log_probs, key=KEY), rule.sets(log_probs, key=KEY))
    assert (rule.sets(log_probs, key=KEY) != rule.sets(log_probs, key=jax.random.key(1))).any()


@pytest.mark.parametrize("coverage", ["marginal", "class"])
def test_rules_and_reports_show_themselves_and_say_what_is_missing(coverage):
    log_probs, labels = np.log(np.full((12, 2), 0.5)), np.repeat([0, 1], [11, 1])
    rule = calibrate_sets(log_probs, labels, level=0.95, coverage=coverage)
    assert "at least 19 calibration rows" in rule.caution
    few = calibrate_sets(log_probs, labels, level=0.9, coverage=coverage)
    expected = "class 1 is in every set" if coverage == "class" else ""
    assert few.caution.endswith(expected)
    assert bool(few.caution) == bool(expected)
    for shown in (rule, few, few.report(log_probs, labels)):
        for again in (copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
            assert repr(again) == repr(shown)
        assert "<table>" in shown._repr_html_()
    assert " ".join(rule.caution.split()) in " ".join(repr(rule).split())


GOOD = np.log(np.full((20, 2), 0.5))


@pytest.mark.parametrize(
    ("log_probs", "labels", "options", "message"),
    [
        (GOOD, [2] * 20, {}, r"the labels of the predicted rows must be in 0..1; got 2..2"),
        (GOOD, [0] * 19, {}, "one label each"),
        (GOOD[:0], [], {}, "at least|n >= 1 rows"),
        (np.full((20, 2), 0.5), [0] * 20, {}, "row 0 is not a distribution"),
        (GOOD, [0] * 20, {"level": 1.0}, r"level must lie in \(0, 1\); got 1.0"),
        (GOOD, [0] * 20, {"level": 0}, r"level must lie in \(0, 1\); got 0"),
        (GOOD, [0] * 20, {"score": "adaptiv"}, "nearest is 'adaptive'"),
        (GOOD, [0] * 20, {"coverage": "classes"}, "nearest is 'class'"),
        (GOOD, [0] * 20, {"coverage": "class"}, "there is none of class 1"),
        (GOOD, [0] * 20, {"key": KEY}, "a key randomises score='adaptive' only"),
        (GOOD, [0] * 20, {"key": 7, "score": "adaptive"}, "key must be a random key"),
    ],
)
def test_bad_calibrations_get_one_sentence(log_probs, labels, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        calibrate_sets(log_probs, labels, **options)
    assert "\n" not in str(raised.value)


def test_bad_predictions_get_one_sentence():
    plain = calibrate_sets(GOOD, [0] * 20)
    randomised = calibrate_sets(GOOD, [0] * 20, score="adaptive", key=KEY)
    for call, message in (
        (lambda: plain.sets(np.log(np.full((3, 4), 0.25))), "calibrated for 2 classes; got 4"),
        (lambda: plain.sets(GOOD, key=KEY), "pass none to its sets"),
        (lambda: randomised.sets(GOOD), "pass a key to its sets too"),
        (lambda: randomised.sets(GOOD, key=7), "key must be a random key"),
        (lambda: plain.report(GOOD, [0]), "one label each"),
        (lambda: coverage_range(0), "num_rows must be at least 1"),
        (lambda: coverage_range(9, probability=1.0), "probability must lie in"),
        (lambda: fewest_rows(1.5), "level must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
