r"""Have the scores of unlabelled rows changed? A conformal test martingale against reference rows.

The null is exchangeability: the reference rows and all new rows come in random order, as if from one
distribution. Each new score s_t gets a rank among the reference scores and the new scores before it,

    p_t = (number of larger ones + u_t (1 + number of equal ones)) / (1 + number of all),    u_t uniform,

where u_t breaks ties at random. Under the null, p_1, p_2, ... are independent and uniform on (0, 1), exactly
and for any number of reference rows (Vovk, Nouretdinov and Gammerman 2003). Bets on p_t with densities f(p),
mixed over all start times (`betting`), are a test martingale: P(any alarm) <= alpha, however often one looks.

| density            | finds                                      |
|--------------------|--------------------------------------------|
| 1 + 2 e (p - 1/2)  | larger scores (e < 0), smaller (e > 0)     |
| 1/2 p^(-1/2)       | some much larger scores; 1 - p: smaller    |
| 1 + e (12 (p - 1/2)^2 - 1) | a wider (e > 0) or narrower spread |

Only counts are kept, so memory does not grow. The score is first replaced by its bin. A third of the
reference rows, chosen at random, sets the bin edges (a value on an edge has a bin of its own, so that ties
stay ties); the other rows are the reference. New rows join the counts: a change must be found before they
outnumber the reference and the rows before the change.

Rows that depend on each other, such as bursts of one topic, are not exchangeable and raise the alarm too.

References: Vovk, Nouretdinov and Gammerman (2003), Testing exchangeability on-line, ICML; Vovk et al. (2021),
Retrain or not retrain: conformal test martingales for change-point detection, arXiv 2102.10439.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

EDGES = 64
"""Largest number of bin edges."""

LEAST_REFERENCE = 30
"""Smallest number of reference rows."""

_SLOPES = np.array([-0.95, -0.6, -0.3, 0.3, 0.6, 0.95])
_SPREADS = np.array([-0.4, 0.4, 0.8])
_TOGETHER = 512  # rows that are compared with each other at a time

NUM_BETS = len(_SLOPES) + len(_SPREADS) + 2
"""Number of densities."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of new scores among reference scores and earlier new scores.

    Attributes:
        edges: Edges of the bins, increasing.
        counts: Number of scores in each bin: below the first edge, on it, between it and the next, and so on.

    Example:
        >>> ranks = Ranks.start(np.random.default_rng(0), np.arange(90.0))
        >>> ranks, p = ranks.update(np.array([1000.0, -5.0]), np.array([0.5, 0.5]))
        >>> p.round(2), int(ranks.counts.sum())
        (array([0.02, 0.96]), 62)
    """

    edges: Float[np.ndarray, " e"]
    counts: Int[np.ndarray, " b"]

    @classmethod
    def start(cls, random: np.random.Generator, reference: Float[np.ndarray, " n"]) -> "Ranks":
        """Ranks among reference scores.

        Args:
            random: Chooses the reference rows that set the edges.
            reference: Scores of the reference rows.

        Raises:
            ValueError: If there are fewer than 30 reference rows, or a score is not finite.
        """
        reference = np.asarray(reference, np.float64)
        if len(reference) < LEAST_REFERENCE:
            raise ValueError(f"at least {LEAST_REFERENCE} reference rows are needed; got {len(reference)}")
        _check_finite(reference)
        mixed = random.permutation(reference)
        third = len(reference) // 3
        levels = np.linspace(0, 1, min(EDGES, third))
        edges = np.unique(np.quantile(mixed[:third], levels, method="inverted_cdf"))
        return cls(edges, np.bincount(_bins(edges, mixed[third:]), minlength=2 * len(edges) + 1))

    def update(
        self, scores: Float[np.ndarray, " n"], uniform: Float[np.ndarray, " n"]
    ) -> tuple["Ranks", Float[np.ndarray, " n"]]:
        """The ranks after new scores, and the p-value of each of them.

        Args:
            scores: Scores of the new rows, in order.
            uniform: Uniform numbers in (0, 1] that break ties.

        Raises:
            ValueError: If a score is not finite.
        """
        _check_finite(scores)
        bins, ranks, p_values = _bins(self.edges, scores), self.counts, [np.zeros(0)]
        for begin in range(0, len(bins), _TOGETHER):
            some = slice(begin, begin + _TOGETHER)
            p_values.append(_p_values(ranks, bins[some], uniform[some]))
            ranks = ranks + np.bincount(bins[some], minlength=len(ranks))
        return Ranks(self.edges, ranks), np.concatenate(p_values)


def log_bets_on_ranks(p_values: Float[np.ndarray, "*s n"]) -> Float[np.ndarray, "*s n k"]:
    """Log of each density of the table above at each p-value.

    Args:
        p_values: Numbers in (0, 1]; leading axes are independent streams.
    """
    p = np.clip(p_values[..., None], 1e-12, 1 - 1e-12)
    lines = np.log1p(2 * _SLOPES * (p - 0.5))
    spreads = np.log1p(_SPREADS * (12 * (p - 0.5) ** 2 - 1))
    powers = np.log(0.5) - 0.5 * np.log(np.concatenate([p, 1 - p], -1))
    return np.concatenate([lines, spreads, powers], -1)


def _bins(edges: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.searchsorted(edges, scores, "left") + np.searchsorted(edges, scores, "right")


def _p_values(counts: np.ndarray, bins: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Rank of each row among the counts and the rows before it."""
    above = np.append(np.cumsum(counts[::-1])[::-1], 0)
    earlier = np.tri(len(bins), k=-1, dtype=bool)
    larger = above[bins + 1] + (earlier & (bins[None, :] > bins[:, None])).sum(1)
    equal = counts[bins] + (earlier & (bins[None, :] == bins[:, None])).sum(1)
    total = counts.sum() + np.arange(len(bins))
    return (larger + uniform * (1 + equal)) / (1 + total)


def _check_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite; row {int(np.argmin(np.isfinite(scores)))} is not")
