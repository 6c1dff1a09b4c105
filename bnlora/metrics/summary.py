"""Metrics of predicted class probabilities with bootstrap intervals; paired differences.

Intervals are percentile bootstrap intervals over rows. They inherit the bias of a calibration error. If the
true class of a row has probability zero, `nll` is infinite, and so is the end of its interval. Only bootstrap
samples without a value are left out, such as samples for `auroc` whose rows are all right or all wrong.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import check_at_least, check_key, numpy_generator
from bnlora._util.display import Shown, Table
from bnlora.metrics.scores import (
    BINS,
    Labelled,
    Labels,
    LogProbs,
    Predicted,
    accuracy,
    adaptive_ece,
    aurc,
    auroc,
    brier,
    checked,
    confidences,
    ece,
    formula_of,
    is_correct,
    mce,
    nll,
    width_bin,
)

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
    """A value with its interval.

    Attributes:
        value: The metric over all rows. If it is undefined, `value`, `low` and `high` are NaN.
        low: Lower end of the interval; can be infinite.
        high: Upper end; can be infinite.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Summary(Shown, Mapping[str, Estimate]):
    """All metrics of one prediction, by name, with bootstrap intervals.

    Attributes:
        estimates: Value and interval by name of the metric.
        level: Nominal coverage of the intervals.
        num_rows: Number of rows.
    """

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
    key: Array,
    prediction: LogProbs | Predicted,
    labels: Labels | Labelled,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    metrics: Mapping[str, Callable[..., float]] = METRICS,
) -> Summary:
    """Metrics with percentile bootstrap intervals over rows.

    Args:
        key: Random key of the bootstrap.
        prediction: A `Prediction`, or log-probabilities of shape `(n, c)`.
        labels: True classes, shape `(n,)`, or the `Batch` that has them.
        level: Probability of the intervals.
        num_resamples: Number of bootstrap samples; all metrics use the same samples.
        metrics: Functions of log-probabilities and labels, by name; all metrics of this module by default.

    Returns:
        Value and interval of every metric; a mapping by name that prints as a table.

    Raises:
        ValueError: If shapes do not fit, a row is not a probability distribution, labels are not class
            numbers or are out of range, `level` is outside (0, 1), or `num_resamples` is below one.
    """
    key = check_key(key)
    log_probs, labels = checked(prediction, labels)
    estimates = {}
    for name, formula in {name: formula_of(metric) for name, metric in metrics.items()}.items():

        def on(rows: np.ndarray, formula: Callable[..., float] = formula) -> float:
            return formula(log_probs[rows], labels[rows])

        estimates[name] = bootstrap(key, on, len(labels), level=level, num_resamples=num_resamples)
    return Summary(estimates, level, len(labels))


def paired_difference(
    key: Array,
    metric: Callable[..., float],
    first: LogProbs | Predicted,
    second: LogProbs | Predicted,
    labels: Labels | Labelled,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> Estimate:
    """The metric of a first prediction minus that of a second one on the same rows, with its interval.

    The rows are resampled together, so rows that are hard for both predictions do not widen the interval.

    Args:
        key: Random key of the bootstrap.
        metric: A metric of this module.
        first: A `Prediction`, or log-probabilities of shape `(n, c)`.
        second: The second prediction, for the same rows.
        labels: True classes, shape `(n,)`, or the `Batch` that has them.
        level: Probability of the interval.
        num_resamples: Number of bootstrap samples.

    Returns:
        The difference, first minus second, with its interval. If both values are infinite, the difference and
        both ends are NaN.

    Raises:
        ValueError: Under the same conditions as `summary`.
    """
    key = check_key(key)
    one, labels = checked(first, labels)
    two, labels = checked(second, labels)
    formula = formula_of(metric)

    def difference(rows: np.ndarray) -> float:
        # Python floats: infinity minus infinity is NaN without a warning.
        return float(formula(one[rows], labels[rows])) - float(formula(two[rows], labels[rows]))

    return bootstrap(key, difference, len(labels), level=level, num_resamples=num_resamples)


@dataclass(frozen=True)
class Reliability:
    """Accuracy by bin of confidence, for bins with at least one row.

    Attributes:
        count: Rows in each bin.
        confidence: Mean confidence in each bin.
        accuracy: Share of correct rows in each bin.
        low: Lower end of the Wilson interval of the accuracy.
        high: Upper end of the Wilson interval.
    """

    count: Int[np.ndarray, " b"]
    confidence: Float[np.ndarray, " b"]
    accuracy: Float[np.ndarray, " b"]
    low: Float[np.ndarray, " b"]
    high: Float[np.ndarray, " b"]


def reliability(
    prediction: LogProbs | Predicted, labels: Labels | Labelled, *, bins: int = BINS
) -> Reliability:
    """The values of a reliability diagram, with 95 % Wilson score intervals (Wilson 1927).

    Args:
        prediction: A `Prediction`, or log-probabilities of shape (n, c).
        labels: True classes, shape (n,), or the `Batch` that has them.
        bins: Number of bins of equal width.

    Returns:
        Counts, mean confidence, accuracy and its interval, for every bin with at least one row.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    log_probs, labels = checked(prediction, labels)
    confidence, correct = confidences(log_probs), is_correct(log_probs, labels)
    index = width_bin(confidence, bins)
    count = np.bincount(index, minlength=bins)
    used = count > 0
    mean, hits = (np.bincount(index, weights=w, minlength=bins)[used] for w in (confidence, correct))
    n = count[used]
    low, high = wilson(hits, n)
    return Reliability(n, mean / n, hits / n, low, high)


def wilson(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95 % score interval of a proportion, hits out of n (Wilson 1927).

    Args:
        hits: Numbers of hits.
        n: Numbers of trials, at least one each.

    Returns:
        Both ends, each in [0, 1].
    """
    z2 = 1.959963984540054**2  # square of the 97.5 % quantile of the standard normal
    share = hits / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def bootstrap(
    key: Array,
    statistic: Callable[[np.ndarray], float],
    num_rows: int,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> Estimate:
    """A statistic of rows with its percentile bootstrap interval.

    Args:
        key: Random key. With the same key, every statistic uses the same samples of rows.
        statistic: The statistic as a function of the indices of rows.
        num_rows: Number of rows.
        level: Probability of the interval.
        num_resamples: Number of bootstrap samples.

    Returns:
        The value on all rows, and the interval. Infinite replicates count; NaN replicates are left out. If
        the value on all rows is NaN, both ends are NaN.

    Raises:
        ValueError: If `level` is outside (0, 1), or `num_rows` or `num_resamples` is below one.

    Example:
        >>> losses = np.array([0.25, 1.0, 0.25])
        >>> mean_loss = bootstrap(key, lambda rows: losses[rows].mean(), len(losses))
        >>> str(mean_loss), str(bootstrap(key, lambda rows: np.append(losses, np.inf)[rows].mean(), 4))
        ('0.500 [0.250, 1.000]', 'inf [0.250, inf]')
    """
    key = check_key(key)
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1; got {level}")
    check_at_least({"number of rows": num_rows, "num_resamples": num_resamples}, 1)
    value = float(statistic(np.arange(num_rows)))
    resamples = numpy_generator(key).integers(num_rows, size=(num_resamples, num_rows))
    replicates = np.array([statistic(rows) for rows in resamples], np.float64)
    defined = replicates[~np.isnan(replicates)]
    # If the value is NaN, as a difference of infinities, the samples with the decisive rows are NaN too:
    # an interval from the others would be misleading.
    if np.isnan(value) or not len(defined):
        return Estimate(value, float("nan"), float("nan"))
    return Estimate(
        value, _quantile(defined, (1 - level) / 2, "lower"), _quantile(defined, (1 + level) / 2, "higher")
    )


def _quantile(values: np.ndarray, at: float, outer: Literal["lower", "higher"]) -> float:
    """The quantile by interpolation; the outer order statistic if one of the two neighbours is infinite."""
    low, high = (float(np.quantile(values, at, method=side)) for side in ("lower", "higher"))
    if np.isfinite([low, high]).all():
        return float(np.quantile(values, at))
    return low if outer == "lower" else high
