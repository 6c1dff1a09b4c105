r"""Is each class as frequent as predicted? A predictive check of counts by class and probability.

For each class c, the rows are divided by p_i(c) into B bins of equal size, and in each bin

    O = number of rows of class c,    E = sum_i p_i(c),    z = (O - E) / (sum_i p_i(c) (1 - p_i(c)))^(1/2)

Labels are simulated from the predictions, all classes of a row jointly. The band around E is simultaneous: it
contains all counts of all classes with probability `level`. The p-value is the share of simulations whose
largest |z| is at least that of the labels. This is a check by predictive replication, best on rows that the
fit did not use. A pointwise interval would be crossed somewhere in most data sets.

| finding      | problem | caution      |
|--------------|---------|--------------|
| class counts |         | p below 0.01 |

References: Gelman, Meng and Stern (1996), Posterior predictive assessment of model fitness via realized
discrepancies; Broecker and Smith (2007), Increasing the reliability of reliability diagrams, for bands by
resampling under calibration.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import check_at_least, check_level, class_numbers, numpy_generator
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic, Examination

SIMULATIONS = 2000
MOST_BINS = 5
ROWS_PER_BIN = 20

LEAST_P = 0.01
"""P-value below which the finding is a caution. A page shows the band of this level."""


@dataclass(frozen=True)
class ClassCounts:
    """Observed and expected counts by class and bin of predicted probability.

    Attributes:
        observed: Rows of the class in each bin, shape (class, bin).
        expected: Sum of their probabilities.
        low: Lower end of the simultaneous band of the counts.
        high: Upper end of the band.
        rows: Number of rows in each bin.
        p_value: Share of simulations with counts at least as far from the expectation.
        level: Probability that the band contains all counts.
    """

    observed: Float[np.ndarray, "c b"]
    expected: Float[np.ndarray, "c b"]
    low: Float[np.ndarray, "c b"]
    high: Float[np.ndarray, "c b"]
    rows: Int[np.ndarray, "c b"]
    p_value: float
    level: float

    @property
    def table(self) -> Any:
        """A pandas DataFrame with one row for each class and bin."""
        import pandas

        classes, bins = np.indices(self.observed.shape)
        columns = {"class": classes.ravel(), "bin": bins.ravel(), "rows": self.rows.ravel()}
        columns |= {n: getattr(self, n).ravel() for n in ("observed", "expected", "low", "high")}
        return pandas.DataFrame(columns)

    @property
    def worst(self) -> tuple[int, int]:
        """Class and bin furthest from its expectation, relative to the width of the band on that side."""
        gap = self.observed - self.expected
        side = np.where(gap > 0, self.high - self.expected, self.expected - self.low)
        far = np.abs(gap) / np.maximum(side, 1e-12)
        return tuple(np.unravel_index(far.argmax(), far.shape))  # type: ignore[return-value]

    def __repr__(self) -> str:
        classes, bins = self.observed.shape
        return f"ClassCounts({classes} classes, {bins} bins, {self.rows[0].sum()} rows, p {self.p_value:.3g})"


def class_counts(
    key: Array,
    probs: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    *,
    bins: int | None = None,
    level: float = 0.95,
) -> ClassCounts:
    """Counts of each class against predictive probabilities, with simultaneous bands.

    Args:
        key: Random key.
        probs: Probabilities of the classes of each row.
        labels: The class of each row.
        bins: Number of bins of equal size for each class; by default one for every 20 rows, at most five.
        level: Probability of the simultaneous band.

    Raises:
        ValueError: If `level` is not in (0, 1), there are fewer rows than bins, or a label is not a class.
    """
    random = numpy_generator(key)
    check_level(level)
    count, classes = probs.shape
    bins = int(np.clip(count // ROWS_PER_BIN, 1, MOST_BINS)) if bins is None else bins
    check_at_least({"bins": bins}, 1)
    check_at_least({"the number of rows": count}, bins)
    labels = class_numbers("the rows", labels, count, classes)
    member = _bins(probs, bins)  # (class, bin, row)
    expected = np.einsum("cbn,nc->cb", member, probs)
    sd = np.sqrt(np.einsum("cbn,nc->cb", member, probs * (1 - probs)))
    # Simulate labels by inverting the distribution function of each row, shape (simulation, row).
    ends = np.cumsum(probs, axis=1)[:, :-1]
    simulated = (random.random((SIMULATIONS, count, 1)) > ends).sum(-1)
    far = np.array([_distance(_counts(member, y), expected, sd) for y in simulated])
    width = np.quantile(far, level) * sd
    observed = _counts(member, labels)
    # The tolerance counts equal distances as equal in spite of rounding.
    beyond = (far >= _distance(observed, expected, sd) - 1e-9).sum()
    rows = member.sum(2).astype(int)
    low, high = np.maximum(expected - width, 0), np.minimum(expected + width, rows)
    return ClassCounts(observed, expected, low, high, rows, float((1 + beyond) / (1 + SIMULATIONS)), level)


def _bins(probs: np.ndarray, bins: int) -> np.ndarray:
    """Whether a row is in a bin of a class, shape (class, bin, row): bins of equal size by probability."""
    count, classes = probs.shape
    place = np.empty((classes, count), int)
    for c, order in enumerate(np.argsort(probs, axis=0, kind="stable").T):
        place[c, order] = np.arange(count) * bins // count
    return (place[:, None] == np.arange(bins)[:, None]).astype(float)


def _counts(member: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Number of rows of each class in each of its bins, shape (class, bin)."""
    return np.einsum("cbn,cn->cb", member, (np.arange(len(member))[:, None] == labels).astype(float))


def _distance(counts: np.ndarray, expected: np.ndarray, sd: np.ndarray) -> float:
    """Largest |z| over classes and bins."""
    return float((np.abs(counts - expected) / np.maximum(sd, 1e-12)).max())


def counted(counts: ClassCounts, *, of_training: bool) -> Finding:
    """Finding about the class counts of the given rows."""
    rows = "training rows, which is optimistic" if of_training else "given rows"
    c, b = counts.worst
    sentence = (
        f"p {counts.p_value:.3f} (at least {LEAST_P:g}) over {int(counts.rows[0].sum())} {rows}; furthest: "
        f"class {c}, bin {b + 1} of {counts.rows.shape[1]}, {counts.observed[c, b]:.0f} seen, "
        f"{counts.expected[c, b]:.1f} expected (band {counts.low[c, b]:.1f} to {counts.high[c, b]:.1f})"
    )
    if counts.p_value >= LEAST_P:
        return Finding("class counts", "fine", sentence, counts.p_value, LEAST_P)
    short = np.sign(counts.observed[c, b] - counts.expected[c, b]) < 0
    remedy = (
        f"Class {c} is {'less' if short else 'more'} frequent than predicted in that bin: check that these "
        "rows are like the training rows. bl.approximate.fit_temperature corrects only the confidence."
    )
    return Finding("class counts", "caution", sentence, counts.p_value, LEAST_P, remedy)


def _measure(exam: Examination) -> ClassCounts:
    labels = np.asarray(exam.data.labels)
    return class_counts(exam.drawn.part(5), exam.prediction.probs, labels, level=1 - LEAST_P)


def _judge(counts: ClassCounts, exam: Examination) -> Finding:
    return counted(counts, of_training=np.array_equal(exam.fit.train.tokens, exam.data.tokens))


COUNTS = Diagnostic("class counts", "class_counts", _measure, _judge)
