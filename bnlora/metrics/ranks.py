r"""Tests of the uniformity of calibration ranks: exact p-values, and Holm's correction for several tests.

A rank is the number R in {0, ..., L} of draws, out of L, below the true value, with ties broken at random.
(The rank of an adapter is another quantity.) For exact inference R is uniform (Talts et al. 2018). With N
ranks, and c_j the number of ranks below j:

* `uniformity`: each c_j is Binomial(N, z_j), z_j = j / (L + 1). The statistic is the smallest one-sided
  tail probability over j. Its null distribution is that of a random walk that must stay between two walls,
  computed from Poisson counts between the grid points, conditional on their sum. `band` inverts the
  computation: it finds walls that are touched anywhere with a given probability.
* `symmetry`: the Kolmogorov-Smirnov distance between p = R / L and 1 - p (Yao et al. 2018). Under symmetry,
  given |p - 1/2|, the signs of p - 1/2 are fair coins. The distance is max_k |S_k| / N of their random walk
  in order of decreasing |p - 1/2|. (The two-sample test treats p and 1 - p as independent samples and
  rejects about twice as often as its nominal level.)
* `dispersion`: the mean of (2 R - L)^2 relative to that of uniform ranks, as a normal score.

References: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788; Yao, Vehtari, Simpson
and Gelman (2018), arXiv 1802.02538; Saeilynoja, Buerkner and Vehtari (2022), arXiv 2103.10522 (simultaneous
bands); Butler (1969), A test for symmetry using the sample distribution function; Holm (1979).
"""

from dataclasses import dataclass

import jax
import numpy as np
import scipy  # its submodules are imported at first use
from jax import Array
from jaxtyping import Bool, Float, Int

from bnlora._util.checks import check_key

GRID = 100
"""Largest number of points at which the distribution function of the ranks is tested."""


def rank(key: Array, draws: Float[Array, "s k"], truth: Float[Array, " k"]) -> Int[Array, " k"]:
    """Number of draws below the true value, with ties broken at random.

    Args:
        key: Random key for the ties.
        draws: Values under each draw.
        truth: True values.

    Returns:
        Ranks in {0, ..., s}.
    """
    key = check_key(key)
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + jax.random.randint(key, truth.shape, 0, equal + 1)


@dataclass(frozen=True)
class Band:
    """Simultaneous bounds on the empirical distribution function of uniform ranks.

    Attributes:
        z: Points of the bounds, in (0, 1); shape (point,).
        low: Lower bound of the distribution function, shape (point,).
        high: Upper bound, shape (point,).
    """

    z: Float[np.ndarray, " j"]
    low: Float[np.ndarray, " j"]
    high: Float[np.ndarray, " j"]


def uniformity(ranks: Int[np.ndarray, " m"], num_draws: int) -> float:
    """Exact p-value of the hypothesis that ranks are uniform on {0, ..., num_draws}.

    Args:
        ranks: Ranks of independent simulations.
        num_draws: Number of draws L for each rank.

    Raises:
        ValueError: If there are no ranks or one is outside {0, ..., L}.
    """
    _check(ranks, num_draws)
    points = _points(num_draws)
    counts = (ranks[:, None] < points).sum(0)
    tails = _tails(len(ranks), num_draws, points)
    least = tails[np.arange(len(points)), counts].min()
    # Lower and upper tails that are equal can differ by rounding; the factor makes them count as equal.
    inside = tails > least * (1 + 1e-9)
    p_value = 1 - _stays(inside, len(ranks), num_draws, points)
    return float(np.clip(p_value, least, 1.0))  # the probability of the smallest tail is a lower bound


def band(num_ranks: int, num_draws: int, *, level: float = 0.95) -> Band:
    """Bounds that `num_ranks` uniform ranks satisfy at all points with probability at least `level`."""
    points = _points(num_draws)
    tails = _tails(num_ranks, num_draws, points)
    low, high = np.log((1 - level) / (4 * len(points))), np.log(1 - level)
    for _ in range(40):  # bisection on the log of the one-sided tail
        middle = 0.5 * (low + high)
        if _stays(tails > np.exp(middle), num_ranks, num_draws, points) >= level:
            low = middle
        else:
            high = middle
    inside = tails > np.exp(low)
    least, greatest = inside.argmax(1), num_ranks - inside[:, ::-1].argmax(1)
    return Band(points / (num_draws + 1), least / num_ranks, greatest / num_ranks)


def symmetry(ranks: Int[np.ndarray, " m"], num_draws: int) -> tuple[float, float]:
    """Distance between p and 1 - p, and its exact p-value conditional on every |p - 1/2|.

    Args:
        ranks: Ranks of independent simulations.
        num_draws: Number of draws L for each rank; p = rank / L.

    Returns:
        The Kolmogorov-Smirnov distance and the p-value for symmetry about one half.
    """
    _check(ranks, num_draws)
    signed = 2 * np.asarray(ranks, np.int64) - num_draws
    sizes = np.unique(np.abs(signed[signed != 0]))[::-1]
    signs = [np.sign(signed[np.abs(signed) == size]) for size in sizes]
    greatest = max(np.abs(np.cumsum([s.sum() for s in signs])), default=0)
    return float(greatest / len(ranks)), _walk_reaches([len(s) for s in signs], int(greatest))


def dispersion(ranks: Int[np.ndarray, " m"], num_draws: int) -> tuple[float, float]:
    """Second moment of the ranks about L / 2 relative to uniform ranks, and its normal score.

    A ratio above one means that the true value is too often in the tails of the draws. If the draws are
    unbiased, they are then too narrow; below one they are too wide. Bias also raises the ratio, so for biased
    draws it does not measure the width.
    """
    _check(ranks, num_draws)
    squares = (2.0 * np.arange(num_draws + 1) - num_draws) ** 2
    mean = ((2.0 * np.asarray(ranks) - num_draws) ** 2).mean()
    return float(mean / squares.mean()), float((mean - squares.mean()) / squares.std() * len(ranks) ** 0.5)


def holm(p_values: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """P-values adjusted for multiple tests by Holm's step-down rule, valid under any dependence."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _check(ranks: np.ndarray, num_draws: int) -> None:
    if len(ranks) < 1 or np.min(ranks) < 0 or np.max(ranks) > num_draws:
        got = f"{np.min(ranks)} to {np.max(ranks)}" if len(ranks) else "none"
        raise ValueError(f"expected ranks from 0 to num_draws={num_draws}; got {got}")


def _points(num_draws: int) -> np.ndarray:
    """The tested points j, for the number of ranks below j: all of 1, ..., L, or `GRID` of them."""
    return np.unique(np.linspace(1, num_draws, min(num_draws, GRID)).round().astype(int))


def _tails(num_ranks: int, num_draws: int, points: np.ndarray) -> Float[np.ndarray, "j count"]:
    """The smaller one-sided tail of every possible count below every point."""
    counts, z = np.arange(num_ranks + 1), points[:, None] / (num_draws + 1)
    below = scipy.stats.binom(num_ranks, z)
    return np.minimum(below.cdf(counts), below.sf(counts - 1))


def _stays(inside: Bool[np.ndarray, "j count"], num_ranks: int, num_draws: int, points: np.ndarray) -> float:
    """Probability that the counts of uniform ranks are `inside` at every point.

    Given their sum, independent Poisson counts between the points are multinomial, so the walk of Poisson
    counts, conditional on its end N, has the law of the counts below each point.
    """
    widths = np.diff(points, prepend=0, append=num_draws + 1) * num_ranks / (num_draws + 1)
    counts = np.arange(num_ranks + 1)
    chance = np.zeros(num_ranks + 1)
    chance[0] = 1.0
    for width, allowed in zip(widths[:-1], inside, strict=True):
        chance = np.convolve(chance, scipy.stats.poisson.pmf(counts, width))[: num_ranks + 1] * allowed
    whole = chance @ scipy.stats.poisson.pmf(num_ranks - counts, widths[-1])
    return float(whole / scipy.stats.poisson.pmf(num_ranks, num_ranks))


def _walk_reaches(groups: list[int], distance: int) -> float:
    """Probability that a fair walk, seen after each group of steps, ever is `distance` or more from zero."""
    if distance == 0:
        return 1.0
    total = sum(groups)
    position = np.arange(-total, total + 1)
    chance = (position == 0).astype(float)
    for steps in groups:
        kernel = np.zeros(2 * steps + 1)
        kernel[::2] = scipy.stats.binom.pmf(np.arange(steps + 1), steps, 0.5)
        chance = np.convolve(chance, kernel, mode="same") * (np.abs(position) < distance)
    return float(np.clip(1 - chance.sum(), 0.0, 1.0))
