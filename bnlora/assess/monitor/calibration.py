r"""Is the confidence calibrated? Bets on whether each row is right, and running bins as a description.

Let c_t be the confidence of row t and y_t = 1 if its most probable class is the true one. The null is

    P(y_t = 1 | c_t, past) = c_t    for all t.

A bet has another probability q(c) and pays the ratio of likelihoods, whose mean under the null is 1:

    L_t = q(c_t) / c_t if y_t = 1,    (1 - q(c_t)) / (1 - c_t) if y_t = 0,    logit q(c) = a logit c + b.

Slopes a below 1 say that the confidence is too extreme, as a temperature above 1 does; shifts b < 0 say that
it is too high. The mixture over these and over start times (`betting`) has P(any alarm) <= alpha.

A confidence above 0.9999 counts as 0.9999, and is no evidence that the confidence is too low: then one wrong
label among rows whose probability was rounded to 1 is not infinite evidence, and the payment's mean is at
most 1 still.

The expected calibration error is not a mean of rows. It is biased upwards in small samples and has no
confidence sequence here: `Bins.ece` is a description. The mean of confidence minus correctness has one
(`sequences`).

References: Henzi and Ziegel (2022), Valid sequential inference on probability forecast performance,
Biometrika 109; Arnold, Henzi and Ziegel (2023), Sequentially valid tests for forecast
calibration, AoAS 17, arXiv 2109.11761.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # imports its submodules when they are first used
from jaxtyping import Bool, Float

from bnlora._util.display import Table
from bnlora.metrics.scores import BINS, width_bin

LARGEST = 1 - 1e-4
"""Confidences above this count as this."""

_SLOPES = np.array([1 / 3, 1 / 2, 2 / 3, 3 / 2, 2, 3, 1, 1, 1, 1])
_SHIFTS = np.array([0, 0, 0, 0, 0, 0, -1, -0.4, 0.4, 1])

NUM_BETS = len(_SLOPES)
"""Number of bets."""


def log_bets_on_calibration(
    confidence: Float[np.ndarray, "*s n"], correct: Bool[np.ndarray, "*s n"]
) -> Float[np.ndarray, "*s n k"]:
    """Log-payments of bets against calibrated confidences.

    Args:
        confidence: Probability of the most probable class, in (0, 1]; leading axes are independent streams.
        correct: Whether this class is the true one.
    """
    null = np.minimum(confidence, LARGEST)[..., None]
    bet = scipy.special.expit(_SLOPES * scipy.special.logit(null) + _SHIFTS)
    bet = np.clip(bet, 1e-9, 1 - 1e-9)
    bet = np.where(confidence[..., None] > LARGEST, np.minimum(bet, null), bet)
    return np.where(correct[..., None], np.log(bet / null), np.log((1 - bet) / (1 - null)))


@dataclass(frozen=True)
class Bins:
    """Sums by bin of confidence, of equal width in (0, 1]; a description without guarantee.

    Attributes:
        count: Number of labelled rows in each bin.
        confidence: Sum of their confidences.
        correct: Number of them that are right.

    Example:
        >>> Bins.start(2).update(np.array([0.9, 0.9]), np.array([True, False])).ece
        0.4
    """

    count: Float[np.ndarray, " b"]
    confidence: Float[np.ndarray, " b"]
    correct: Float[np.ndarray, " b"]

    @classmethod
    def start(cls, bins: int = BINS) -> "Bins":
        """Empty bins."""
        return cls(np.zeros(bins), np.zeros(bins), np.zeros(bins))

    def update(self, confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> "Bins":
        """The sums after more rows."""
        at, size = width_bin(confidence, len(self.count)), len(self.count)
        return Bins(
            self.count + np.bincount(at, minlength=size),
            self.confidence + np.bincount(at, confidence, minlength=size),
            self.correct + np.bincount(at, correct, minlength=size),
        )

    @property
    def ece(self) -> float:
        """Expected calibration error of all labelled rows so far; NaN without rows."""
        rows = self.count.sum()
        return float(np.abs(self.correct - self.confidence).sum() / rows) if rows else float("nan")

    @property
    def table(self) -> Table:
        """Confidence and accuracy of each bin that has rows."""
        width, used = 1 / len(self.count), np.flatnonzero(self.count)
        rows = tuple(
            (
                f"{i * width:.2f} to {(i + 1) * width:.2f}",
                f"{self.count[i]:,.0f}",
                f"{self.confidence[i] / self.count[i]:.3f}",
                f"{self.correct[i] / self.count[i]:.3f}",
                f"{(self.confidence[i] - self.correct[i]) / self.count[i]:+.3f}",
            )
            for i in used
        )
        title = f"Calibration by confidence: running ECE {self.ece:.3f} (a description, without guarantee)"
        return Table(title, ("confidence", "rows", "mean confidence", "accuracy", "difference"), rows)
