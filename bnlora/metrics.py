r"""Accuracy and calibration of predicted class probabilities, each with a bootstrap interval.

With p the predictive distribution of a row, y its class, k = argmax p and c = max p (confidence):

    accuracy  mean 1[k = y]                          nll    -mean log p_y
    brier     mean sum_j (p_j - 1[j = y])^2          ece    sum_bins n_b/n |acc_b - conf_b|
    mce       max over bins |acc_b - conf_b|         auroc  P(c of a right row > c of a wrong row)
    aurc      mean error rate among the i most confident rows, over i = 1..n

`ece` has bins of equal width (Naeini et al. 2015; Guo et al. 2017), `adaptive_ece` bins of equal count
(Nguyen & O'Connor 2015). Both are biased upwards in small samples, most of all for a good model;
intervals here are percentile bootstrap intervals over rows and inherit that bias.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bnlora.checks import check_at_least
from bnlora.display import Shown, Table

BINS = 15

LogProbs = Float[np.ndarray, "n c"]
Labels = Int[Any, " n"]


def accuracy(log_probs: LogProbs, labels: Labels) -> float:
    """Share of rows whose most probable class is the true one."""
    return float(_correct(*_checked(log_probs, labels)).mean())


def nll(log_probs: LogProbs, labels: Labels) -> float:
    """Mean negative log-probability of the true class, in nats."""
    return float(_row_nll(*_checked(log_probs, labels)).mean())


def brier(log_probs: LogProbs, labels: Labels) -> float:
    """Mean squared distance of the probability vector to the true class's corner; in [0, 2]."""
    return float(_row_brier(*_checked(log_probs, labels)).mean())


def ece(log_probs: LogProbs, labels: Labels, *, bins: int = BINS) -> float:
    """Expected calibration error of the confidence, over bins of equal width in (0, 1]."""
    log_probs, labels = _checked(log_probs, labels)
    confidence, correct = _confidence(log_probs), _correct(log_probs, labels)
    gap = np.bincount(_width_bin(confidence, bins), weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def adaptive_ece(log_probs: LogProbs, labels: Labels, *, bins: int = BINS) -> float:
    """Expected calibration error over bins that hold equally many rows (to within one)."""
    log_probs, labels = _checked(log_probs, labels)
    confidence, correct = _confidence(log_probs), _correct(log_probs, labels)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split((correct - confidence)[order], min(bins, len(labels)))
    return float(sum(abs(part.sum()) for part in parts) / len(labels))


def mce(log_probs: LogProbs, labels: Labels, *, bins: int = BINS) -> float:
    """Largest gap between accuracy and confidence among the non-empty bins of equal width."""
    log_probs, labels = _checked(log_probs, labels)
    confidence, correct = _confidence(log_probs), _correct(log_probs, labels)
    index = _width_bin(confidence, bins)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.max(np.abs(gap) / np.maximum(np.bincount(index, minlength=bins), 1)))


def auroc(log_probs: LogProbs, labels: Labels) -> float:
    """Probability that a right row is more confident than a wrong one, ties counting half.

    NaN where all rows are right or all are wrong.
    """
    log_probs, labels = _checked(log_probs, labels)
    confidence, correct = _confidence(log_probs), _correct(log_probs, labels)
    right, wrong = confidence[correct], np.sort(confidence[~correct])
    if not len(right) or not len(wrong):
        return float("nan")
    below, up_to = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + up_to).mean() / 2 / len(wrong))


def aurc(log_probs: LogProbs, labels: Labels) -> float:
    """Area under the risk-coverage curve: error rate of the i most confident rows, averaged over i.

    Rows of equal confidence enter together, so that the value does not depend on their order.
    """
    log_probs, labels = _checked(log_probs, labels)
    return float(selective_risks(-_confidence(log_probs), ~_correct(log_probs, labels)).mean())


def selective_risks(doubt: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Error rate among the i rows of least doubt, over i = 1..n; the expected one where ties are broken."""
    _, first, counts = np.unique(doubt, return_inverse=True, return_counts=True)
    within = np.bincount(first, weights=wrong) / counts  # expected error of a row inside its group of ties
    order = np.repeat(within, counts)
    return np.cumsum(order) / np.arange(1, len(order) + 1)


METRICS: Mapping[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "nll": nll,
    "brier": brier,
    "ece": ece,
    "adaptive_ece": adaptive_ece,
    "mce": mce,
    "auroc": auroc,
    "aurc": aurc,
}


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Summary(Shown, Mapping[str, Estimate]):
    """Every metric of one prediction, by name, with bootstrap intervals of one `level`."""

    estimates: dict[str, Estimate]
    level: float
    num_rows: int

    def __getitem__(self, metric: str) -> Estimate:
        return self.estimates[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.estimates)

    def __len__(self) -> int:
        return len(self.estimates)

    @property
    def table(self) -> Table:
        """The estimates as rows of text."""
        rows = tuple((name, f"{e.value:.4f}", f"[{e.low:.4f}, {e.high:.4f}]") for name, e in self.items())
        return Table(f"{self.num_rows} rows", ("metric", "value", f"{self.level:.0%} interval"), rows)

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        return (self.table,)

    def __repr__(self) -> str:
        return repr(self.table)


def summary(
    prediction: Any,
    labels: Labels,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    metrics: Mapping[str, Callable[..., float]] = METRICS,
) -> Summary:
    """Metrics with percentile bootstrap intervals over rows.

    Args:
        prediction: A `Prediction`, or log-probabilities of shape `(n, c)`.
        labels: True classes, shape `(n,)`.
        level: Probability of the intervals.
        resamples: Number of bootstrap samples; every metric sees the same ones.
        seed: Seed of the resampling.
        metrics: Functions of log-probabilities and labels by name; all of this module when omitted.

    Raises:
        ValueError: On shapes that do not fit, rows that are no probabilities, or classes out of range.
    """
    log_probs, labels = _checked(_log_probs(prediction), labels)
    rows = _bootstrap_rows(len(labels), resamples, seed)
    estimates = {}
    for name, metric in metrics.items():
        replicates = np.array([metric(log_probs[r], labels[r]) for r in rows])
        estimates[name] = _estimate(metric(log_probs, labels), replicates, level)
    return Summary(estimates, level, len(labels))


def paired_difference(
    metric: Callable[..., float],
    first: Any,
    second: Any,
    labels: Labels,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`metric` of the first prediction minus that of the second on the same rows, with its interval.

    The rows are resampled together, so what makes a row hard for both does not widen the interval.

    Args:
        metric: A metric of this module.
        first: A `Prediction`, or log-probabilities of shape `(n, c)`.
        second: The other one, for the same rows.
        labels: True classes, shape `(n,)`.
        level: Probability of the interval.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        ValueError: As `summary`.
    """
    one, labels = _checked(_log_probs(first), labels)
    two, labels = _checked(_log_probs(second), labels)
    rows = _bootstrap_rows(len(labels), resamples, seed)
    replicates = np.array([metric(one[r], labels[r]) - metric(two[r], labels[r]) for r in rows])
    return _estimate(metric(one, labels) - metric(two, labels), replicates, level)


@dataclass(frozen=True)
class Reliability:
    """Accuracy by bin of confidence; only bins with rows in them.

    Attributes:
        count: Rows in each bin.
        confidence: Mean confidence in each bin.
        accuracy: Share of right rows in each bin.
        low: Lower end of the Wilson interval of the accuracy.
        high: Upper end of it.
    """

    count: Int[np.ndarray, " b"]
    confidence: Float[np.ndarray, " b"]
    accuracy: Float[np.ndarray, " b"]
    low: Float[np.ndarray, " b"]
    high: Float[np.ndarray, " b"]


def reliability(prediction: Any, labels: Labels, *, bins: int = BINS) -> Reliability:
    """The numbers of a reliability diagram, with 95 % Wilson score intervals (Wilson 1927)."""
    log_probs, labels = _checked(_log_probs(prediction), labels)
    confidence, correct = _confidence(log_probs), _correct(log_probs, labels)
    index = _width_bin(confidence, bins)
    count = np.bincount(index, minlength=bins)
    used = count > 0
    mean, hits = (np.bincount(index, weights=w, minlength=bins)[used] for w in (confidence, correct))
    n = count[used]
    low, high = wilson(hits, n)
    return Reliability(n, mean / n, hits / n, low, high)


def wilson(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95 % score interval of a share, hits of n (Wilson 1927)."""
    z2 = 1.959963984540054**2
    share = hits / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def _bootstrap_rows(num_rows: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(num_rows, size=(resamples, num_rows))


def _estimate(value: float, replicates: np.ndarray, level: float) -> Estimate:
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1; got {level}")
    defined = replicates[np.isfinite(replicates)]  # auroc has no value where no row is wrong
    if not len(defined):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _log_probs(prediction: Any) -> np.ndarray:
    return getattr(prediction, "log_probs", prediction)


def _checked(log_probs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    log_probs, labels = np.asarray(log_probs, np.float64), np.asarray(labels)
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise ValueError(
            "expected log-probabilities of shape (n, c) and n >= 1 labels; "
            f"got shapes {log_probs.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= log_probs.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{log_probs.shape[1] - 1}; got {labels.min()}..{labels.max()}"
        )
    with np.errstate(invalid="ignore"):  # NaN is reported below, with its row
        total = np.logaddexp.reduce(log_probs, axis=1)
    worst = int(np.argmax(np.where(np.isnan(total), np.inf, np.abs(total))))
    if not abs(total[worst]) < 1e-4:
        raise ValueError(
            f"row {worst} is no distribution: its probabilities sum to {np.exp(total[worst]):.6g}, not 1 "
            "(logarithms of probabilities are expected)"
        )
    return log_probs, labels


def _confidence(log_probs: np.ndarray) -> np.ndarray:
    return np.exp(log_probs.max(1))


def _correct(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return log_probs.argmax(1) == labels


def _row_nll(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -log_probs[np.arange(len(labels)), labels]


def _row_brier(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    probs = np.exp(log_probs)
    return (probs**2).sum(1) - 2 * probs[np.arange(len(labels)), labels] + 1


def _width_bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each confidence; bin b holds (b/bins, (b+1)/bins]."""
    check_at_least({"bins": bins}, 1)
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
