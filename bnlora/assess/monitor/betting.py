r"""Evidence against a null hypothesis that may be read after every row: the capital of bets.

A bet k pays L_t^k > 0 at row t, with E[L_t^k | past] <= 1 under the null. Capital that starts at row j is the
product of the payments from row j on. The evidence is the mixture over bets and start times,

    E_t = sum_{j <= t} w_j 1/K sum_k prod_{s=j}^t L_s^k + sum_{j > t} w_j,
    sum_{j > t} w_j = 1 / (1 + log(1 + t)).

Under the null it is a nonnegative supermartingale that starts at 1. Ville's inequality gives

    P(E_t >= 1/alpha for any t) <= alpha,

however often it is read, and for a stream without an end. The mixture over start times finds a late change:
after a change at row T the evidence needs about log(1/alpha) + log(T) + 2 log(log(T)) nats, and not the
capital that bets lost before T. One number per bet is kept, because

    R_t^k = (R_{t-1}^k + w_t) L_t^k    for R_t^k = sum_{j <= t} w_j prod_{s=j}^t L_s^k.

References: Ville (1939); Shafer (2021), Testing by betting, JRSS A 184; Shin, Ramdas and Rinaldo (2024),
E-detectors, arXiv 2203.03532. The weights over start times keep the false alarms of the whole stream at alpha
(an e-detector without weights controls the mean time to a false alarm).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

FRACTIONS = 0.5 ** np.arange(1, 7)
"""Stakes of the bets on a mean, as shares of the largest stake that cannot lose everything."""


@dataclass(frozen=True)
class Evidence:
    """Evidence against one null hypothesis: an e-process.

    Attributes:
        log_capital: Log of R_t, one number for each bet; minus infinity before the first row.
        num_rows: Number of rows t.
        log_value: Log of the evidence now.
        log_peak: Log of the largest evidence so far.

    Example:
        >>> evidence = Evidence.start(1)
        >>> evidence, path = evidence.update(np.log([[2.0], [2.0], [0.5]]))
        >>> np.exp(path).round(2), round(evidence.peak, 2)
        (array([1.41, 2.34, 1.38]), 2.34)
    """

    log_capital: Float[np.ndarray, " k"]
    num_rows: int = 0
    log_value: float = 0.0
    log_peak: float = 0.0

    @classmethod
    def start(cls, num_bets: int) -> "Evidence":
        """Evidence before the first row: 1."""
        return cls(np.full(num_bets, -np.inf))

    @property
    def peak(self) -> float:
        """The largest evidence so far; at most the largest float."""
        return float(np.exp(min(self.log_peak, 709.0)))

    def update(self, log_bets: Float[np.ndarray, "n k"]) -> tuple["Evidence", Float[np.ndarray, " n"]]:
        """The evidence after more rows, and its logarithm after each of them.

        Args:
            log_bets: Log of the payment of each bet at each row; finite.
        """
        if not len(log_bets):
            return self, np.zeros(0)
        capital, path = log_mixture(log_bets, self.log_capital, self.num_rows)
        peak = max(self.log_peak, float(path.max()))
        return Evidence(capital, self.num_rows + len(path), float(path[-1]), peak), path


def log_mixture(
    log_bets: Float[np.ndarray, "*s n k"], log_capital: Float[np.ndarray, "*s k"], num_rows: int
) -> tuple[Float[np.ndarray, "*s k"], Float[np.ndarray, "*s n"]]:
    """Log-capital of each bet after n more rows, and the log-evidence after each row.

    Args:
        log_bets: Log of the payments; leading axes are independent streams.
        log_capital: Log of R before these rows.
        num_rows: Number of rows before these.
    """
    total = np.cumsum(log_bets, axis=-2)
    before = total - log_bets
    rows = np.arange(num_rows, num_rows + log_bets.shape[-2] + 1)
    log_weights = np.log(-np.diff(_unstarted(rows)))[:, None]
    # R_t = exp(total_t) (R_0 + sum_j w_j / exp(before_j))
    terms = np.concatenate([log_capital[..., None, :], log_weights - before], axis=-2)
    capital = total + np.logaddexp.accumulate(terms, axis=-2)[..., 1:, :]
    mean = np.logaddexp.reduce(capital, axis=-1) - np.log(log_bets.shape[-1])
    return capital[..., -1, :], np.logaddexp(mean, np.log(_unstarted(rows[1:])))


def log_bets_below(
    values: Float[np.ndarray, "*s n"], floor: float, ceiling: float = 1.0
) -> Float[np.ndarray, "*s n k"]:
    """Log-payments of bets against "the mean given the past is never below `floor`".

    A bet pays 1 + stake (floor - value). Waudby-Smith and Ramdas (2024), arXiv 2010.09686, section 4.

    Args:
        values: Values in [0, `ceiling`].
        floor: The mean under the null, in (0, `ceiling`).
        ceiling: The largest possible value.
    """
    return np.log1p(FRACTIONS / (ceiling - floor) * (floor - values[..., None]))


def _unstarted(rows: np.ndarray) -> np.ndarray:
    """Weight of the start times after each number of rows."""
    return 1 / (1 + np.log1p(rows))
