r"""Are the predictive probabilities calibrated? Randomised probability integral transforms.

    u_i = F_i(y_i - 1) + v_i p_i(y_i),    F_i(c) = sum_{c' <= c} p_i(c'),    v_i uniform on (0, 1)

If y_i is drawn from p_i, u_i is exactly uniform, for discrete classes in any fixed order. p_i is the
leave-one-out prediction of row i, so that no row is used twice. The empirical distribution function of the u
is compared with simultaneous bands, which contain all of it with probability `level`:

    P( gamma / 2 <= Bin(n, z).cdf(n ECDF(z)) <= 1 - gamma / 2  for all z ) = level

gamma and a p-value are computed by simulation of uniform samples. In a histogram of the u, a slope means that
the classes at one end are predicted too often, a hill in the middle that predictions are too cautious, and a
valley that they are too confident.

| finding | problem | caution      |
|---------|---------|--------------|
| LOO-PIT |         | p below 0.01 |

Reference: Czado, Gneiting and Held (2009), Predictive model assessment for count data; Saeilynoja, Buerkner
and Vehtari (2022), Graphical test for discrete uniformity, arXiv 2103.10522.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from scipy.stats import binom

from bnlora._util.checks import check_level, class_numbers, numpy_generator
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic, Examination
from bnlora.assess.diagnostics.loo import loo_probs
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.infer.svi.result import Fit

SIMULATIONS = 2000
POINTS = 50

LEAST_P = 0.01
"""P-value below which the finding is a caution. A page shows the band of this level."""


@dataclass(frozen=True)
class Pit:
    """Randomised probability integral transforms against uniformity.

    Attributes:
        values: The transform of every row.
        grid: Points z at which the distribution functions are compared.
        ecdf: Share of values that are at most z.
        low: Lower end of the simultaneous band.
        high: Upper end of the band.
        p_value: Probability that uniform values are at least as extreme: outside the narrowest band around
            these values, or on its edge.
        level: Probability that uniform values are inside the band everywhere.
    """

    values: Float[np.ndarray, " n"]
    grid: Float[np.ndarray, " z"]
    ecdf: Float[np.ndarray, " z"]
    low: Float[np.ndarray, " z"]
    high: Float[np.ndarray, " z"]
    p_value: float
    level: float

    @property
    def inside(self) -> bool:
        """Whether the distribution function is inside the band everywhere."""
        return bool(((self.low <= self.ecdf) & (self.ecdf <= self.high)).all())

    def __repr__(self) -> str:
        where = "within" if self.inside else "outside"
        return f"Pit({len(self.values)} rows, {where} the {self.level:.0%} band, p {self.p_value:.3g})"


def loo_pit(fit: Fit | Sample, *, level: float = 0.95) -> Pit:
    """Randomised transforms of the training rows under their leave-one-out predictions.

    Args:
        fit: A fit, or a `Sample` of it.
        level: Probability of the simultaneous band.

    Raises:
        ValueError: If the guide has no density, or `level` is not in (0, 1).
    """
    sample = sample_of(fit)
    labels = np.asarray(sample.fit.train.labels)
    return randomised_pit(sample.part(4), loo_probs(sample), labels, level=level)


def randomised_pit(
    key: Array,
    probs: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    *,
    level: float = 0.95,
) -> Pit:
    """Randomised transforms of labels under predictive probabilities.

    Args:
        key: Random key.
        probs: Probabilities of the classes of each row.
        labels: The class of each row.
        level: Probability of the simultaneous band.

    Raises:
        ValueError: If `level` is not in (0, 1), or a label is not a class.
    """
    random = numpy_generator(key)
    check_level(level)
    labels = class_numbers("the rows", labels, *probs.shape)
    # F_i(c - 1) for every class, shape (row, class + 1).
    below = np.concatenate([np.zeros((len(probs), 1)), np.cumsum(probs, axis=1)], axis=1)
    rows = np.arange(len(probs))
    values = below[rows, labels] + random.random(len(probs)) * probs[rows, labels]
    count = len(values)
    grid = np.arange(1, POINTS) / POINTS
    # Depth: smallest pointwise tail probability. gamma is its `1 - level` quantile for uniform samples.
    depths = np.array([_depth(random.random(count), grid) for _ in range(SIMULATIONS)])
    gamma = float(np.quantile(depths, 1 - level))
    low, high = (binom.ppf(q, count, grid) / count for q in (gamma / 2, 1 - gamma / 2))
    p_value = (1 + (depths <= _depth(values, grid)).sum()) / (1 + SIMULATIONS)
    ecdf = np.searchsorted(np.sort(values), grid, side="right") / count
    return Pit(values, grid, ecdf, low, high, float(p_value), level)


def _depth(values: np.ndarray, grid: np.ndarray) -> float:
    """Smallest pointwise two-sided tail probability of the counts up to each point of the grid."""
    count = len(values)
    below = np.searchsorted(np.sort(values), grid, side="right")
    lower, upper = _tails(count)
    at = np.arange(len(grid))
    return float(2 * min(lower[at, below].min(), upper[at, below].min()))


@lru_cache(maxsize=4)
def _tails(count: int) -> tuple[np.ndarray, np.ndarray]:
    """P(X <= k) and P(X >= k) of binomial counts at every point of the grid, shape (point, count + 1)."""
    grid, k = np.arange(1, POINTS)[:, None] / POINTS, np.arange(count + 1)
    return binom.cdf(k, count, grid), binom.sf(k - 1, count, grid)


def transforms(pit: Pit, *, reliable: bool) -> Finding:
    """Finding about the calibration of the leave-one-out predictions of the training labels."""
    if not reliable:
        return Finding("LOO-PIT", "not asked", "leave-one-out is not reliable here")
    where = "within" if pit.inside else "outside"
    sentence = (
        f"{where} the simultaneous {pit.level:.0%} band, p {pit.p_value:.3f} (at least {LEAST_P:g}), "
        f"{len(pit.values)} training rows"
    )
    if pit.p_value >= LEAST_P:
        return Finding("LOO-PIT", "fine", sentence, pit.p_value, LEAST_P)
    remedy = f"The predictions do not fit the labels{_shape(pit.values)}: check labels, template and words."
    return Finding("LOO-PIT", "caution", sentence, pit.p_value, LEAST_P, remedy)


def _shape(values: Float[np.ndarray, " n"]) -> str:
    """Difference from uniform in words, if mean or spread is two standard errors from its uniform value."""
    centred, root = values - 0.5, len(values) ** 0.5
    # Under uniformity: variance 1/12 of u, and variance 1/180 of (u - 1/2)^2 with mean 1/12.
    lean = centred.mean() * root * 12**0.5
    if abs(lean) > 2:
        return f", the {'last' if lean > 0 else 'first'} classes are more frequent than predicted"
    spread = ((centred**2).mean() - 1 / 12) * root * 180**0.5
    if abs(spread) > 2:
        how = "confident" if spread > 0 else "cautious"
        return f", they are too {how} (bl.approximate.fit_temperature helps)"
    return ""


def _measure(exam: Examination) -> Pit:
    sample, labels = exam.drawn, np.asarray(exam.fit.train.labels)
    return randomised_pit(sample.part(4), loo_probs(sample), labels, level=1 - LEAST_P)


def _judge(pit: Pit, exam: Examination) -> Finding:
    return transforms(pit, reliable=exam.findings["leave-one-out"].status in ("fine", "caution"))


TRANSFORMS = Diagnostic("LOO-PIT", "pit", _measure, _judge, needs=("density",))
