r"""Abstention with a guarantee: a threshold on the doubt below which few answers are wrong.

A rule answers the rows whose doubt u is at most t. Its risk is R(t) = P(wrong | u <= t). From n rows with
labels, `control_risk` chooses the largest t that passes, of a list t_1 < ... < t_K, such that

    P(R(t) <= max_risk) >= level          over draws of the n rows.

The method is Learn then Test (Angelopoulos et al. 2021). For each t_k the hypothesis "R(t_k) > max_risk" has
the exact p-value P(Binomial(m_k, max_risk) <= e_k), where e_k of the m_k answered rows are wrong.
Fixed-sequence testing runs upwards from five starts, each with a fifth of the error probability 1 - level. A
test that rejects passes all it has to the next threshold, which adds its own share if it is a start; a test
that fails passes nothing. This fallback procedure (Wiens 2003) controls the probability of any false
rejection, whatever the dependence of the p-values. So the largest rejected t may be taken.

Why several starts: the smallest thresholds answer too few rows to reject anything. A sequence from t_1 would
end there, and to skip those would let the rows choose the first hypothesis. Why not the binary search of
Geifman and El-Yaniv (2017): its thresholds depend on the same rows that test them, and a binomial tail does
not cover this.

The thresholds must be chosen without the labelled rows. By default they are a fixed grid, dense near both
ends of the range of the doubt: t = limit / (1 + exp(-z)) with z from -9 to 6, where the limit is the doubt of
a uniform prediction. The guarantee needs independent rows from the law of the new ones; a shift voids it. It
is about the average over answered rows, not about one row or one class. It does not need calibrated
probabilities: a doubt that does not rank the errors only leads to fewer answers.

References: Angelopoulos, Bates, Candes, Jordan and Lei (2021), arXiv 2110.01052; Wiens (2003), Pharmaceutical
Statistics 2; Geifman and El-Yaniv (2017), arXiv 1705.08500.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binom

from bnlora._util.checks import check_level, check_option
from bnlora._util.display import Showable, Shown, facts
from bnlora.metrics.scores import Labelled, Labels, checked
from bnlora.prediction.predict import Prediction
from bnlora.prediction.selective import Doubt, doubt

NUM_THRESHOLDS = 1000
"""Number of thresholds of the default grid."""

NUM_STARTS = 5
"""Number of thresholds, equally spaced in the list, at which a sequence of tests starts."""


@dataclass(frozen=True, repr=False)
class AnswerRule(Shown):
    """A rule that answers rows of little doubt and abstains from the others; made by `control_risk`.

    Attributes:
        threshold: Largest doubt with an answer; minus infinity if the rule answers no row.
        by: The doubt.
        max_risk: Largest share of wrong answers in the long run.
        level: Probability that this holds, over draws of the labelled rows.
        num_rows: Number of labelled rows.
        num_answered: Number of labelled rows with an answer.
        num_wrong: Number of wrong answers among them.
    """

    threshold: float
    by: Doubt
    max_risk: float
    level: float
    num_rows: int
    num_answered: int
    num_wrong: int

    @property
    def coverage(self) -> float:
        """Share of the labelled rows with an answer."""
        return self.num_answered / self.num_rows

    @property
    def caution(self) -> str:
        """Why the rule answers no row; empty if it answers some."""
        if self.threshold >= 0:
            return ""
        return (
            f"no threshold has a risk of at most {self.max_risk:g} with probability {self.level:g} by these "
            f"{self.num_rows} rows: the rule answers no row"
        )

    def answers(self, prediction: Prediction) -> Bool[np.ndarray, " n"]:
        """Whether the rule answers each row.

        Args:
            prediction: The prediction of new rows.

        Returns:
            A mask of shape (n,); the answer is the most probable class.
        """
        return doubt(prediction, self.by) <= self.threshold

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The guarantee, the threshold, and what it does on the labelled rows."""
        answered = f"{self.num_answered:,} of {self.num_rows:,}"
        about = {
            "wrong answers": f"at most {self.max_risk:g} of them, with probability {self.level:g}",
            "answered": f"{self.by} doubt at most {self.threshold:.4g}" if self.threshold >= 0 else "no row",
            "labelled rows answered": f"{answered}, {self.num_wrong:,} of them wrong",
        }
        parts = (facts("Answers with controlled risk", about),)
        return (*parts, (self.caution,)) if self.caution else parts


def control_risk(
    prediction: Prediction,
    labels: Labels | Labelled,
    *,
    max_risk: float = 0.05,
    level: float = 0.95,
    by: Doubt = "confidence",
    thresholds: Float[np.ndarray, " k"] | None = None,
) -> AnswerRule:
    """Choose a threshold on the doubt such that answers below it are wrong at most at a stated rate.

    The method is at the top of this module: Learn then Test (Angelopoulos et al. 2021) from several starts.

    Args:
        prediction: Prediction of labelled rows that were not used for the fit.
        labels: True classes, shape (n,), or the `Batch` that has them.
        max_risk: Largest share of wrong answers.
        level: Probability that the rule keeps to it, over draws of these rows.
        by: The doubt.
        thresholds: Thresholds to try, chosen without these rows, such as quantiles of the doubt of other
            rows; a fixed grid if omitted.

    Returns:
        The rule. If no threshold passes, it answers no row and has a `caution`.

    Raises:
        ValueError: If `max_risk` or `level` is outside (0, 1), `by` is unknown, the labels do not fit, or the
            thresholds are not a vector of finite numbers.

    Example:
        >>> sure = np.concatenate([np.full(300, 0.99), np.full(100, 0.6)])
        >>> labels = np.concatenate([np.ones(300, int), np.arange(100) % 2])  # half of the doubtful are wrong
        >>> rule = control_risk(Prediction(np.log([np.stack([1 - sure, sure], 1)])), labels)
        >>> rule.num_answered, rule.num_wrong
        (300, 0)
        >>> rule.answers(Prediction(np.log([[[0.005, 0.995], [0.45, 0.55]]])))
        array([ True, False])
    """
    check_option("by", by, get_args(Doubt))
    check_level(level)
    if not 0 < max_risk < 1:
        raise ValueError(f"max_risk must lie in (0, 1); got {max_risk}")
    log_probs, labels = checked(prediction.log_probs, labels)
    tried = _grid(log_probs.shape[1], by) if thresholds is None else _checked_thresholds(thresholds)
    of_row, wrong = doubt(prediction, by), log_probs.argmax(1) != labels
    answered, errors = (np.searchsorted(np.sort(x), tried, "right") for x in (of_row, of_row[wrong]))
    last = _fallback(binom.cdf(errors, answered, max_risk), 1 - level)
    if last is None:
        return AnswerRule(-float("inf"), by, max_risk, level, len(labels), 0, 0)
    numbers = len(labels), int(answered[last]), int(errors[last])
    return AnswerRule(float(tried[last]), by, max_risk, level, *numbers)


def _grid(num_classes: int, by: Doubt) -> Float[np.ndarray, " k"]:
    """Thresholds that do not depend on the rows."""
    limit = 1 - 1 / num_classes if by == "confidence" else np.log(num_classes)
    return limit / (1 + np.exp(-np.linspace(-9, 6, NUM_THRESHOLDS)))


def _checked_thresholds(thresholds: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    values = np.asarray(thresholds, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"thresholds must be a vector of finite numbers; got shape {values.shape}")
    return np.unique(values)


def _fallback(pvalues: Float[np.ndarray, " k"], error: float) -> int | None:
    """Index of the last rejected hypothesis; None if none is rejected (Wiens 2003)."""
    num_starts = min(NUM_STARTS, len(pvalues))
    starts = {len(pvalues) * start // num_starts for start in range(num_starts)}
    last, budget = None, 0.0
    for index, pvalue in enumerate(pvalues):
        budget += error / num_starts if index in starts else 0.0
        if 0 < budget and pvalue <= budget:
            last = index
        else:
            budget = 0.0
    return last
