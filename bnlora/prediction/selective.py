r"""Use of uncertainty: the error rate if doubtful rows are left out, and detection of rows of another domain.

Every row has a doubt u_i: one minus the confidence, the entropy, or the mutual information. Rows are answered
in increasing order of doubt. At coverage i/n,

    risk(i/n) = share of wrong answers among the i rows of least doubt,    AURC = mean_i risk(i/n),

and rows of equal doubt enter together, with their expected error. `separation` measures how well the doubt
detects rows of another domain: P(u of one outside > u of one inside), ties counting half, which is the area
under the ROC curve. `bnlora.prediction.risk_control` chooses a threshold on the doubt with a guarantee.

References: El-Yaniv and Wiener (2010), JMLR 11; Geifman, Uziel and El-Yaniv (2019), arXiv 1805.08206.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora import metrics
from bnlora._util.checks import check_key, check_option
from bnlora.metrics.scores import Labelled, Labels, checked
from bnlora.prediction.predict import Prediction

Doubt = Literal["confidence", "entropy", "mutual_information"]

DOUBTS: Mapping[str, Callable[[Prediction], np.ndarray]] = MappingProxyType(
    {
        "confidence": lambda prediction: 1 - prediction.probs.max(1),
        "entropy": lambda prediction: prediction.entropy,
        "mutual_information": lambda prediction: prediction.mutual_information,
    }
)


@dataclass(frozen=True)
class RiskCoverage:
    """A risk-coverage curve.

    Attributes:
        coverage: Share of the rows that are answered, 1/n to 1.
        risk: Error rate among them.
        low: Lower end of its 95 % Wilson interval, for a fixed threshold on the doubt.
        high: Upper end of this interval.
        aurc: Area under the curve with its percentile bootstrap interval over rows.
    """

    coverage: Float[np.ndarray, " n"]
    risk: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]
    aurc: metrics.Estimate


def doubt(prediction: Prediction, by: Doubt = "confidence") -> Float[np.ndarray, " n"]:
    """Doubt of every row: one minus the largest probability, or entropy or mutual information in nats.

    Args:
        prediction: The prediction.
        by: The doubt.

    Returns:
        One number for each row.

    Raises:
        ValueError: If `by` is unknown.

    Example:
        >>> doubt(Prediction(np.log([[[0.9, 0.1], [0.5, 0.5]]]))).round(3)
        array([0.1, 0.5])
    """
    check_option("by", by, get_args(Doubt))
    return DOUBTS[by](prediction)


def risk_coverage(
    key: Array,
    prediction: Prediction,
    labels: Labels | Labelled,
    *,
    by: Doubt = "confidence",
    num_resamples: int = 1000,
) -> RiskCoverage:
    """Error rate among the rows of least doubt, for every number of rows.

    Args:
        key: Random key of the bootstrap.
        prediction: The prediction.
        labels: True classes, or the `Batch` that has them.
        by: The doubt that orders the rows. With "confidence", the area is `metrics.aurc`.
        num_resamples: Number of bootstrap samples for the interval of the area.

    Returns:
        The curve, with its area.

    Raises:
        ValueError: If `by` is unknown, `num_resamples` is below 1, or `metrics.accuracy` refuses the labels.

    Example:
        >>> sure, right = np.array([0.9, 0.6, 0.8]), np.array([1, 0, 1])
        >>> curve = risk_coverage(key, Prediction(np.log([np.stack([1 - sure, sure], 1)])), right)
        >>> curve.risk.round(3), round(curve.aurc.value, 3)
        (array([0.   , 0.   , 0.333]), 0.111)
    """
    key = check_key(key)
    log_probs, labels = checked(prediction.log_probs, labels)
    order, wrong = doubt(prediction, by), log_probs.argmax(1) != labels
    risk, count = metrics.selective_risks(order, wrong), np.arange(1, len(wrong) + 1)
    low, high = metrics.wilson(risk * count, count)

    def area(rows: np.ndarray) -> float:
        return float(metrics.selective_risks(order[rows], wrong[rows]).mean())

    aurc = metrics.bootstrap(key, area, len(wrong), num_resamples=num_resamples)
    return RiskCoverage(count / len(wrong), risk, low, high, aurc)


def separation(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """Probability that a row of `outside` has more doubt than one of `inside`, ties counting half.

    Args:
        inside: Doubt of the rows of the domain.
        outside: Doubt of the rows of another domain.

    Returns:
        A number in [0, 1]; one half if the doubt does not tell them apart.

    Example:
        >>> separation(np.array([0.1, 0.2]), np.array([0.2, 0.3]))
        0.875
    """
    ordered = np.sort(inside)
    # Twice the number of inside rows below each outside row; a tie counts once, which is half of two.
    below = np.searchsorted(ordered, outside, "left") + np.searchsorted(ordered, outside, "right")
    return float(below.mean() / 2 / len(ordered))
