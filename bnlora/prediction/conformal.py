r"""Split-conformal prediction sets: sets of classes that contain the true class with a stated probability.

Every class y of a row x has a score s(x, y), which is large if the class fits badly (`class_scores`). From n
calibration rows that were not used for the fit,

    q = the k-th smallest of s(x_i, y_i),   k = ceil((n + 1) level),   set(x) = {y : s(x, y) <= q}.

If k > n there are too few rows: q is infinite and every set has all classes.

Guarantee. If calibration rows and the new row are exchangeable, P(y in set(x)) >= level, and it is at most
level + 1/(n + 1) if scores have no ties. The probability is over the calibration rows too: it says nothing
about one row, one class or one group. Given the calibration rows, coverage is random. For independent rows
without ties its law is Beta(k, n + 1 - k) (`coverage_range`); ties only increase it. With `coverage="class"`,
each class has its own q from its own rows, and the guarantee holds within each class. The probabilities need
not be calibrated or correct: bad ones only make the sets larger. A shift of the rows voids the guarantee.

References: Sadinle, Lei and Wasserman (2019), JASA 114, for `score="probability"` and for classes; Romano,
Sesia and Candes (2020), arXiv 2006.02544, for `score="adaptive"`; Vovk (2012), arXiv 1209.2673, for the Beta
law; Angelopoulos and Bates (2021), arXiv 2107.07511, for a survey.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal, get_args

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int
from scipy.stats import beta

from bnlora import metrics
from bnlora._util.checks import check_at_least, check_key, check_level, check_option, listed
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora.metrics.scores import Labelled, Labels, LogProbs, Predicted, checked, checked_log_probs
from bnlora.prediction.class_scores import Score, class_scores, places

Coverage = Literal["marginal", "class"]


@dataclass(frozen=True, repr=False, eq=False)  # arrays cannot be compared by one truth value
class SetRule(Shown):
    """A calibrated rule that gives every row a set of classes; made by `calibrate_sets`.

    Attributes:
        thresholds: Largest score with which each class is in the set; infinite if there were too few rows.
        num_rows: Number of calibration rows behind each threshold.
        level: Probability with which a set contains the true class.
        score: The score, "probability" or "adaptive".
        coverage: Whether the probability holds over all rows ("marginal") or within each class ("class").
        randomised: Whether the score is randomised, so that `sets` and `report` need a key.
    """

    thresholds: Float[np.ndarray, " c"]
    num_rows: Int[np.ndarray, " c"]
    level: float
    score: Score
    coverage: Coverage
    randomised: bool

    @property
    def caution(self) -> str:
        """What to know before the sets are used: classes with too few calibration rows. Empty if none."""
        unlimited = np.flatnonzero(np.isinf(self.thresholds))
        if not len(unlimited):
            return ""
        needed = f"level {self.level} needs at least {fewest_rows(self.level)} calibration rows"
        if self.coverage == "marginal":
            return f"{needed} and there are {self.num_rows[0]}: every set has all classes"
        return f"{needed} of each class: class {listed([*map(str, unlimited)])} is in every set"

    def sets(self, prediction: LogProbs | Predicted, *, key: Array | None = None) -> Bool[np.ndarray, "n c"]:
        """Whether each class is in the set of each row. A set can be empty.

        Args:
            prediction: A `Prediction`, or log-probabilities of shape (n, c), of new rows.
            key: Random key, required if the rule is randomised. Rows that are predicted in several parts
                need a different key for each part.

        Returns:
            A mask of shape (n, c).

        Raises:
            ValueError: If the number of classes differs from the calibration's, a row is not a distribution,
                or a key is missing or unused.
        """
        key = None if key is None else check_key(key)
        log_probs = checked_log_probs(prediction)
        if log_probs.shape[1] != len(self.thresholds):
            raise ValueError(
                f"the rule was calibrated for {len(self.thresholds)} classes; got {log_probs.shape[1]}"
            )
        if self.randomised and key is None:
            raise ValueError("the rule was calibrated with a key; pass a key to its sets too")
        if key is not None and not self.randomised:
            raise ValueError("the rule was calibrated without a key; pass none to its sets")
        # Another stream than that of the calibration: the same key must not give the same numbers there.
        return class_scores(log_probs, self.score, places(key, len(log_probs), "new")) <= self.thresholds

    def report(
        self, prediction: LogProbs | Predicted, labels: Labels | Labelled, *, key: Array | None = None
    ) -> "SetReport":
        """How often the sets contain the true class on new rows, and how large they are.

        Args:
            prediction: A `Prediction`, or log-probabilities, of rows that were not used for calibration.
            labels: True classes, or the `Batch` that has them.
            key: As in `sets`.

        Returns:
            Coverage with 95 % Wilson intervals, and the sizes of the sets.

        Raises:
            ValueError: As `sets`, or if the labels do not fit.
        """
        key = None if key is None else check_key(key)
        log_probs, labels = checked(prediction, labels)
        sets = self.sets(log_probs, key=key)
        hits = sets[np.arange(len(labels)), labels]
        sizes = np.bincount(sets.sum(1), minlength=sets.shape[1] + 1)
        within = tuple(_share(hits[labels == c]) for c in range(sets.shape[1]))
        return SetReport(self.level, _share(hits), within, sizes)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Level, score, thresholds, and the range of coverage to expect."""
        shown = range(len(self.thresholds)) if self.coverage == "class" else range(1)
        rows = tuple(
            (
                str(c) if self.coverage == "class" else "all",
                f"{self.num_rows[c]:,}",
                f"{self.thresholds[c]:.4g}",
                "{:.3f} to {:.3f}".format(*coverage_range(int(self.num_rows[c]), level=self.level)),
            )
            for c in shown
        )
        about = {
            "score": self.score + (", randomised" if self.randomised else ""),
            "level": f"{self.level:g}",
        }
        header = ("classes", "calibration rows", "threshold", "95 % of coverages")
        parts = (facts("Prediction sets", about), Table("Thresholds", header, rows))
        return (*parts, (self.caution,)) if self.caution else parts


@dataclass(frozen=True, repr=False, eq=False)
class SetReport(Shown):
    """Prediction sets on rows with labels: coverage and size.

    Attributes:
        level: Probability that the rule states.
        coverage: Share of sets with the true class, with its 95 % Wilson interval.
        class_coverage: The same among the rows of each class; NaN for a class without rows.
        sizes: Number of rows whose set has 0, 1, ..., c classes.
    """

    level: float
    coverage: metrics.Estimate
    class_coverage: tuple[metrics.Estimate, ...]
    sizes: Int[np.ndarray, " k"]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.sizes.sum())

    @property
    def mean_size(self) -> float:
        """Mean number of classes in a set."""
        return float(self.sizes @ np.arange(len(self.sizes)) / self.num_rows)

    @property
    def singletons(self) -> float:
        """Share of sets with exactly one class."""
        return float(self.sizes[1] / self.num_rows)

    @property
    def empty(self) -> float:
        """Share of sets without any class."""
        return float(self.sizes[0] / self.num_rows)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Coverage, size, and coverage within each class."""
        about = {
            "coverage (95 % interval)": str(self.coverage),
            "level": f"{self.level:g}",
            "mean number of classes": f"{self.mean_size:.3f}",
            "sets with one class": f"{self.singletons:.3f}",
            "empty sets": f"{self.empty:.3f}",
        }
        rows = tuple((str(c), str(share)) for c, share in enumerate(self.class_coverage))
        title = f"Prediction sets of {self.num_rows:,} rows"
        return (facts(title, about), Table("Within classes", ("class", "coverage (95 % interval)"), rows))


def calibrate_sets(
    prediction: LogProbs | Predicted,
    labels: Labels | Labelled,
    *,
    level: float = 0.9,
    score: Score = "probability",
    coverage: Coverage = "marginal",
    key: Array | None = None,
) -> SetRule:
    """Calibrate prediction sets on rows that were not used for the fit.

    The guarantee is stated at the top of this module (Sadinle et al. 2019; Romano et al. 2020).

    Args:
        prediction: A `Prediction`, or log-probabilities of shape (n, c), of the calibration rows.
        labels: True classes, shape (n,), or the `Batch` that has them.
        level: Probability with which a set of a new row shall contain its class.
        score: "probability" for the smallest sets, "adaptive" for sets that are larger for hard rows.
        coverage: "marginal" over all rows, or within each "class".
        key: Random key that randomises the adaptive score; deterministic, with larger sets, if omitted.

    Returns:
        The rule. It has a `caution` if there are too few rows for the level.

    Raises:
        ValueError: If `level` is outside (0, 1), an option is unknown, a key is given with another score than
            "adaptive", predictions and labels do not fit together, or a class has no row and `coverage` is
            "class".

    Example:
        >>> p = np.array([0.1, 0.9, 0.6, 0.4, 0.7, 0.2, 0.3, 0.8, 0.45])  # probability of the true class
        >>> log_probs, labels = np.log(np.stack([1 - p, p], 1)), np.ones(9, int)
        >>> rule = calibrate_sets(log_probs, labels, level=0.8)
        >>> rule.thresholds.round(3), rule.sets(np.log([[0.5, 0.5], [0.1, 0.9]])).tolist()
        (array([0.8, 0.8]), [[True, True], [False, True]])
        >>> calibrate_sets(log_probs, labels, level=0.95).caution
        'level 0.95 needs at least 19 calibration rows and there are 9: every set has all classes'
    """
    key = None if key is None else check_key(key)
    check_level(level)
    check_option("score", score, get_args(Score))
    check_option("coverage", coverage, get_args(Coverage))
    if key is not None and score != "adaptive":
        raise ValueError(f"a key randomises score='adaptive' only; got score={score!r} with a key")
    log_probs, labels = checked(prediction, labels)
    own = class_scores(log_probs, score, places(key, len(labels), "calibration"))[
        np.arange(len(labels)), labels
    ]
    classes = log_probs.shape[1]
    if coverage == "marginal":
        thresholds, counts = np.full(classes, _quantile(own, level)), np.full(classes, len(own))
    else:
        counts = np.bincount(labels, minlength=classes)
        if not counts.all():
            raise ValueError(
                "coverage='class' needs a calibration row of every class; there is none of class "
                f"{listed([str(c) for c in np.flatnonzero(counts == 0)])}"
            )
        thresholds = np.array([_quantile(own[labels == c], level) for c in range(classes)])
    return SetRule(thresholds, counts, float(level), score, coverage, key is not None)


def coverage_range(num_rows: int, *, level: float = 0.9, probability: float = 0.95) -> tuple[float, float]:
    """Range of the coverage of sets that are calibrated on `num_rows` rows: the Beta law of Vovk (2012).

    Use it to choose the number of calibration rows. Both ends are 1 if there are too few rows for the level.

    Args:
        num_rows: Number of calibration rows n; of one class, for coverage within classes.
        level: Level of the sets.
        probability: Probability with which the coverage lies in the range, over draws of calibration rows.

    Returns:
        Lower and upper end, with equal probabilities outside.

    Raises:
        ValueError: If `level` or `probability` is outside (0, 1), or `num_rows` is below 1.

    Example:
        >>> [tuple(round(x, 3) for x in coverage_range(n, level=0.9)) for n in (5, 100, 1000)]
        [(1.0, 1.0), (0.836, 0.951), (0.881, 0.918)]
    """
    check_at_least({"num_rows": num_rows}, 1)
    check_level(level)
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie in (0, 1); got {probability}")
    rank = _rank(num_rows, level)
    if rank > num_rows:
        return 1.0, 1.0
    low, high = beta(rank, num_rows + 1 - rank).ppf([(1 - probability) / 2, (1 + probability) / 2])
    return float(low), float(high)


def fewest_rows(level: float) -> int:
    """Smallest number of calibration rows with which not every set has all classes.

    Args:
        level: Level of the sets.

    Returns:
        The smallest n with ceil((n + 1) level) <= n.

    Raises:
        ValueError: If `level` is outside (0, 1).

    Example:
        >>> fewest_rows(0.9), fewest_rows(0.99)
        (9, 99)
    """
    check_level(level)
    exact = Fraction(str(float(level)))
    return ceil(exact / (1 - exact))


def _rank(num_rows: int, level: float) -> int:
    """ceil((n + 1) level) for the level as it is written: 20 * 0.55 is above 11 in floating point."""
    return ceil((num_rows + 1) * Fraction(str(float(level))))


def _quantile(scores: np.ndarray, level: float) -> float:
    rank = _rank(len(scores), level)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")


def _share(hits: np.ndarray) -> metrics.Estimate:
    if not len(hits):
        return metrics.Estimate(float("nan"), float("nan"), float("nan"))
    low, high = metrics.wilson(np.array([hits.sum()]), np.array([len(hits)]))
    return metrics.Estimate(float(hits.mean()), float(low[0]), float(high[0]))
