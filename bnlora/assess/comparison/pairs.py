r"""Samples of equal size for two-sample measures and their null levels.

    value = (d(A_1, R_1) + d(A_2, R_2)) / 2,    null level = d(R_1, R_2)

A_1, A_2 are halves of the approximation's draws and R_1, R_2 those of the reference, all thinned to the same
number n of approximately independent draws. A distance between samples is positive even if their laws are
equal; the bias depends on n (of order n^-1/2). With equal sizes, value and null level have the same bias and
can be compared. Every function is standardised by the reference: its mean is subtracted, and the result is
divided by its standard deviation.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import listed
from bnlora.assess.comparison.draws import Draws

LEAST_SIZE = 10
MAX_SIZE = 500


def varying(posterior: Draws, reference: Draws) -> tuple[Draws, Draws]:
    """Both sides without the functions that are constant under the reference.

    Raises:
        ValueError: If the functions differ, or none varies under the reference.
    """
    _check_names(posterior, reference)
    constant = reference.constant
    if len(constant) == len(reference.names):
        raise ValueError(
            "expected a function that varies under the second posterior; these have the same value in all "
            f"of its draws: {listed(constant)}"
        )
    names = [name for name in reference.names if name not in constant]
    return posterior.only(names), reference.only(names)


def _check_names(posterior: Draws, reference: Draws) -> None:
    if posterior.names != reference.names:
        raise ValueError(
            f"expected the same functions on both sides; got {posterior.names} and {reference.names}"
        )


@dataclass(frozen=True, eq=False)
class Pairs:
    """Two halves of each side, standardised by the reference.

    Attributes:
        posterior: Halves of the approximation, shape (2, n, function).
        reference: Halves of the reference.
    """

    posterior: Float[np.ndarray, "2 n k"]
    reference: Float[np.ndarray, "2 n k"]

    @property
    def size(self) -> int:
        """Number of draws n in each half."""
        return self.posterior.shape[1]


def check_same_functions(posterior: Draws, reference: Draws) -> None:
    """Raise `ValueError` unless both sides have the same functions and all vary under the reference."""
    _check_names(posterior, reference)
    if reference.constant:
        fixed = ", ".join(reference.constant)
        raise ValueError(f"expected functions that vary under the reference; constant: {fixed}")


def pairs(posterior: Draws, reference: Draws, *, max_size: int = MAX_SIZE) -> Pairs:
    """Halves of equal size from both sides.

    Args:
        posterior: Draws of the approximation.
        reference: Draws of the reference.
        max_size: Largest number of draws in each half; the run time of the measures grows with its square.

    Raises:
        ValueError: If the functions differ, one is constant under the reference, or a side has fewer than
            20 approximately independent draws.
    """
    check_same_functions(posterior, reference)
    size = min(posterior.independent_size // 2, reference.independent_size // 2, max_size)
    if size < LEAST_SIZE:
        raise ValueError(
            f"expected at least {2 * LEAST_SIZE} draws on each side that are nearly independent; got "
            f"{posterior.independent_size} ({posterior.describe}) and {reference.independent_size} "
            f"({reference.describe}); draw more"
        )

    def standardised(side: Draws) -> np.ndarray:
        halves = np.stack([half.thinned(size) for half in side.halves()])  # (2, n, k)
        return (halves - reference.mean) / reference.sd

    return Pairs(standardised(posterior), standardised(reference))
