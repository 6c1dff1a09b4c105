r"""Means and standard deviations of two posteriors, with the Monte Carlo errors of both sides.

    shift = (mean_a - mean_r) / sd_r,            z = shift / MCSE,    MCSE^2 = (mcse_a^2 + mcse_r^2) / sd_r^2
    ratio = sd_a / sd_r,      z = log(ratio) / MCSE,   MCSE^2 = (mcse_a / sd_a)^2 + (mcse_r / sd_r)^2

z is compared with a standard normal, and the p-values are adjusted over the functions by Holm's rule. The
test of means needs finite second moments, that of standard deviations finite fourth moments. For functions
with heavier tails (norms under a horseshoe) the standard errors are too small.

References: Vehtari et al. (2021), arXiv 1903.08008, for the errors; Holm (1979).
"""

from dataclasses import dataclass

import numpy as np
import scipy  # whose parts are imported when they are first used
from jaxtyping import Float

from bnlora.assess.comparison.draws import Draws
from bnlora.assess.comparison.pairs import check_same_functions
from bnlora.metrics.ranks import holm


@dataclass(frozen=True, eq=False)
class Moments:
    """Differences of means and ratios of standard deviations, by function.

    Attributes:
        shift: Difference of the means, in standard deviations of the reference.
        shift_mcse: Monte Carlo standard error of `shift`, both sides combined.
        ratio: Standard deviation divided by that of the reference.
        ratio_mcse: Monte Carlo standard error of log(ratio), that is, relative to `ratio`.
    """

    shift: Float[np.ndarray, " k"]
    shift_mcse: Float[np.ndarray, " k"]
    ratio: Float[np.ndarray, " k"]
    ratio_mcse: Float[np.ndarray, " k"]

    @property
    def shift_z(self) -> Float[np.ndarray, " k"]:
        """`shift` divided by its standard error."""
        return self.shift / self.shift_mcse

    @property
    def ratio_z(self) -> Float[np.ndarray, " k"]:
        """log(ratio) divided by its standard error; minus infinity for a point mass."""
        # Replace zeros before the logarithm; `where` evaluates both branches.
        logs = np.log(np.where(self.ratio > 0, self.ratio, 1.0))
        return np.where(self.ratio > 0, logs / self.ratio_mcse, -np.inf)

    @property
    def shift_adjusted(self) -> Float[np.ndarray, " k"]:
        """P-values of equal means, adjusted for the number of functions."""
        return holm(2 * scipy.stats.norm.sf(np.abs(self.shift_z)))

    @property
    def ratio_adjusted(self) -> Float[np.ndarray, " k"]:
        """P-values of equal standard deviations, adjusted for the number of functions."""
        return holm(2 * scipy.stats.norm.sf(np.abs(self.ratio_z)))

    def detectable_shift(self, level: float) -> Float[np.ndarray, " k"]:
        """The shift that is detected in half of all repetitions at `level`, by Bonferroni's rule."""
        return scipy.stats.norm.isf(level / (2 * len(self.shift))) * self.shift_mcse


def moments(posterior: Draws, reference: Draws) -> Moments:
    """Compare the first two moments of each function with those of the reference.

    Raises:
        ValueError: If the functions differ, or one is constant under the reference.
    """
    check_same_functions(posterior, reference)
    return _between(posterior, reference, reference.mean, reference.sd)


def moments_null(reference: Draws) -> Moments:
    """The same comparison between the halves of the reference; the first half replaces the approximation."""
    first, second = reference.halves()
    return _between(first, second, second.mean, reference.sd)


def _between(posterior: Draws, reference: Draws, center: np.ndarray, unit: np.ndarray) -> Moments:
    relative = [_relative(side.mcse_sd, side.sd) for side in (posterior, reference)]
    return Moments(
        (posterior.mean - center) / unit,
        np.hypot(posterior.mcse_mean, reference.mcse_mean) / unit,
        posterior.sd / reference.sd,
        np.hypot(*relative),
    )


def _relative(error: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Standard error relative to the standard deviation; zero for a point mass."""
    return np.where(sd > 0, error / np.where(sd > 0, sd, 1.0), 0.0)
