"""Metrics against scikit-learn, the definitions and cases worked out by hand; intervals by their coverage."""

import importlib
from itertools import product

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from bnlora import metrics
from bnlora._util.checks import numpy_generator
from bnlora.metrics.scores import checked
from bnlora.prediction.predict import Prediction

KEY = jax.random.key(0)


def simulate(seed: int, rows: int = 200, classes: int = 3, ties: int | None = None):
    """Rows whose classes are drawn from the stated probabilities, so that the prediction is calibrated."""
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.full(classes, 0.7), size=rows) * 0.98 + 0.02 / classes
    if ties:
        probs = np.round(probs[:, :1] * ties) / ties * 0.98 + 0.01
        probs = np.concatenate([probs, 1 - probs], axis=1)
    labels = (random.random((rows, 1)) > probs.cumsum(1)[:, :-1]).sum(1)
    return np.log(probs), labels


CASES = [simulate(0), simulate(1, classes=2), simulate(2, ties=4), simulate(3, rows=7)]


@pytest.mark.parametrize(("log_probs", "labels"), CASES)
def test_proper_scores_against_scikit_learn(log_probs, labels):
    probs, classes = np.exp(log_probs), np.arange(log_probs.shape[1])
    assert metrics.accuracy(log_probs, labels) == sk.accuracy_score(labels, probs.argmax(1))
    np.testing.assert_allclose(
        metrics.nll(log_probs, labels), sk.log_loss(labels, probs, labels=classes), rtol=1e-9
    )
    onehot = np.eye(len(classes))[labels]
    np.testing.assert_allclose(
        metrics.brier(log_probs, labels), len(classes) * sk.mean_squared_error(onehot, probs), rtol=1e-9
    )


@pytest.mark.parametrize(("log_probs", "labels"), CASES)
def test_auroc_against_scikit_learn(log_probs, labels):
    correct = log_probs.argmax(1) == labels
    expected = sk.roc_auc_score(correct, np.exp(log_probs.max(1)))
    np.testing.assert_allclose(metrics.auroc(log_probs, labels), expected, rtol=1e-12)


def brute_ece(log_probs, labels, bins):
    """Equal-width errors by the definition, one bin at a time: (expected, largest)."""
    confidence, correct = np.exp(log_probs.max(1)), log_probs.argmax(1) == labels
    gaps, shares = [], []
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gaps.append(abs(correct[inside].mean() - confidence[inside].mean()))
            shares.append(inside.mean())
    return float(np.dot(gaps, shares)), max(gaps)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize(("log_probs", "labels"), CASES)
def test_ece_and_mce_by_definition(log_probs, labels, bins):
    expected, largest = brute_ece(log_probs, labels, bins)
    np.testing.assert_allclose(metrics.ece(log_probs, labels, bins=bins), expected, rtol=1e-9)
    np.testing.assert_allclose(metrics.mce(log_probs, labels, bins=bins), largest, rtol=1e-9)


def test_adaptive_ece_by_hand():
    confidence = np.array([0.6, 0.7, 0.8, 0.9])
    log_probs = np.log(np.stack([confidence, 1 - confidence], 1))
    labels = np.array([0, 1, 0, 0])
    # Two bins of two rows: |1/2 - 0.65| and |1 - 0.85|, each with half of the rows.
    np.testing.assert_allclose(metrics.adaptive_ece(log_probs, labels, bins=2), 0.15, rtol=1e-12)


def test_aurc_by_definition_without_ties_and_as_a_mean_over_orders_with_ties():
    log_probs, labels = CASES[0]
    order = np.argsort(-log_probs.max(1))
    wrong = (log_probs.argmax(1) != labels)[order]
    expected = np.mean([wrong[: i + 1].mean() for i in range(len(wrong))])
    np.testing.assert_allclose(metrics.aurc(log_probs, labels), expected, rtol=1e-12)
    tied = np.log(np.full((2, 2), 0.5))
    # One right and one wrong row, equally confident: the first error rate is 0 or 1, the second 1/2.
    np.testing.assert_allclose(metrics.aurc(tied, np.array([0, 1])), 0.5, rtol=1e-12)


def test_a_perfect_and_a_confidently_wrong_prediction():
    sure = np.log(np.array([[1 - 1e-12, 1e-12]] * 4))
    for metric in (metrics.nll, metrics.brier, metrics.ece, metrics.adaptive_ece, metrics.mce):
        assert metric(sure, np.zeros(4, int)) < 1e-10
    assert metrics.ece(sure, np.ones(4, int)) > 1 - 1e-10
    np.testing.assert_allclose(metrics.brier(sure, np.ones(4, int)), 2, rtol=1e-9)
    assert np.isnan(metrics.auroc(sure, np.zeros(4, int)))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5))
def test_ranges_and_invariance_to_the_order_of_rows(seed, rows, classes):
    log_probs, labels = simulate(seed, rows, classes)
    shuffled = np.random.default_rng(seed).permutation(rows)
    for name, metric in metrics.METRICS.items():
        value = metric(log_probs, labels)
        assert np.isnan(value) or 0 <= value <= (np.inf if name == "nll" else 2)
        np.testing.assert_allclose(value, metric(log_probs[shuffled], labels[shuffled]), atol=1e-12)


@pytest.mark.slow
def test_bootstrap_interval_of_nll_covers_at_its_level():
    truth = metrics.nll(*simulate(99, rows=400_000))
    runs = [
        metrics.summary(KEY, *CASE, num_resamples=200, metrics={"nll": metrics.nll})["nll"]
        for CASE in map(simulate, range(1000, 1300))
    ]
    covered = sum(e.low <= truth <= e.high for e in runs)
    # A two-sided binomial test at 1e-3, with one point allowed for the percentile bootstrap at 200 rows.
    assert covered >= stats.binom.ppf(5e-4, len(runs), 0.94)
    assert covered <= stats.binom.ppf(1 - 5e-4, len(runs), 0.96)


def test_summary_brackets_its_values_and_reads_like_a_table():
    log_probs, labels = CASES[0]
    summary = metrics.summary(KEY, log_probs, labels, num_resamples=100)
    assert list(summary) == list(metrics.METRICS)
    for name in ("accuracy", "nll", "brier", "auroc", "aurc"):
        assert summary[name].low <= summary[name].value <= summary[name].high
    assert summary == metrics.summary(KEY, log_probs, labels, num_resamples=100)
    assert "95% interval" in repr(summary)
    assert "[0." in repr(summary)
    assert "<td>adaptive_ece</td>" in summary._repr_html_()


def test_paired_difference_is_narrower_than_two_separate_intervals():
    log_probs, labels = CASES[1]
    cooler = log_probs * 0.9
    cooler = cooler - np.logaddexp.reduce(cooler, axis=1, keepdims=True)
    paired = metrics.paired_difference(KEY, metrics.nll, log_probs, cooler, labels)
    one = metrics.summary(KEY, log_probs, labels)["nll"]
    np.testing.assert_allclose(paired.value, metrics.nll(log_probs, labels) - metrics.nll(cooler, labels))
    assert paired.high - paired.low < 0.5 * (one.high - one.low)
    same = metrics.paired_difference(KEY, metrics.nll, log_probs, log_probs, labels)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def exact_bootstrap(statistic, num_rows):
    """The statistic of every one of the n^n equally likely samples of n rows."""
    samples = product(range(num_rows), repeat=num_rows)
    return np.array([statistic(np.array(rows)) for rows in samples])


def holds_quantile(values, end, at, resamples):
    """Whether the end is a quantile of these equally likely values, within five errors of the level."""
    slack = 5 * np.sqrt(at * (1 - at) / resamples)
    return np.mean(values < end) <= at + slack and np.mean(values <= end) >= at - slack


IMPOSSIBLE = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [1.0, 0.0]])
"""Five rows whose true classes are the first, but for the last row, which gives its own no probability."""

TRUTH = np.array([0, 0, 0, 0, 1])


@pytest.mark.parametrize("level", [0.95, 0.2])
def test_bootstrap_against_every_sample_where_some_are_infinite(level):
    """Seven in ten samples of five rows hold a given row; the others are finite and fill the lower end."""
    with np.errstate(divide="ignore"):
        log_probs = np.log(IMPOSSIBLE)
    resamples = 4000
    by_row = -log_probs[np.arange(5), TRUTH]
    every = exact_bootstrap(lambda rows: by_row[rows].mean(), 5)
    np.testing.assert_allclose(np.isinf(every).mean(), 1 - 0.8**5)
    found = metrics.bootstrap(
        KEY, lambda rows: float(by_row[rows].mean()), 5, level=level, num_resamples=resamples
    )
    assert holds_quantile(every, found.low, (1 - level) / 2, resamples)
    assert (found.value, found.high) == (np.inf, np.inf)
    assert np.isfinite(found.low) == (
        level == 0.95
    )  # a third of the samples are finite: 0.025 of them all are below, 0.4 are not
    same = metrics.summary(KEY, log_probs, TRUTH, level=level, num_resamples=resamples)["nll"]
    np.testing.assert_allclose([*vars(same).values()], [*vars(found).values()])


def test_bootstrap_against_every_sample_where_some_have_no_value():
    """Samples without a wrong row have no area; the interval is that of the others."""
    log_probs, labels = np.log(np.clip(IMPOSSIBLE, 0.01, 0.99)), np.array([0, 1, 0, 0, 0])
    resamples = 2000

    def area(rows):
        return metrics.auroc(log_probs[rows], labels[rows])

    every = exact_bootstrap(area, 5)
    every = every[~np.isnan(every)]
    found = metrics.summary(
        KEY, log_probs, labels, num_resamples=resamples, metrics={"auroc": metrics.auroc}
    )["auroc"]
    kept = resamples * len(every) / 5**5 * 0.9
    assert holds_quantile(every, found.low, 0.025, kept)
    assert holds_quantile(every, found.high, 0.975, kept)
    undefined = metrics.summary(KEY, log_probs, log_probs.argmax(1), num_resamples=20)["auroc"]
    assert np.isnan([*vars(undefined).values()]).all()


def test_paired_difference_of_infinite_values():
    with np.errstate(divide="ignore"):
        sure, doubting = np.log(IMPOSSIBLE), np.log(0.9 * IMPOSSIBLE + 0.05)
    ours = metrics.paired_difference(KEY, metrics.nll, sure, doubting, TRUTH)
    theirs = metrics.paired_difference(KEY, metrics.nll, doubting, sure, TRUTH)
    assert (ours.value, ours.high) == (np.inf, np.inf)
    assert (theirs.value, theirs.low, theirs.high) == (-np.inf, -np.inf, -ours.low)
    by_row = doubting[np.arange(5), TRUTH] - sure[np.arange(5), TRUTH]
    every = exact_bootstrap(lambda rows: by_row[rows].mean(), 5)
    assert holds_quantile(every, ours.low, 0.025, 1000)
    assert str(ours).endswith("inf]")
    # Both give the row probability zero, so no sample of rows can order them.
    with np.errstate(divide="ignore"):
        other = np.log(IMPOSSIBLE**2 / (IMPOSSIBLE**2).sum(1, keepdims=True))
    neither = metrics.paired_difference(
        KEY, lambda *given: np.float64(metrics.nll(*given)), sure, other, TRUTH
    )
    assert np.isnan([*vars(neither).values()]).all()
    assert np.isfinite(
        [*vars(metrics.paired_difference(KEY, metrics.brier, sure, other, TRUTH)).values()]
    ).all()


def test_interval_ends_are_the_usual_quantiles_of_finite_replicates():
    log_probs, labels = CASES[1]
    rows = numpy_generator(KEY).integers(len(labels), size=(50, len(labels)))
    expected = np.quantile([metrics.brier(log_probs[r], labels[r]) for r in rows], [0.05, 0.95])
    found = metrics.summary(KEY, log_probs, labels, level=0.9, num_resamples=50)["brier"]
    np.testing.assert_allclose([found.low, found.high], expected)


def test_a_bootstrap_checks_its_input_once(monkeypatch):
    log_probs, labels = simulate(4)
    expected = metrics.summary(KEY, log_probs, labels, num_resamples=20)
    calls = []

    def counting(*args):
        calls.append(args)
        return checked(*args)

    for module in ("summary", "scores"):
        monkeypatch.setattr(importlib.import_module(f"bnlora.metrics.{module}"), "checked", counting)
    assert metrics.summary(KEY, log_probs, labels, num_resamples=20).estimates == expected.estimates
    assert len(calls) == 1
    metrics.paired_difference(KEY, metrics.nll, log_probs, log_probs, labels, num_resamples=20)
    assert len(calls) == 3


def test_a_prediction_stands_for_its_mixture():
    draws = np.stack([CASES[1][0], np.log(np.full_like(CASES[1][0], 0.5))])
    labels, prediction = CASES[1][1], Prediction(draws)
    for metric in metrics.METRICS.values():
        assert metric(prediction, labels) == metric(prediction.log_probs, labels)


def test_reliability_bins_and_wilson_intervals():
    log_probs, labels = CASES[1]
    curve = metrics.reliability(log_probs, labels, bins=10)
    assert curve.count.sum() == len(labels)
    np.testing.assert_allclose(
        (curve.count * abs(curve.accuracy - curve.confidence)).sum() / len(labels),
        metrics.ece(log_probs, labels, bins=10),
    )
    for n, share, low, high in zip(curve.count, curve.accuracy, curve.low, curve.high, strict=True):
        expected = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
        np.testing.assert_allclose([low, high], [expected.low, expected.high], atol=1e-9)


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), r"n >= 1 rows and c >= 1 classes; got shape \(0, 2\)"),
        (np.log([[0.5, 0.5]]), [0, 1], r"need one label each, shape \(1,\); got shape \(2,\)$"),
        (np.log([[0.5, 0.5]]), [[0]], r"shape \(1,\); got shape \(1, 1\); pass labels\[:, 0\]"),
        (
            np.log([[0.5, 0.5]]),
            [" good"],
            r"must be class numbers, integers; got ' good' .*words.index",
        ),
        (np.log([[0.5, 0.5]]), np.array(["bad"], object), r"got 'bad' of type object: .*words.index"),
        (np.log([[0.5, 0.5]]), [1.0], r"got 1.0 of type float64: .* labels.astype\(int\)"),
        (np.log([[0.5, 0.5]]), [None], "got None of type object"),
        (np.log([[0.5, 0.5]]), [-1], r"must be in 0..1; got -1..-1 \(-1 marks rows without a label\)"),
        (np.array([[0.5, 0.5]]), [0], "row 0 is not a distribution: its probabilities sum to 3.2"),
        (np.array([[np.nan, 0.0]]), [0], "row 0 is not a distribution"),
        (np.log([[0.5, 0.5]]), [2], "labels of the predicted rows must be in 0..1; got 2..2"),
    ],
)
def test_bad_input(log_probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.summary(KEY, log_probs, labels)


def test_labels_may_be_truth_values():
    log_probs, labels = CASES[1]
    for metric in metrics.METRICS.values():
        assert metric(log_probs, labels == 1) == metric(log_probs, labels)


def test_bad_level_resamples_and_bins():
    with pytest.raises(ValueError, match="resamples must be at least 1; got 0"):
        metrics.summary(KEY, *CASES[0], num_resamples=0)
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1; got 95"):
        metrics.summary(KEY, *CASES[0], level=95)
    with pytest.raises(ValueError, match="bins must be at least 1; got 0"):
        metrics.ece(*CASES[0], bins=0)
