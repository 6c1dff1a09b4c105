r"""Pareto k-hat: whether importance weights can turn draws of an approximation into draws of the posterior.

    w_s = p(theta_s, y) / q(theta_s),    theta_s ~ q

A generalised Pareto law is fitted to the largest weights; its shape k determines how many moments the weights
have. Below min(1 - 1 / log10 S, 0.7), importance sampling with smoothed weights works with S draws, and q
covers the regions where p has its mass. Above, q is far from p in the coordinates of the sites. In high
dimension k is nearly always large, and low-dimensional functions of the sites can still be accurate. k-hat
needs both densities but no reference draws. It does not detect a mode of p that q misses completely.

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
"""Smallest number of draws: the fitted tail is a fifth of them and needs five."""


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
    """Pareto k-hat of draws from q.

    Args:
        log_p: Log of the joint density p(theta, y) at each draw, up to a constant.
        log_q: Log-density of each draw under q.

    Returns:
        The k-hat of the weights and the number of draws.

    Raises:
        ValueError: If there are fewer than 25 draws, or a log-density is not finite.
    """
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    if log_p.shape != log_q.shape or log_p.ndim != 1 or len(log_p) < LEAST_DRAWS:
        raise ValueError(
            f"expected one log_p and log_q for each of at least {LEAST_DRAWS} draws; got shapes "
            f"{log_p.shape} and {log_q.shape}"
        )
    if not (np.isfinite(log_p).all() and np.isfinite(log_q).all()):
        raise ValueError("log_p and log_q must be finite at every draw; got NaN or infinite values")
    return KHat(pareto_k(log_p - log_q), len(log_p))


def has_density(guide: Any, sites: Mapping[str, Any]) -> bool:
    """Whether a guide has a density over its sites.

    It has none if its `has_density` is false, or if a number is the same in every draw.

    Args:
        guide: The guide.
        sites: Draws of the sites, with a leading draw axis.
    """
    return bool(sites) and getattr(guide, "has_density", True) and not any(map(_has_point, sites.values()))


def _has_point(values: Any) -> bool:
    draws = np.asarray(values)
    return bool((draws == draws[:1]).all(0).any())
