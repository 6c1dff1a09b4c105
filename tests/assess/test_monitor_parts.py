"""The parts of the monitor: evidence, confidence sequences, ranks and bets, over many simulated streams."""

import math

import numpy as np
import pytest
from scipy.stats import kstest

from bnlora.assess.monitor import Bins, Evidence, MeanSequence, Ranks
from bnlora.assess.monitor.betting import log_bets_below, log_mixture
from bnlora.assess.monitor.calibration import LARGEST, log_bets_on_calibration
from bnlora.assess.monitor.sequences import GRID, log_payments, predictable_stakes
from bnlora.assess.monitor.shift import LEAST_REFERENCE, log_bets_on_ranks

STREAMS = 1000
ALPHA = 0.05


def most(count: int, alpha: float = ALPHA) -> float:
    """Largest share of false alarms in so many streams: alpha and three standard errors."""
    return alpha + 3 * (alpha * (1 - alpha) / count) ** 0.5


def paths(log_bets: np.ndarray) -> np.ndarray:
    """Log-evidence after every row of independent streams."""
    start = np.full((*log_bets.shape[:-2], log_bets.shape[-1]), -np.inf)
    return log_mixture(log_bets, start, 0)[1]


def delays(log_bets: np.ndarray, change: int, alpha: float = ALPHA) -> np.ndarray:
    """Rows from the change to the first alarm; infinity without alarm."""
    above = paths(log_bets) >= -np.log(alpha)
    return np.where(above.any(1), above.argmax(1) - change + 1.0, np.inf)


def test_evidence_is_the_mixture_over_bets_and_start_times():
    """Against a double sum over all start times."""
    log_bets = np.random.default_rng(0).normal(size=(12, 3))
    _, path = Evidence.start(3).update(log_bets)
    left = 1 / (1 + np.log(1 + np.arange(13)))
    for t in range(1, 13):
        capital = [
            (left[j - 1] - left[j]) * np.exp(log_bets[j - 1 : t].sum(0)).mean() for j in range(1, t + 1)
        ]
        assert np.exp(path[t - 1]) == pytest.approx(sum(capital) + left[t])


def test_evidence_is_the_same_in_pieces_and_does_not_overflow():
    log_bets = np.random.default_rng(1).normal(0.5, 1, size=(5000, 4))
    whole, path = Evidence.start(4).update(log_bets)
    part, pieces = Evidence.start(4), []
    for piece in np.split(log_bets, [1, 2, 700, 4000]):
        part, more = part.update(piece)
        pieces.append(more)
    np.testing.assert_allclose(np.concatenate(pieces), path, rtol=1e-12, atol=1e-9)
    assert part.log_peak == pytest.approx(whole.log_peak)
    assert path[-1] > 2000
    assert np.isfinite(whole.peak)
    same, nothing = whole.update(np.zeros((0, 4)))
    assert same is whole
    assert len(nothing) == 0


def brute_force(values, level):
    """The interval by the definition of hedged capital, a mean and a row at a time."""
    alpha, kept, stakes = 1 - level, [], []
    for i in range(1, len(values) + 1):
        seen = values[: i - 1]
        means = [(0.5 + sum(seen[:j])) / (j + 1) for j in range(1, i)]
        variance = (0.25 + sum((a - b) ** 2 for a, b in zip(seen, means, strict=True))) / i
        stakes.append((2 * math.log(2 / alpha) / (variance * i * math.log(1 + i))) ** 0.5)
    for m in GRID:
        up = down = 1.0
        for x, stake in zip(values, stakes, strict=True):
            up *= 1 + (min(stake, 0.5 / m) if m else stake) * (x - m)
            down *= 1 - (min(stake, 0.5 / (1 - m)) if m < 1 else stake) * (x - m)
        if max(up, down) / 2 < 1 / alpha:
            kept.append(int(np.flatnonzero(GRID == m)[0]))
    return GRID[max(kept[0] - 1, 0)], GRID[min(kept[-1] + 1, len(GRID) - 1)], len(kept)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sequence_is_that_of_brute_force(seed):
    random = np.random.default_rng(seed)
    values = [(random.random(25) < 0.9).astype(float), random.beta(2, 5, 25)][seed]
    sequence = MeanSequence.start(0.0, 1.0, level=0.9)
    for value in values:  # a row at a time
        sequence = sequence.update(np.array([value]))
    low, high, count = brute_force(list(values), 0.9)
    assert sequence.interval == pytest.approx((low, high))
    kept = np.flatnonzero(sequence._log_hedged < np.log(10))
    assert len(kept) == count == kept[-1] - kept[0] + 1  # an interval
    np.testing.assert_allclose(
        MeanSequence.start(0.0, 1.0, level=0.9).update(values).log_above, sequence.log_above, rtol=1e-12
    )


def test_a_sequence_of_another_range_is_the_same_but_for_the_scale():
    values = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0] * 5, float)
    sequence = MeanSequence.start(0.0, 1.0).update(values)
    low, high, _ = brute_force(list(values), 0.95)
    assert sequence.interval == pytest.approx((low, high))
    scaled = MeanSequence.start(-1.0, 3.0).update(4 * values - 1)
    assert scaled.interval == pytest.approx((4 * low - 1, 4 * high - 1))
    assert scaled.mean == pytest.approx(4 * 0.75 - 1)


DISTRIBUTIONS = {
    "right answers": (lambda random, size: (random.random(size) < 0.9).astype(float), 0.9),
    "rarely wrong": (lambda random, size: (random.random(size) < 0.99).astype(float), 0.99),
    "Brier scores": (lambda random, size: random.beta(0.3, 1.2, size), 0.2),
    "uniform": (lambda random, size: random.random(size), 0.5),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_all_intervals_of_a_stream_contain_the_mean(name):
    """At every one of 800 rows, with probability 1 - alpha, over 1,000 streams."""
    draw, mean = DISTRIBUTIONS[name]
    values = draw(np.random.default_rng(2), (STREAMS, 800))
    stakes, _, _ = predictable_stakes(values, level=1 - ALPHA)
    above, below = log_payments(values, stakes, mean)
    hedged = np.maximum(np.cumsum(above, 1), np.cumsum(below, 1)) - np.log(2)
    missed = (hedged >= -np.log(ALPHA)).any(1).mean()
    assert missed <= most(STREAMS)


def test_the_sequence_contains_the_mean_wherever_the_capital_does():
    random = np.random.default_rng(3)
    for _ in range(20):
        sequence = MeanSequence.start(0.0, 1.0)
        for _ in range(10):
            sequence = sequence.update((random.random(30) < 0.8).astype(float))
            assert sequence.interval[0] < 0.8 < sequence.interval[1]
            assert sequence.fits
    width = sequence.interval[1] - sequence.interval[0]
    assert 0.1 < width < 0.2  # of 300 rows; the pointwise interval has 0.09


def test_a_mean_that_moves_is_reported():
    values = np.concatenate([np.ones(400), np.zeros(400)])
    assert not MeanSequence.start(0.0, 1.0).update(values).fits
    narrow = MeanSequence.start(0.0, 1.0).update(values).interval
    assert narrow[0] < narrow[1]


def test_values_beyond_the_range_and_empty_ranges_are_refused():
    with pytest.raises(ValueError, match="values must be from 0.0 to 1.0; got 1.5"):
        MeanSequence.start(0.0, 1.0).update(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match="low must be below high"):
        MeanSequence.start(1.0, 1.0)
    assert np.isnan(MeanSequence.start(0.0, 1.0).mean)


def accuracy_bets(random, probability, floor):
    return log_bets_below((random.random(np.shape(probability)) < probability).astype(float), floor)


@pytest.mark.parametrize("floor", [0.5, 0.9, 0.99])
def test_an_accuracy_at_its_floor_raises_few_alarms(floor):
    """At the floor itself, where false alarms are most frequent; read at each of 600 rows."""
    bets = accuracy_bets(np.random.default_rng(4), np.full((STREAMS, 600), floor), floor)
    assert (paths(bets) >= -np.log(ALPHA)).any(1).mean() <= most(STREAMS)


def test_the_payments_of_bets_have_mean_one_or_less_under_the_null():
    floor = 0.8
    right, wrong = np.exp(log_bets_below(np.array([1.0, 0.0]), floor))
    np.testing.assert_allclose(floor * right + (1 - floor) * wrong, 1)
    confidence = np.array([0.51, 0.7, 0.95, 0.9999, 1 - 1e-6, 1 - 1e-12])
    right, wrong = (np.exp(log_bets_on_calibration(confidence, np.full(6, y))) for y in (True, False))
    mean = confidence[:, None] * right + (1 - confidence[:, None]) * wrong
    assert (mean <= 1 + 1e-12).all()
    np.testing.assert_allclose(mean[confidence <= LARGEST], 1)
    grid = (np.arange(200_000) + 0.5) / 200_000
    np.testing.assert_allclose(np.exp(log_bets_on_ranks(grid)).mean(0), 1, atol=2e-3)


def test_a_fall_of_the_accuracy_is_found():
    """From 0.9 to 0.75 after 500 rows, against a floor of 0.87: nine in ten within 350 rows."""
    truth = np.where(np.arange(1000) < 500, 0.9, 0.75) * np.ones((400, 1))
    found = delays(accuracy_bets(np.random.default_rng(5), truth, 0.87), 500)
    assert np.quantile(found, 0.9) < 350
    assert (found <= 0).mean() <= most(400)


def calibrated(random, shape, slope=1.0):
    """Confidences, and whether rows are right if logits are to be multiplied by the slope."""
    confidence = np.maximum(x := random.beta(3, 1, shape), 1 - x)
    odds = (confidence / (1 - confidence)) ** slope
    return confidence, random.random(shape) < odds / (1 + odds)


def test_calibrated_confidence_raises_few_alarms():
    bets = log_bets_on_calibration(*calibrated(np.random.default_rng(6), (STREAMS, 400)))
    assert (paths(bets) >= -np.log(ALPHA)).any(1).mean() <= most(STREAMS)


@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_confidence_that_is_too_high_or_too_low_is_found(slope):
    """A temperature of 2 or 1/2 from row 500 on: nine in ten within 500 rows."""
    slopes = np.where(np.arange(1200) < 500, 1.0, slope)
    bets = log_bets_on_calibration(*calibrated(np.random.default_rng(7), (200, 1200), slopes))
    found = delays(bets, 500)
    assert np.quantile(found, 0.9) < 500
    assert (found <= 0).mean() <= most(200)


def test_bins_are_the_expected_calibration_error():
    from bnlora.metrics import ece

    confidence, correct = calibrated(np.random.default_rng(8), 500)
    bins = Bins.start()
    for piece in np.array_split(np.arange(500), 7):
        bins = bins.update(confidence[piece], correct[piece])
    log_probs = np.log(np.stack([1 - confidence, confidence], 1))
    assert bins.ece == pytest.approx(ece(log_probs, correct.astype(int)))
    assert bins.table.title.startswith(f"Calibration by confidence: running ECE {bins.ece:.3f}")
    assert np.isnan(Bins.start().ece)


SCORES = {
    "continuous": lambda random, size: random.gamma(1.0, size=size),
    "ties": lambda random, size: random.integers(0, 4, size).astype(float),
    "constant": lambda random, size: np.zeros(size),
}


def rank_bets(random, reference, new):
    """Log-payments and p-values of one stream."""
    _, p_values = Ranks.start(random, reference).update(new, 1 - random.random(len(new)))
    return log_bets_on_ranks(p_values), p_values


@pytest.mark.parametrize("name", SCORES)
def test_exchangeable_scores_have_uniform_ranks_and_raise_few_alarms(name):
    """Each stream has its own small reference: the level holds for any number of reference rows."""
    random, draw = np.random.default_rng(9), SCORES[name]
    streams = [rank_bets(random, draw(random, 60), draw(random, 150)) for _ in range(STREAMS)]
    alarms = (paths(np.stack([bets for bets, _ in streams])) >= -np.log(ALPHA)).any(1)
    assert alarms.mean() <= most(STREAMS)
    assert kstest(np.concatenate([p for _, p in streams]), "uniform").pvalue > 1e-3


def test_ranks_are_those_of_a_loop_over_all_scores():
    random = np.random.default_rng(10)
    reference, new = random.integers(0, 9, 90).astype(float), random.integers(0, 12, 700).astype(float)
    ranks, uniform = Ranks.start(random, reference), 1 - random.random(700)
    _, p_values = ranks.update(new, uniform)
    bins = np.searchsorted(ranks.edges, new, "left") + np.searchsorted(ranks.edges, new, "right")
    seen = list(np.repeat(np.arange(len(ranks.counts)), ranks.counts))
    for b, u, p in zip(bins, uniform, p_values, strict=True):
        larger, equal = sum(x > b for x in seen), sum(x == b for x in seen)
        assert p == pytest.approx((larger + u * (1 + equal)) / (1 + len(seen)))
        seen.append(b)
    part = ranks
    for piece in np.split(np.arange(700), [1, 2, 600]):
        part, some = part.update(new[piece], uniform[piece])
        np.testing.assert_allclose(some, p_values[piece])


CHANGES = {
    "larger": lambda random, size: random.gamma(1.0, size=size) * 2,
    "smaller": lambda random, size: random.gamma(1.0, size=size) / 2,
    "narrower": lambda random, size: 0.5 + random.random(size) / 2,
    "from constant": None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_scores_is_found(name):
    """After 300 rows like the reference: nine in ten of 100 streams within 300 rows."""
    random, before, found = np.random.default_rng(11), SCORES["continuous"], []
    after = CHANGES[name] or before
    before = SCORES["constant"] if CHANGES[name] is None else before
    streams = [
        rank_bets(random, before(random, 500), np.r_[before(random, 300), after(random, 400)])[0]
        for _ in range(100)
    ]
    found = delays(np.stack(streams), 300)
    assert np.quantile(found, 0.9) < 300
    assert (found <= 0).mean() <= most(100)


def test_scores_that_cannot_be_ranked_are_refused():
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"at least {LEAST_REFERENCE} reference rows are needed; got 5"):
        Ranks.start(random, np.arange(5.0))
    with pytest.raises(ValueError, match="scores must be finite; row 3 is not"):
        Ranks.start(random, np.r_[np.zeros(3), np.nan, np.zeros(40)])
