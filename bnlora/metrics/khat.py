r"""Pareto k-hat: could draws of the approximation be reweighted into draws of the posterior?

    w_s = p(theta_s, y) / q(theta_s),    theta_s ~ q

A generalised Pareto law is fitted to the largest weights; its shape k says how many moments the weights have.
Below min(1 - 1 / log10 S, 0.7) importance sampling with smoothed weights works with S draws, and q covers
where p has its mass. Above, q is far from p in the coordinates of the sites, which may be harmless in low
dimensional functions of them: in high dimension k is nearly always large. It needs both densities and no
reference; q that misses a whole mode of p goes unseen.

References: Yao, Vehtari, Simpson and Gelman (2018), arXiv 1802.02538; Vehtari, Simpson, Gelman, Yao and Gabry
(2024), arXiv 1507.02646, for the threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora.metrics.monte_carlo import pareto_k

LEAST_DRAWS = 25
"""Fewest draws that leave five in the tail that is fitted, a fifth of them."""


@dataclass(frozen=True)
class KHat:
    """Shape of the tail of the importance weights.

    Attributes:
        value: k-hat.
        num_draws: Number of weights S.
    """

    value: float
    num_draws: int

    @property
    def threshold(self) -> float:
        """The largest k-hat at which S draws are enough."""
        return float(min(1 - 1 / np.log10(self.num_draws), 0.7))

    @property
    def passed(self) -> bool:
        """Whether k-hat is at most the threshold."""
        return self.value <= self.threshold


def khat(log_p: Float[np.ndarray, " s"], log_q: Float[np.ndarray, " s"]) -> KHat:
    """k-hat of draws from q.

    Args:
        log_p: Log of the joint density p(theta, y) at each draw, up to a constant.
        log_q: Log-density of each draw under q.

    Returns:
        The k-hat of the weights, and of how many draws.

    Raises:
        ValueError: When there are fewer than 25 draws, or a density is not a number.
    """
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    if log_p.shape != log_q.shape or log_p.ndim != 1 or len(log_p) < LEAST_DRAWS:
        raise ValueError(
            f"expected one log_p and log_q for each of at least {LEAST_DRAWS} draws; got shapes "
            f"{log_p.shape} and {log_q.shape}"
        )
    if not (np.isfinite(log_p).all() and np.isfinite(log_q).all()):
        raise ValueError("expected finite log-densities at every draw; got others")
    return KHat(pareto_k(log_p - log_q), len(log_p))


def has_density(guide: Any, sites: Mapping[str, Any]) -> bool:
    """Whether a guide has a density over the sites, whose draws are given with a leading draw axis.

    Not so for guides whose `has_density` is false, nor where a number is the same in every draw.
    """
    return bool(sites) and getattr(guide, "has_density", True) and not any(map(_has_point, sites.values()))


def _has_point(values: Any) -> bool:
    drawn = np.asarray(values)
    return bool((drawn == drawn[:1]).all(0).any())
