r"""How much of the reference lies inside the central credible intervals of the approximation.

    coverage(c) = Pr_reference( q_(1-c)/2 <= f <= q_(1+c)/2 ),    q the approximation's quantiles

which is c where the laws are equal, less where the approximation is too narrow or shifted, more where it is
too wide. Quantiles from S draws are those of position p (S + 1), with which the expected coverage of a new
draw is c exactly for every S. The Monte Carlo error has two parts: the reference's draws that are counted
(by their effective number), and the approximation's quantiles, whose distance covers a
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
        levels: What the intervals promise.
        share: Share of the reference inside, shape (level, function).
        mcse: Its Monte Carlo standard error.
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
        levels: What the intervals promise, each in (0, 1).

    Raises:
        ValueError: When the functions differ, or a level lies outside (0, 1).
    """
    check_same_functions(posterior, reference)
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"expected levels in (0, 1), such as {LEVELS}; got {tuple(levels)}")
    found = [_inside(posterior, reference, level) for level in levels]
    null = [_inside(*reference.halves(), level) for level in levels]
    shares, errors = (np.stack(column) for column in zip(*found, strict=True))
    null_shares, null_errors = (np.stack(column) for column in zip(*null, strict=True))
    return Coverage(tuple(levels), shares, errors, null_shares, null_errors)


def _inside(posterior: Draws, reference: Draws, level: float) -> tuple[np.ndarray, np.ndarray]:
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(posterior.pooled, tails, axis=0, method="weibull")
    inside = (reference.values >= low) & (reference.values <= high)
    share = inside.mean((0, 1))
    # By the Agresti-Coull rule: an error of zero where all or no draws are inside would be a lie.
    steady = (share * reference.ess + 2) / (reference.ess + 4)
    counted = steady * (1 - steady) / (reference.ess + 4)
    quantiles = level * (1 - level) / (posterior.ess + 2)
    return share, np.sqrt(counted + quantiles)
