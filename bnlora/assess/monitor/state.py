r"""The state of a monitored classifier, from one batch of rows to the next.

| test | null hypothesis | bets |
|---|---|---|
| accuracy | P(right \| past) >= floor for every row | on the mean, `betting.log_bets_below` |
| calibration | P(right \| confidence, past) = confidence | `calibration` |
| entropy, mutual information | reference and new rows are exchangeable | `shift` |

The floor is stated, or it is the lower end of a one-sided interval for the accuracy on labelled reference
rows (Clopper and Pearson 1934), minus a tolerance (Podkopaev and Ramdas 2022, Tracking the risk of a deployed
model and detecting harmful distribution shifts, arXiv 2110.06177). Each of the four tests may raise a false
alarm with probability alpha/4 over the whole stream, so that all of them together have

    P(any false alarm, ever) <= alpha.

With a floor from the reference, half of its alpha/4 is the error of that interval. An alarm remains; start a
new monitor after a refit.

Which rows have a label must not depend on whether they are right. The state has a fixed size, except for the
record of the chart, which keeps at most 512 points: of a longer stream every second one is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy  # imports its submodules when they are first used
from jax import Array

from bnlora._util.checks import check_key, check_level, check_positive, numpy_generator
from bnlora._util.display import Showable, Shown
from bnlora._util.finding import Finding, Judged
from bnlora.assess.monitor import calibration, shift, tables
from bnlora.assess.monitor.betting import FRACTIONS, Evidence, log_bets_below
from bnlora.assess.monitor.calibration import Bins
from bnlora.assess.monitor.rows import Labelled, Observed, distributions, labelled_rows, times_of
from bnlora.assess.monitor.sequences import MeanSequence
from bnlora.assess.monitor.shift import Ranks
from bnlora.assess.monitor.watch import ACCURACY, CALIBRATION, ENTROPY, INFORMATION, TESTS, Alert, Watch

GAP = "confidence minus accuracy"

POINTS = 512
"""Largest number of points in the record of the chart."""


class Point(NamedTuple):
    """The state after one update, for the chart.

    Attributes:
        rows: Number of rows.
        labelled: Number of labelled rows.
        time: Time of the last row.
        accuracy: Running accuracy, and the ends of its interval; None without labels.
        log_evidence: Log of the evidence by test.
    """

    rows: int
    labelled: int
    time: str
    accuracy: tuple[float, float, float] | None
    log_evidence: dict[str, float]


@dataclass(frozen=True)
class Monitor(Shown, Judged):
    """Monitoring of a deployed classifier; every update gives a new monitor.

    Attributes:
        alpha: Probability of any false alarm over the whole stream.
        level: Probability of each confidence sequence.
        nll_bound: Nats at which the negative log-likelihood of a row is clipped.
        floor: Accuracy below which the accuracy test raises an alarm; None if there is none.
        seed: Two numbers of 64 bits that break ties among scores.
        num_classes: Number of classes; None before the first rows.
        num_rows: Number of rows so far.
        sequences: Confidence sequences by name.
        bins: Running calibration by confidence.
        ranks: Ranks of the scores by test.
        watches: The tests that run, by name.
        history: The record of the chart.

    Example:
        >>> random = np.random.default_rng(0)
        >>> def rows(n, sharpness):
        ...     logits = sharpness * random.normal(size=(1, n, 2))
        ...     return bl.Prediction(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        >>> monitor = Monitor.start(key, rows(300, 4.0)).update(rows(200, 4.0))
        >>> monitor.alerts, monitor.recommendation
        ((), 'Nothing to do: no test has raised an alarm. Labels would test accuracy and calibration.')
        >>> monitor.update(rows(300, 0.5)).alerts[0].test
        'entropy'
    """

    alpha: float
    level: float
    nll_bound: float
    floor: float | None
    seed: tuple[int, int]
    num_classes: int | None
    num_rows: int
    sequences: Mapping[str, MeanSequence]
    bins: Bins
    ranks: Mapping[str, Ranks]
    watches: Mapping[str, Watch]
    history: tuple[Point, ...] = ()

    @classmethod
    def start(
        cls,
        key: Array,
        reference: Observed | None = None,
        labels: Any = None,
        *,
        alpha: float = 0.05,
        level: float = 0.95,
        floor: float | None = None,
        tolerance: float = 0.0,
        nll_bound: float = 8.0,
    ) -> "Monitor":
        """A monitor before the first row.

        Args:
            key: Random key that breaks ties among scores and splits the reference.
            reference: Prediction of rows like those that are expected, from the same classifier and not from
                training rows; at least 30. Without it, entropy and mutual information are not tested.
            labels: Classes of the reference rows, -1 for rows without a label. They set the floor of the
                accuracy.
            alpha: Probability of any false alarm over the whole stream.
            level: Probability of each confidence sequence.
            floor: Accuracy that the classifier must keep, in place of that of the reference.
            tolerance: Decrease of accuracy below the reference that is no alarm.
            nll_bound: Nats at which the negative log-likelihood of a row is clipped.

        Returns:
            The monitor.

        Raises:
            ValueError: If `key` is no key, a number is out of its range, the reference is too small or no
                prediction, or labels do not fit.
        """
        key = check_key(key)
        _check_numbers(alpha, level, floor, tolerance, nll_bound)
        each = alpha / len(TESTS)
        classes, ranks, share = None, {}, each if floor is not None else each / 2
        if reference is not None:
            log_probs = distributions(reference)
            classes, ranks = log_probs.shape[1], _ranks(key, reference)
            if labels is not None and floor is None:
                floor = _lowest_accuracy(log_probs, labels, each / 2, tolerance)
        elif labels is not None:
            raise ValueError("labels are those of the reference; pass the reference too")
        watches = {test: Watch(test, Evidence.start(shift.NUM_BETS), 1 / each) for test in ranks}
        watches[CALIBRATION] = Watch(CALIBRATION, Evidence.start(calibration.NUM_BETS), 1 / each)
        if floor is not None:
            watches[ACCURACY] = Watch(ACCURACY, Evidence.start(len(FRACTIONS)), 1 / share)
        ranges = {"accuracy": (0.0, 1.0), "brier": (0.0, 2.0), "nll": (0.0, nll_bound), GAP: (-1.0, 1.0)}
        sequences = {name: MeanSequence.start(*ends, level=level) for name, ends in ranges.items()}
        return cls(
            alpha, level, nll_bound, floor, _seed(key), classes, 0, sequences, Bins.start(), ranks, watches
        )

    def update(self, prediction: Observed, labels: Any = None, time: Any = None) -> "Monitor":
        """The monitor after new rows, in the order in which they came.

        Args:
            prediction: Prediction of the rows.
            labels: Classes of the rows, -1 for a row without a label; None if no row has one. For labels that
                come later use `label`.
            time: A time for all rows, or one for each; any text or number.

        Returns:
            A new monitor; this one does not change.

        Raises:
            ValueError: If the prediction has other classes than the reference, has no mutual information
                although the reference has it, or labels or times do not fit.
        """
        log_probs, times = self._checked(prediction), None
        if INFORMATION in self.ranks and prediction.mutual_information is None:
            raise ValueError("the reference has mutual information, but these rows have none")
        count = len(log_probs)
        times, numbers = times_of(time, count), self.num_rows + np.arange(1, count + 1)
        known = None if labels is None else labelled_rows(log_probs, labels, numbers, times)
        ranks, watches = dict(self.ranks), dict(self.watches)
        for number, test in enumerate(self.ranks):
            uniform = _uniform(self.seed, number, self.num_rows, count)
            ranks[test], p_values = ranks[test].update(_scores(prediction, test), uniform)
            watches[test] = watches[test].update(shift.log_bets_on_ranks(p_values), numbers, times)
        monitor = replace(
            self, num_classes=log_probs.shape[1], num_rows=self.num_rows + count, ranks=ranks, watches=watches
        )
        return (monitor if known is None else monitor._labelled(known))._recorded(times[-1])

    def label(self, prediction: Observed, labels: Any, time: Any = None) -> "Monitor":
        """The monitor after labels of rows that `update` has seen before without labels.

        Args:
            prediction: The same prediction of these rows; its mutual information is not read.
            labels: Their classes, -1 for a row that still has none.
            time: As in `update`.

        Returns:
            A new monitor; this one does not change.

        Raises:
            ValueError: If the prediction has other classes, or labels or times do not fit.
        """
        log_probs = self._checked(prediction)
        times = times_of(time, len(log_probs))
        numbers = np.full(len(log_probs), self.num_rows)
        monitor = replace(self, num_classes=log_probs.shape[1])
        return monitor._labelled(labelled_rows(log_probs, labels, numbers, times))._recorded(times[-1])

    @property
    def num_labelled(self) -> int:
        """Number of labelled rows so far."""
        return self.sequences["accuracy"].num_rows

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The first alarm of each test that raised one, in the order of the rows."""
        raised = [watch.alert for watch in self.watches.values() if watch.alert is not None]
        return tuple(sorted(raised, key=lambda alert: alert.row))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding for each test."""
        return tables.findings(self)

    @property
    def recommendation(self) -> str:
        """What to do, in one sentence."""
        return tables.recommendation(self)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Recommendation, findings, running means with their intervals, and calibration by confidence."""
        return tables.overview(self)

    def __repr__(self) -> str:
        raised = ", ".join(alert.test for alert in self.alerts) or "none"
        return f"Monitor({self.num_rows:,} rows, {self.num_labelled:,} labelled, alarms: {raised})"

    def _checked(self, prediction: Observed) -> np.ndarray:
        log_probs = distributions(prediction)
        if self.num_classes not in (None, log_probs.shape[1]):
            raise ValueError(
                f"the monitored classifier has {self.num_classes} classes; got {log_probs.shape[1]}"
            )
        return log_probs

    def _labelled(self, rows: Labelled) -> "Monitor":
        if not len(rows.correct):
            return self
        values = {
            "accuracy": rows.correct.astype(float),
            "brier": np.clip(rows.brier, 0.0, 2.0),
            "nll": np.clip(rows.nll, 0.0, self.nll_bound),
            GAP: rows.confidence - rows.correct,
        }
        watches, at = dict(self.watches), (rows.numbers, rows.times)
        bets = calibration.log_bets_on_calibration(rows.confidence, rows.correct)
        watches[CALIBRATION] = watches[CALIBRATION].update(bets, *at)
        if self.floor is not None:
            bets = log_bets_below(values["accuracy"], self.floor)
            watches[ACCURACY] = watches[ACCURACY].update(bets, *at)
        sequences = {name: self.sequences[name].update(x) for name, x in values.items()}
        bins = self.bins.update(rows.confidence, rows.correct)
        return replace(self, sequences=sequences, bins=bins, watches=watches)

    def _recorded(self, time: str) -> "Monitor":
        accuracy = self.sequences["accuracy"]
        values = (accuracy.mean, *accuracy.interval) if accuracy.num_rows else None
        evidence = {test: watch.evidence.log_value for test, watch in self.watches.items()}
        kept = self.history if len(self.history) < POINTS else self.history[1::2]
        return replace(self, history=(*kept, Point(self.num_rows, self.num_labelled, time, values, evidence)))


def _check_numbers(
    alpha: float, level: float, floor: float | None, tolerance: float, nll_bound: float
) -> None:
    check_level(level)
    check_positive({"nll_bound": nll_bound})
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1); got {alpha}")
    if floor is not None and not 0 < floor < 1:
        raise ValueError(f"floor must lie in (0, 1); got {floor}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1); got {tolerance}")


def _ranks(key: Array, reference: Observed) -> dict[str, Ranks]:
    random = numpy_generator(key)
    ranks = {ENTROPY: Ranks.start(random, reference.entropy)}
    if reference.mutual_information is not None:
        ranks[INFORMATION] = Ranks.start(random, reference.mutual_information)
    return ranks


def _lowest_accuracy(log_probs: np.ndarray, labels: Any, error: float, tolerance: float) -> float | None:
    """Lower end of the one-sided interval for the accuracy, minus the tolerance; None without information."""
    nothing = [""] * len(log_probs)
    correct = labelled_rows(log_probs, labels, np.arange(len(log_probs)), nothing).correct
    right, count = int(correct.sum()), len(correct)
    if not right:
        return None
    floor = float(scipy.special.betaincinv(right, count - right + 1, error)) - tolerance
    return floor if floor > 0 else None


def _scores(prediction: Observed, test: str) -> np.ndarray:
    return np.asarray(prediction.entropy if test == ENTROPY else prediction.mutual_information, np.float64)


def _seed(key: Array) -> tuple[int, int]:
    bits = [int(x) for x in np.asarray(jax.random.bits(jax.random.fold_in(key, 1), (4,)))]
    return bits[0] << 32 | bits[1], bits[2] << 32 | bits[3]


def _uniform(seed: tuple[int, int], test: int, begin: int, count: int) -> np.ndarray:
    """Numbers in (0, 1] of rows from `begin` on: the same whatever the rows are split into."""
    stream = np.random.Philox(key=np.array(seed, np.uint64), counter=[0, 0, 0, test])
    skipped = begin % 4  # the generator makes four numbers at a time
    random = np.random.Generator(stream.advance(begin // 4))
    return 1 - random.random(skipped + count)[skipped:]
