r"""Share of the reference inside the central credible intervals of the approximation.

    coverage(c) = Pr_reference( q_(1-c)/2 <= f <= q_(1+c)/2 ),    q the approximation's quantiles

The coverage is c if the laws are equal, less if the approximation is too narrow or shifted, and more if it is
too wide. The p-quantile of S draws is taken at position p (S + 1) of the sorted draws; the expected coverage
of a new draw is then exactly c for every S. The Monte Carlo error has two parts: the finite number of draws
of the reference (its effective sample size), and the error of the approximation's quantiles, which enclose a
Beta(c (S + 1), (1 - c) (S + 1)) share of its law.

Reference: David and Nagaraja (2003), Order statistics, section 2.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bnlora.assess.comparison.draws import Draws
from bnlora.assess.comparison.pairs import check_same_functions

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Coverage:
    """Coverage of central intervals, by level and function.

    Attributes:
        levels: Nominal coverage c of the intervals.
        share: Share of the reference inside, shape (level, function).
        mcse: Monte Carlo standard error of `share`.
        null: Coverage of the reference's second half by the intervals of its first.
        null_mcse: Standard error of `null`.
    """

    levels: tuple[float, ...]
    share: Float[np.ndarray, "level k"]
    mcse: Float[np.ndarray, "level k"]
    null: Float[np.ndarray, "level k"]
    null_mcse: Float[np.ndarray, "level k"]


def coverage(posterior: Draws, reference: Draws, *, levels: Sequence[float] = LEVELS) -> Coverage:
    """Coverage of the approximation's central intervals under the reference.

    Args:
        posterior: Draws of the approximation.
        reference: Draws of the reference.
        levels: Nominal coverages of the intervals, each in (0, 1).

    Raises:
        ValueError: If the functions differ or are constant under the reference, or a level is not in (0, 1).
    """
    check_same_functions(posterior, reference)
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"expected levels in (0, 1), such as {LEVELS}; got {tuple(levels)}")
    between = [_inside(posterior, reference, level) for level in levels]
    null = [_inside(*reference.halves(), level) for level in levels]
    shares, errors = (np.stack(column) for column in zip(*between, strict=True))
    null_shares, null_errors = (np.stack(column) for column in zip(*null, strict=True))
    return Coverage(tuple(levels), shares, errors, null_shares, null_errors)


def _inside(posterior: Draws, reference: Draws, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of the reference inside one interval of each function, and its standard error, shape (k,)."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    # "weibull" is NumPy's name for the quantile at position p (S + 1).
    low, high = np.quantile(posterior.pooled, tails, axis=0, method="weibull")
    inside = (reference.values >= low) & (reference.values <= high)
    share = inside.mean((0, 1))
    # Agresti-Coull: add two draws inside and two outside, so that a share of 0 or 1 has an error above zero.
    steady = (share * reference.ess + 2) / (reference.ess + 4)
    binomial = steady * (1 - steady) / (reference.ess + 4)
    # Variance of the Beta law of the module docstring, with the effective number of draws for S.
    quantiles = level * (1 - level) / (posterior.ess + 2)
    return share, np.sqrt(binomial + quantiles)
