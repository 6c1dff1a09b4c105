r"""How much of the prior is left in the posterior, function by function?

    overlap(f) = integral min(q(f), p(f)) df = 1 - total variation

of posterior and prior of a scalar function that the data can identify: margins of the logits at probe rows,
the norm of each family's update. One where the data said nothing about it, near zero where they moved or
narrowed it beyond the prior. Beside it stands where the posterior median lies in the prior, P_p(f <=
median_q f): near 0 or 1 the posterior fights the prior, whatever the overlap.

Overlap does not change under increasing maps of f. Both samples are therefore mapped by the normal scores
of their pooled ranks, which no heavy tail upsets, and smoothed there with Gaussian kernels of Scott's
width, by which the estimate of small overlaps is a little high. Its standard error is that of a jackknife
over ten groups of draws.

References: Inman and Bradley (1989), The overlapping coefficient as a measure of agreement between
probability distributions; Garrett and Zeger (2000), Latent class model diagnosis, for overlaps of prior and
posterior.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import rankdata

from bnlora._util.display import Shown, Table
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.prediction.functions import PROBES, identifiable, stacked

GROUPS = 10
GRID = np.linspace(-4.5, 4.5, 181)


@dataclass(frozen=True, repr=False)
class Overlap(Shown):
    """Overlap of prior and posterior of identifiable functions.

    Attributes:
        names: Name of each function.
        posterior: Draws, shape (draw, function).
        prior: Draws, shape (draw, function).
        value: Overlap of each function, between 0 and 1.
        error: Standard error of each.
        position: Probability under the prior of at most the posterior median.
    """

    names: tuple[str, ...]
    posterior: Float[np.ndarray, "s k"]
    prior: Float[np.ndarray, "s k"]
    value: Float[np.ndarray, " k"]
    error: Float[np.ndarray, " k"]
    position: Float[np.ndarray, " k"]

    @property
    def table(self) -> Any:
        """One row for each function, a pandas DataFrame."""
        import pandas

        columns = {"overlap": self.value, "error": self.error, "position": self.position}
        columns |= {"posterior_mean": self.posterior.mean(0), "posterior_sd": self.posterior.std(0, ddof=1)}
        columns |= {"prior_mean": self.prior.mean(0), "prior_sd": self.prior.std(0, ddof=1)}
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="function"))

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (name, f"{self.value[k]:.2f} ± {self.error[k]:.2f}", f"{self.position[k]:.3f}")
            + tuple(f"{x[:, k].mean():.3g} ± {x[:, k].std(ddof=1):.3g}" for x in (self.posterior, self.prior))
            for k, name in enumerate(self.names)
        )
        header = ("function", "overlap", "position", "posterior, mean ± sd", "prior")
        return (Table("Overlap of prior and posterior", header, rows),)


def overlap(fit: Fit | Sample, data: Batch) -> Overlap:
    """Overlap of prior and posterior of margins at probe rows and of the norms of the updates.

    Args:
        fit: A fit, or a `Sample` of it.
        data: Rows whose margins are looked at, the first eight of them; labels are not read.

    Raises:
        ValueError: When the prior has no latent sites.
    """
    drawn = sample_of(fit)
    drawn.require_prior("an overlap")
    names, posterior = probe_values(drawn, drawn.drawn[1], data)
    _, prior = probe_values(drawn, drawn.prior_adapters, data)
    found = [overlap_of_draws(posterior[:, k], prior[:, k]) for k in range(len(names))]
    value, error = (np.array(x) for x in zip(*found, strict=True))
    position = (prior <= np.median(posterior, axis=0)).mean(0)
    return Overlap(names, posterior, prior, value, error, position)


def probe_values(drawn: Sample, adapters: Any, data: Batch) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and values of margins and norms at adapters with a leading draw axis."""
    return stacked(identifiable(drawn.fit.model, data[:PROBES]).by_draw(adapters, None))


def overlap_of_draws(first: Float[np.ndarray, " s"], second: Float[np.ndarray, " t"]) -> tuple[float, float]:
    """Overlap of two laws from draws of each, and its standard error."""
    value = _overlap(first, second)
    parts = [np.arange(len(x)) % GROUPS for x in (first, second)]
    without = [_overlap(first[parts[0] != g], second[parts[1] != g]) for g in range(GROUPS)]
    return value, float(np.sqrt((GROUPS - 1) * np.var(without)))


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    ranks = rankdata(np.concatenate([first, second]))
    scores = ndtri((ranks - 0.5) / len(ranks))
    one, two = (_smooth(x) for x in (scores[: len(first)], scores[len(first) :]))
    return float(min(np.minimum(one, two).sum(), 1.0))


def _smooth(scores: np.ndarray) -> np.ndarray:
    """Gaussian kernel density on the grid, normalised to sum to one."""
    width = max(scores.std(ddof=1), 1e-6) * len(scores) ** -0.2
    width = max(width, GRID[1] - GRID[0])
    density = np.exp(-0.5 * ((GRID[:, None] - scores) / width) ** 2).sum(1)
    return density / density.sum()
