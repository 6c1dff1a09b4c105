r"""Confidence sequences of a mean: intervals that all hold together, so that one may look after every row.

Let X_1, X_2, ... be in [0, 1] with E[X_t | past] = mu. For every candidate mean m, two gamblers bet that the
mean is above and below m (hedged capital, Waudby-Smith and Ramdas 2024, JRSS B 86, arXiv 2010.09686,
section 4.2):

    K_t^+(m) = prod_i (1 + min(l_i, c/m) (X_i - m)),
    K_t^-(m) = prod_i (1 - min(l_i, c/(1-m)) (X_i - m)),
    l_i = sqrt(2 log(2/alpha) / (v_{i-1} i log(1 + i))),    c = 1/2,
    v_i = (1/4 + sum_{j <= i} (X_j - mean_j)^2) / (i + 1),  mean_i = (1/2 + sum_{j <= i} X_j) / (i + 1),
    C_t = {m : max(K_t^+(m), K_t^-(m)) / 2 < 1/alpha},      P(mu in C_t for all t) >= 1 - alpha.

The hedged capital is preferred to the closed-form empirical-Bernstein sequence of the same paper, because it
is narrower, most of all for means near 0 or 1. C_t is an interval. It is computed on a grid of m that is
denser near 0 and 1, and widened to the next grid points, so that it contains C_t. Rows are bounded linearly
to [0, 1] first.

The mean must not change. If it does, C_t is not an interval for any mean. The intersection of C_1, ..., C_t
then becomes empty sooner or later, and `fits` is False; with a constant mean this has probability at most
alpha. (The grid is too coarse for `fits` beyond about a million rows.)
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import check_level

GRID = (1 - np.cos(np.linspace(0, np.pi, 401))) / 2
"""Candidate means. Neighbours differ by about 0.008 sqrt(m (1 - m))."""

TRUNCATION = 0.5
"""The share c of its capital that a gambler may lose at one row."""

_TOGETHER = 512  # rows whose bets on the whole grid are in memory at a time


@dataclass(frozen=True)
class MeanSequence:
    """Confidence sequence of the mean of bounded values.

    Attributes:
        low: Smallest possible value.
        high: Largest possible value.
        level: Probability that all intervals contain the mean.
        num_rows: Number of values.
        total: Their sum, after scaling to [0, 1].
        squares: Sum of squared distances from the running means, after scaling.
        log_above: Log-capital of the gambler above each mean of `GRID`.
        log_below: Log-capital of the gambler below each of them.
        log_peak: Log of the largest hedged capital so far.

    Example:
        >>> sequence = MeanSequence.start(0.0, 1.0).update(np.tile([1.0, 1.0, 1.0, 0.0], 100))
        >>> sequence.mean, [round(end, 2) for end in sequence.interval]
        (0.75, [0.67, 0.83])
    """

    low: float
    high: float
    level: float
    num_rows: int
    total: float
    squares: float
    log_above: Float[np.ndarray, " m"]
    log_below: Float[np.ndarray, " m"]
    log_peak: Float[np.ndarray, " m"]

    @classmethod
    def start(cls, low: float, high: float, *, level: float = 0.95) -> "MeanSequence":
        """The sequence before the first value.

        Args:
            low: Smallest possible value.
            high: Largest possible value.
            level: Probability that all intervals contain the mean.

        Raises:
            ValueError: If `low` is not below `high`, or `level` is not in (0, 1).
        """
        check_level(level)
        if not low < high:
            raise ValueError(f"low must be below high; got {low} and {high}")
        nothing = np.zeros(len(GRID))
        return cls(low, high, level, 0, 0.0, 0.0, nothing, nothing, nothing)

    def update(self, values: Float[np.ndarray, " n"]) -> "MeanSequence":
        """The sequence after more values.

        Raises:
            ValueError: If a value is not between `low` and `high`.
        """
        values = np.asarray(values, np.float64)
        if not ((values >= self.low) & (values <= self.high)).all():
            raise ValueError(f"values must be from {self.low} to {self.high}; got {_outside(self, values)}")
        sequence = self
        for begin in range(0, len(values), _TOGETHER):
            sequence = sequence._updated(values[begin : begin + _TOGETHER])
        return sequence

    def _updated(self, values: np.ndarray) -> "MeanSequence":
        scaled = (values - self.low) / (self.high - self.low)
        stakes, total, squares = predictable_stakes(
            scaled, level=self.level, num_rows=self.num_rows, total=self.total, squares=self.squares
        )
        payments = log_payments(scaled[:, None], stakes[:, None], GRID)
        above, below = self.log_above + payments[0].cumsum(0), self.log_below + payments[1].cumsum(0)
        peak = np.maximum(self.log_peak, (np.maximum(above, below) - np.log(2)).max(0))
        return MeanSequence(
            self.low, self.high, self.level, self.num_rows + len(values), float(total), float(squares),
            above[-1], below[-1], peak,
        )  # fmt: skip

    @property
    def mean(self) -> float:
        """Mean of the values so far; NaN without values."""
        return self._unscaled(self.total / self.num_rows) if self.num_rows else float("nan")

    @property
    def fits(self) -> bool:
        """Whether there is a mean that all intervals so far contain."""
        return bool((self.log_peak < -np.log(1 - self.level)).any())

    @property
    def interval(self) -> tuple[float, float]:
        """The interval after the values so far."""
        capital = self._log_hedged
        kept = np.flatnonzero(capital < -np.log(1 - self.level))
        # Quasi-convex in m: a set between two grid points lies beside the smallest capital.
        first, last = (kept[0], kept[-1]) if len(kept) else (capital.argmin(), capital.argmin())
        ends = GRID[max(first - 1, 0)], GRID[min(last + 1, len(GRID) - 1)]
        return self._unscaled(float(ends[0])), self._unscaled(float(ends[1]))

    @property
    def _log_hedged(self) -> np.ndarray:
        return np.maximum(self.log_above, self.log_below) - np.log(2)

    def _unscaled(self, share: float) -> float:
        return self.low + (self.high - self.low) * share


def predictable_stakes(
    values: Float[np.ndarray, "*s n"],
    *,
    level: float,
    num_rows: int = 0,
    total: Float[np.ndarray, "*s"] | float = 0.0,
    squares: Float[np.ndarray, "*s"] | float = 0.0,
) -> tuple[Float[np.ndarray, "*s n"], Float[np.ndarray, "*s"], Float[np.ndarray, "*s"]]:
    """The stake l_i of each row, from the rows before it, and the sums after all rows.

    Args:
        values: Values in [0, 1]; leading axes are independent streams.
        level: Probability of the sequence, 1 - alpha.
        num_rows: Number of rows before these.
        total: Their sum.
        squares: Their sum of squared distances from the running means.
    """
    count = num_rows + np.arange(1, values.shape[-1] + 1)
    totals = np.asarray(total)[..., None] + np.cumsum(values, -1)
    distances = (values - (0.5 + totals) / (count + 1)) ** 2
    all_squares = np.asarray(squares)[..., None] + np.cumsum(distances, -1)
    before = np.concatenate(
        [np.broadcast_to(np.asarray(squares)[..., None], (*values.shape[:-1], 1)), all_squares[..., :-1]], -1
    )
    variance = (0.25 + before) / count
    stakes = np.sqrt(2 * np.log(2 / (1 - level)) / (variance * count * np.log1p(count)))
    return stakes, totals[..., -1], all_squares[..., -1]


def log_payments(
    values: Float[np.ndarray, "..."], stakes: Float[np.ndarray, "..."], means: Float[np.ndarray, "..."]
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Log of what the gamblers above and below each candidate mean get at each value; shapes broadcast."""
    with np.errstate(divide="ignore"):
        above = np.minimum(stakes, TRUNCATION / means)
        below = np.minimum(stakes, TRUNCATION / (1 - means))
    return np.log1p(above * (values - means)), np.log1p(-below * (values - means))


def _outside(sequence: MeanSequence, values: np.ndarray) -> float:
    return float(values[~((values >= sequence.low) & (values <= sequence.high))][0])
