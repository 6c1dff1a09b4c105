r"""Wasserstein distances between two posteriors.

    W_1(a, r)   = int |F_a(x) - F_r(x)| dx                        of each function separately
    SW_2(a, r)^2 = mean over directions t of W_2(t . a, t . r)^2    of all functions together

The unit is the standard deviation of the reference. The directions t are uniform on the sphere. A shift of a
function by one unit gives W_1 = 1; a shift of all k functions by the vector m gives SW_2 = |m| / sqrt(k).
Values and null levels are computed from samples of equal size (`bnlora.assess.comparison.pairs`), by scipy
and POT.

References: Bonneel, Rabin, Peyre and Pfister (2015), Sliced and Radon Wasserstein barycenters of measures;
Flamary et al. (2021), POT: Python optimal transport.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # whose parts are imported when they are first used
from jaxtyping import Float

from bnlora.assess.comparison.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Transport:
    """Wasserstein distances with their null levels.

    Attributes:
        marginal: W_1 of each function.
        marginal_null: The same between halves of the reference.
        sliced: Sliced W_2 of all functions together.
        sliced_null: The same between halves of the reference.
        num_slices: Number of directions.
    """

    marginal: Float[np.ndarray, " k"]
    marginal_null: Float[np.ndarray, " k"]
    sliced: float
    sliced_null: float
    num_slices: int


def transport(random: np.random.Generator, samples: Pairs, *, num_slices: int = 200) -> Transport:
    """W_1 by function and sliced W_2, with null levels.

    Args:
        random: Generator of the directions; value and null level use the same directions.
        samples: Halves of both sides.
        num_slices: Number of directions.

    Raises:
        ValueError: If `num_slices` is below one.
    """
    import ot

    if num_slices < 1:
        raise ValueError(f"num_slices must be at least 1; got {num_slices}")
    seed = int(random.integers(2**31))
    directions = ot.sliced.get_random_projections(samples.posterior.shape[2], num_slices, seed)

    def sliced(x: np.ndarray, y: np.ndarray) -> float:
        return float(ot.sliced_wasserstein_distance(x, y, projections=directions))

    # Two disjoint pairs (A_1, R_1), (A_2, R_2) of samples of shape (n, k); the null level is d(R_1, R_2).
    matched = list(zip(samples.posterior, samples.reference, strict=True))
    return Transport(
        np.mean([_marginal(x, y) for x, y in matched], axis=0),
        _marginal(*samples.reference),
        float(np.mean([sliced(x, y) for x, y in matched])),
        sliced(*samples.reference),
        num_slices,
    )


def _marginal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([scipy.stats.wasserstein_distance(a, b) for a, b in zip(x.T, y.T, strict=True)])
