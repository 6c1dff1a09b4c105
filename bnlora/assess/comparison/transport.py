r"""How far mass must move from one posterior to the other.

    W_1(a, r)   = int |F_a(x) - F_r(x)| dx                        of each function by itself
    SW_2(a, r)^2 = mean over directions t of W_2(t . a, t . r)^2    of all functions together

in standard deviations of the reference, directions uniform on the sphere. Unit shifts of a function give
W_1 = 1; a shift m of all functions gives SW_2 = |m| / sqrt(k) in k dimensions. Values and null levels come
from samples of equal size (`bnlora.assess.comparison.pairs`). Computed by scipy and POT.

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
    """Distances of transport with their null levels.

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
        random: Source of the directions, the same for value and null level.
        samples: Halves of both sides.
        num_slices: Number of directions.

    Raises:
        ValueError: When there is no direction.
    """
    import ot

    if num_slices < 1:
        raise ValueError(f"num_slices must be at least 1; got {num_slices}")
    seed = int(random.integers(2**31))
    directions = ot.sliced.get_random_projections(samples.posterior.shape[2], num_slices, seed)

    def sliced(x: np.ndarray, y: np.ndarray) -> float:
        return float(ot.sliced_wasserstein_distance(x, y, projections=directions))

    both = list(zip(samples.posterior, samples.reference, strict=True))
    return Transport(
        np.mean([_marginal(x, y) for x, y in both], axis=0),
        _marginal(*samples.reference),
        float(np.mean([sliced(x, y) for x, y in both])),
        sliced(*samples.reference),
        num_slices,
    )


def _marginal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([scipy.stats.wasserstein_distance(a, b) for a, b in zip(x.T, y.T, strict=True)])
