r"""Draws of scalar functions from one posterior, with Monte Carlo errors and effective sample sizes.

    n = S for S independent draws,    n = ESS / 2 for draws of chains

n is the number of draws that are treated as independent (`independent_size`). Chains are thinned to draws
about two integrated autocorrelation times apart. In an autoregression of order one with coefficient r, this
time is (1 + r) / (1 - r); the thinned neighbours have the correlation r^(2 (1 + r) / (1 - r)), at most
e^-4 = 0.02.

References: Geyer (1992), Practical Markov chain Monte Carlo; Vehtari et al. (2021), arXiv 1903.08008.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

from bnlora.metrics.monte_carlo import bulk_ess, chain_mcse, independent_mcse

Kind = Literal["chains", "independent"]
LEAST_DRAWS = 8
"""Smallest number of draws (per chain) for a standard error."""


@dataclass(frozen=True, eq=False, repr=False)
class Draws:
    """Draws of scalar functions.

    Args:
        names: Name of each function.
        values: Values, shape (chain, draw, function).
        kind: "chains" if the draws of a chain depend on each other; one chain is allowed. "independent" for
            independent draws, which have shape (1, draw, function).

    Raises:
        ValueError: If the shapes of names and values do not match, names repeat, a value is not finite, or
            there are fewer than 8 draws in a chain.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "chain draw k"]
    kind: Kind

    def __post_init__(self):
        values = np.asarray(self.values, np.float64)
        object.__setattr__(self, "values", values)
        if self.kind not in ("chains", "independent"):
            raise ValueError(f"kind must be 'chains' or 'independent'; got {self.kind!r}")
        if values.ndim != 3 or values.shape[2] != len(self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"expected values of shape (chain, draw, {len(self.names)}), one column for each of the "
                f"different names; got shape {values.shape} and names {self.names}"
            )
        if not self.names:
            raise ValueError("expected at least one function; got none")
        if values.shape[1] < LEAST_DRAWS or not len(values):
            raise ValueError(f"expected at least {LEAST_DRAWS} draws of each chain; got shape {values.shape}")
        if self.kind == "independent" and len(values) > 1:
            raise ValueError(f"independent draws must have one row, shape (1, draw, k); got {values.shape}")
        broken = [n for n, x in zip(self.names, values.T, strict=True) if not np.isfinite(x).all()]
        if broken:
            raise ValueError(f"expected finite values in every draw; not so: {', '.join(broken)}")

    def __repr__(self) -> str:
        return f"Draws({len(self.names)} functions, {self.describe})"

    @property
    def describe(self) -> str:
        """Number and kind of the draws, in words."""
        chains, draws, _ = self.values.shape
        if self.kind == "independent":
            return f"{draws} independent draws"
        plural = "chain" if chains == 1 else "chains"
        return f"{chains} {plural} of {draws} draws, least effective number {self.least_ess:.0f}"

    @property
    def pooled(self) -> Float[np.ndarray, "s k"]:
        """All draws, chain after chain."""
        return self.values.reshape(-1, len(self.names))

    @property
    def constant(self) -> tuple[str, ...]:
        """Names of the functions with the same value in every draw."""
        # Use the range: the standard deviation of equal numbers may differ from zero by rounding.
        return tuple(n for n, x in zip(self.names, np.ptp(self.pooled, axis=0), strict=True) if x == 0)

    def only(self, names: Sequence[str]) -> "Draws":
        """Some of the functions, in the order of the names."""
        order = [self.names.index(name) for name in names]
        return replace(self, names=tuple(names), values=self.values[:, :, order])

    @property
    def mean(self) -> Float[np.ndarray, " k"]:
        """Mean of each function."""
        return self.pooled.mean(0)

    @property
    def sd(self) -> Float[np.ndarray, " k"]:
        """Standard deviation of each function."""
        return self.pooled.std(0, ddof=1)

    @property
    def mcse_mean(self) -> Float[np.ndarray, " k"]:
        """Monte Carlo standard error of `mean`."""
        return self._errors[0]

    @property
    def mcse_sd(self) -> Float[np.ndarray, " k"]:
        """Monte Carlo standard error of `sd`."""
        return self._errors[1]

    @cached_property
    def ess(self) -> Float[np.ndarray, " k"]:
        """Effective number of draws for the bulk of each function."""
        if self.kind == "independent":
            return np.full(len(self.names), float(len(self.pooled)))
        return bulk_ess(self.values)

    @property
    def least_ess(self) -> float:
        """The smallest `ess` of the functions that vary; the number of draws if none varies."""
        finite = self.ess[np.isfinite(self.ess)]  # constant functions have no effective number
        return float(finite.min()) if len(finite) else float(len(self.pooled))

    @property
    def independent_size(self) -> int:
        """Number of evenly spaced draws that are treated as independent."""
        return len(self.pooled) if self.kind == "independent" else int(self.least_ess / 2)

    def halves(self) -> tuple["Draws", "Draws"]:
        """Equal halves: of the chains (with an odd number the last is left out), or of a single chain."""
        chains, draws, _ = self.values.shape
        half = chains // 2 if chains > 1 else draws // 2
        first, second = (
            self.values[part] if chains > 1 else self.values[:, part]
            for part in (slice(half), slice(half, 2 * half))
        )
        return replace(self, values=first), replace(self, values=second)

    def thinned(self, size: int) -> Float[np.ndarray, "size k"]:
        """`size` evenly spaced draws of the pooled ones."""
        return self.pooled[evenly(len(self.pooled), size)]

    @cached_property
    def _errors(self) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "independent":
            return independent_mcse(self.pooled)
        return chain_mcse(self.values)


def evenly(count: int, size: int) -> np.ndarray:
    """Indices of `size` out of `count` items: the centres of `size` equal parts.

    Raises:
        ValueError: If `size` is not between 1 and `count`.
    """
    if not 0 < size <= count:
        raise ValueError(f"expected to keep between 1 and {count} draws; got {size}")
    return ((np.arange(size) + 0.5) * count / size).astype(int)
