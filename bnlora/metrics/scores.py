r"""Accuracy and calibration of predicted class probabilities, without intervals.

Let p be the predictive distribution of a row, y its class, k = argmax p, and c = max p (confidence):

    accuracy  mean 1[k = y]                          nll    -mean log p_y
    brier     mean sum_j (p_j - 1[j = y])^2          ece    sum_bins n_b/n |acc_b - conf_b|
    mce       max over bins |acc_b - conf_b|         auroc  P(c of a right row > c of a wrong row)
    aurc      mean error rate among the i most confident rows, over i = 1..n

`ece` has bins of equal width (Naeini et al. 2015; Guo et al. 2017), `adaptive_ece` bins of equal count
(Nguyen & O'Connor 2015). Both are biased upwards in small samples, most of all for a well calibrated model.

Every function accepts log-probabilities or a `Prediction` (its mixture), and labels or a `Batch` with labels.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from bnlora._util.checks import check_at_least, class_numbers

BINS = 15
"""Default number of bins."""

P = ParamSpec("P")


@runtime_checkable
class Predicted(Protocol):
    """What stands for its log-probabilities, such as a `Prediction`."""

    @property
    def log_probs(self) -> Any:
        """Log-probabilities of the classes, shape (n, c)."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """What stands for its labels, such as a `Batch`."""

    labels: Any


LogProbs = Float[np.ndarray, "n c"]
Labels = Int[Any, " n"]


def score(formula: Callable[Concatenate[Any, Any, P], float]) -> Callable[Concatenate[Any, Any, P], float]:
    """Make a formula check its log-probabilities and labels first; `formula_of` returns the plain formula."""

    @wraps(formula)
    def checking(
        log_probs: LogProbs | Predicted, labels: Labels | Labelled, *args: P.args, **options: P.kwargs
    ) -> float:
        return formula(*checked(log_probs, labels), *args, **options)

    checking.formula = formula  # type: ignore[attr-defined]
    return checking


def formula_of(metric: Callable[..., float]) -> Callable[..., float]:
    """The formula of a score without its checks; another function is returned unchanged.

    A bootstrap computes a metric thousands of times, on arrays that were checked once.
    """
    formula: Callable[..., float] = getattr(metric, "formula", metric)
    return formula


@score
def accuracy(log_probs: LogProbs, labels: Labels) -> float:
    """Share of rows whose most probable class is the true one.

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    return float(is_correct(log_probs, labels).mean())


@score
def nll(log_probs: LogProbs, labels: Labels) -> float:
    """Mean negative log-probability of the true class, in nats per row.

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).

    Returns:
        Nats per row; lower is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    return float(_row_nll(log_probs, labels).mean())


@score
def brier(log_probs: LogProbs, labels: Labels) -> float:
    """Mean squared distance between the probability vector and the one-hot vector of the true class.

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).

    Returns:
        A number in [0, 2]; lower is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    return float(_row_brier(log_probs, labels).mean())


@score
def ece(log_probs: LogProbs, labels: Labels, *, bins: int = BINS) -> float:
    """Expected calibration error of the confidence, over bins of equal width in (0, 1].

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).
        bins: Number of bins.

    Returns:
        A number in [0, 1]; lower is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    confidence, correct = confidences(log_probs), is_correct(log_probs, labels)
    gap = np.bincount(width_bin(confidence, bins), weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


@score
def adaptive_ece(log_probs: LogProbs, labels: Labels, *, bins: int = BINS) -> float:
    """Expected calibration error over bins with equally many rows (to within one).

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).
        bins: Number of bins.

    Returns:
        A number in [0, 1]; lower is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    confidence, correct = confidences(log_probs), is_correct(log_probs, labels)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split((correct - confidence)[order], min(bins, len(labels)))
    return float(sum(abs(part.sum()) for part in parts) / len(labels))


@score
def mce(log_probs: LogProbs, labels: Labels, *, bins: int = BINS) -> float:
    """Largest gap between accuracy and confidence among the non-empty bins of equal width.

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).
        bins: Number of bins.

    Returns:
        A number in [0, 1]; lower is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    confidence, correct = confidences(log_probs), is_correct(log_probs, labels)
    index = width_bin(confidence, bins)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.max(np.abs(gap) / np.maximum(np.bincount(index, minlength=bins), 1)))


@score
def auroc(log_probs: LogProbs, labels: Labels) -> float:
    """Probability that a correct row is more confident than a wrong one; ties count one half.

    The value is NaN if all rows are correct or all are wrong.

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).

    Returns:
        A number in [0, 1]; higher is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    confidence, correct = confidences(log_probs), is_correct(log_probs, labels)
    right, wrong = confidence[correct], np.sort(confidence[~correct])
    if not len(right) or not len(wrong):
        return float("nan")
    below, up_to = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + up_to).mean() / 2 / len(wrong))


@score
def aurc(log_probs: LogProbs, labels: Labels) -> float:
    """Area under the risk-coverage curve: error rate of the i most confident rows, averaged over i.

    Ties in confidence use the expected error rate, so the value does not depend on the order of rows.

    Args:
        log_probs: Log-probabilities of the classes, shape (n, c).
        labels: True classes, shape (n,).

    Returns:
        A mean error rate in [0, 1]; lower is better.

    Raises:
        ValueError: If there are no rows, the numbers of rows and labels differ, or a label is not a class.
    """
    return float(selective_risks(-confidences(log_probs), ~is_correct(log_probs, labels)).mean())


def selective_risks(doubt: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Error rate among the i rows of least doubt, for i = 1..n; in expectation over the order of ties.

    Args:
        doubt: Rows are sorted by this value, increasing.
        wrong: Whether the prediction of each row is wrong.

    Returns:
        The error rates, shape (n,).
    """
    _, first, counts = np.unique(doubt, return_inverse=True, return_counts=True)
    within = np.bincount(first, weights=wrong) / counts  # error rate of each group of ties
    order = np.repeat(within, counts)
    return np.cumsum(order) / np.arange(1, len(order) + 1)


def checked(log_probs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities in float64 and labels, as NumPy arrays; `ValueError` if they do not fit together.

    A `Prediction` is replaced by its log-probabilities, a `Batch` by its labels.
    """
    log_probs = checked_log_probs(log_probs)
    return log_probs, class_numbers("the predicted rows", getattr(labels, "labels", labels), *log_probs.shape)


def checked_log_probs(log_probs: Any) -> np.ndarray:
    """Log-probabilities in float64 as a NumPy array; `ValueError` unless every row is a distribution.

    A `Prediction` is replaced by its log-probabilities.
    """
    log_probs = np.asarray(getattr(log_probs, "log_probs", log_probs), np.float64)
    if log_probs.ndim != 2 or not log_probs.size:
        raise ValueError(
            "expected log-probabilities of shape (n, c) with n >= 1 rows and c >= 1 classes; got shape "
            f"{log_probs.shape}"
        )
    with np.errstate(invalid="ignore"):  # NaN is reported below, with its row
        total = np.logaddexp.reduce(log_probs, axis=1)
    worst = int(np.argmax(np.where(np.isnan(total), np.inf, np.abs(total))))
    if not abs(total[worst]) < 1e-4:
        raise ValueError(
            f"row {worst} is not a distribution: its probabilities sum to {np.exp(total[worst]):.6g}, not 1 "
            "(logarithms of probabilities are expected)"
        )
    return log_probs


def confidences(log_probs: np.ndarray) -> np.ndarray:
    """Probability of the most probable class of each row."""
    return np.exp(log_probs.max(1))


def is_correct(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the most probable class of each row is the true one."""
    return log_probs.argmax(1) == labels


def _row_nll(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -log_probs[np.arange(len(labels)), labels]


def _row_brier(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    probs = np.exp(log_probs)
    return (probs**2).sum(1) - 2 * probs[np.arange(len(labels)), labels] + 1


def width_bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each confidence; bin b covers (b/bins, (b+1)/bins]."""
    check_at_least({"bins": bins}, 1)
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def null_ece(log_probs: LogProbs | Predicted, *, bins: int = BINS, redraws: int = 200) -> float:
    """Mean ECE of a perfectly calibrated prediction: labels are drawn from the prediction itself.

    With finitely many rows even this ECE is above zero; compare an ECE with this level. The draws use a fixed
    seed, so the value is deterministic.

    Args:
        log_probs: Log-probabilities, shape (row, class).
        bins: Number of bins, as in `ece`.
        redraws: Number of times that labels are drawn.

    Returns:
        The mean.
    """
    log_probs = np.asarray(getattr(log_probs, "log_probs", log_probs), np.float64)
    probs = np.exp(log_probs)
    ends = np.cumsum(probs / probs.sum(1, keepdims=True), axis=1)
    uniform = np.random.default_rng(0).random((redraws, len(probs)))
    # Inverse distribution function; the minimum guards against a last end below one by rounding.
    simulated = np.minimum((uniform[:, :, None] > ends).sum(2), probs.shape[1] - 1)
    log_probs, _ = checked(log_probs, simulated[0])
    return float(np.mean([formula_of(ece)(log_probs, labels, bins=bins) for labels in simulated]))


def debiased_ece(
    log_probs: LogProbs | Predicted, labels: Labels | Labelled, *, bins: int = BINS, redraws: int = 200
) -> float:
    """ECE minus its level for a calibrated prediction (`null_ece`); about zero if calibrated.

    Args:
        log_probs: Log-probabilities, shape (row, class).
        labels: Class of each row.
        bins: Number of bins.
        redraws: As in `null_ece`.

    Returns:
        The difference; it can be negative.
    """
    return ece(log_probs, labels, bins=bins) - null_ece(log_probs, bins=bins, redraws=redraws)
