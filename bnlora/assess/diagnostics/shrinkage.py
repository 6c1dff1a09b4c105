r"""Where is the posterior narrower than the prior? A map over modules and layers.

    ratio = sd_q(dW) / sd_p(dW),    sd(dW)^2 = mean over the entries ij of Var(dW_ij)

for the update dW = alpha / rank * B A of each layer. The ratio is one without information in the data, and
near zero if the data determine the update. The variance is computed from draws,

    sum_ij Var(dW_ij) = (sum_s |dW_s|^2 - S |mean_s dW_s|^2) / (S - 1),

and its standard error from the S squared distances to the mean. The table also has the factors A and B. They
are not identifiable: a guide that breaks the symmetry narrows them without data, so use the rows of the
update. Each row has the KL divergence of the sites of its factor and layer (`divergence`); that of the update
is the sum over both factors.

Reference for shrinkage as the remaining share of the prior's spread: Betancourt (2018), Calibrating
model-based inferences and decisions, arXiv 1803.08393.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from bnlora._util.display import Shown, Table
from bnlora._util.typing import FACTORS
from bnlora.adapters.sites import Site
from bnlora.assess.diagnostics.divergence import SiteDivergence, divergence
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.infer.svi.result import Fit

UPDATE = "update"


@dataclass(frozen=True)
class Cell:
    """One row of the map.

    Attributes:
        family: Name of the family.
        module: Name of the adapted module.
        layer: Index of the layer; the number of layers for the head.
        factor: "a", "b" or "update".
        posterior_sd: Root mean square over entries of the posterior standard deviation.
        prior_sd: The same under the prior.
        ratio: `posterior_sd / prior_sd`; NaN if the prior has no spread.
        ratio_error: Monte Carlo standard error of the ratio.
        kl: KL divergence of posterior from prior in nats; NaN if it does not split by layer and factor.
        kl_error: Monte Carlo standard error of `kl`.
    """

    family: str
    module: str
    layer: int
    factor: str
    posterior_sd: float
    prior_sd: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float


@dataclass(frozen=True, repr=False)
class Shrinkage(Shown):
    """Posterior spread relative to the prior's, by module and layer.

    Attributes:
        cells: One cell for each family, layer and factor, and for each update.
        divergences: KL divergence of every site, including hyper-parameters.
    """

    cells: tuple[Cell, ...]
    divergences: tuple[SiteDivergence, ...]

    @cached_property
    def table(self) -> Any:
        """The cells as a pandas DataFrame, one column for each attribute of `Cell`."""
        import pandas

        return pandas.DataFrame([vars(cell) for cell in self.cells])

    def grid(self, value: str = "ratio", *, factor: str = UPDATE) -> Any:
        """One value as a pandas DataFrame, families by layers, for a heat map; NaN without an adapter."""
        chosen = self.table[self.table["factor"] == factor]
        return chosen.pivot(index="family", columns="layer", values=value).reindex(
            dict.fromkeys(chosen["family"])
        )

    @property
    def total_kl(self) -> float:
        """KL divergence of all sites in nats, except points."""
        return float(np.nansum([one.total for one in self.divergences]))

    @property
    def total_words(self) -> str:
        """`total_kl` in words, with the number of sites that are left out."""
        points = sum(len(one.sites) for one in self.divergences if np.isnan(one.total))
        every = sum(len(one.sites) for one in self.divergences)
        if points == every:
            return "no KL, because every site is a point"
        without = f" without {points} of {every} sites, which are points" if points else ""
        return f"KL {self.total_kl:.1f} nats{without}"

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (
                f"{c.family} {c.layer}",
                f"{c.posterior_sd:.3g}",
                f"{c.prior_sd:.3g}",
                f"{c.ratio:.2f} ± {c.ratio_error:.2f}",
                "-" if np.isnan(c.kl) else f"{c.kl:.1f} ± {c.kl_error:.1f}" if c.kl_error else f"{c.kl:.1f}",
            )
            for c in self.cells
            if c.factor == UPDATE
        )
        title = f"Posterior spread of the update relative to the prior's; {self.total_words}"
        return (Table(title, ("update", "posterior sd", "prior sd", "ratio", "KL, nats"), rows),)


def shrinkage(fit: Fit | Sample) -> Shrinkage:
    """Spread of the posterior relative to the prior, by module and layer.

    Args:
        fit: A fit, or a `Sample` of it.

    Raises:
        ValueError: If the prior has no latent sites or cannot be drawn from.
    """
    sample = sample_of(fit)
    sample.require_prior("shrinkage")
    _, adapters = sample.drawn
    parts = divergence(sample)
    cells = []
    for name, site in sample.fit.model.sites.items():
        both = (jax.tree.map(np.asarray, x[name]) for x in (adapters, sample.prior_adapters))
        posterior, prior = both
        for index in range(site.depth):
            for factor in (*FACTORS, UPDATE):
                spreads = [spread(x, index, factor, site.scale) for x in (posterior, prior)]
                cells.append(_cell(site, index, factor, spreads, parts))
    return Shrinkage(tuple(cells), parts)


def spread(pair: Any, index: int, factor: str, scale: float) -> tuple[float, float]:
    """Root mean square over entries of the standard deviation over draws, and its relative standard error.

    Args:
        pair: Stacked factors of a family with a leading draw axis.
        index: Index on the layer axis.
        factor: "a", "b" or "update".
        scale: The factor `alpha / rank` of the update.
    """
    if factor == UPDATE:
        squares, entries = _update_distances(pair["a"][:, index], pair["b"][:, index], scale)
    else:
        values = np.asarray(pair[factor][:, index], np.float64)
        squares, entries = ((values - values.mean(0)) ** 2).sum((1, 2)), values[0].size
    draws = len(squares)
    if not squares.any():
        return 0.0, 0.0
    variance = squares.sum() / (draws - 1)
    # Relative error of a standard deviation: half that of the variance (delta method).
    error = squares.std(ddof=1) * draws**0.5 / (draws - 1)
    return float(np.sqrt(variance / entries)), float(0.5 * error / variance)


def _update_distances(
    a: Float[np.ndarray, "s r i"], b: Float[np.ndarray, "s o r"], scale: float
) -> tuple[Float[np.ndarray, " s"], int]:
    """Squared distance of every draw of `scale b a` from the mean update, and number of its entries.

    Only the mean has the shape (o, i) of an update; |b a|^2 and the cross term need matrices of the rank.
    """
    a, b = np.asarray(a, np.float64), scale * np.asarray(b, np.float64)
    # Sum over draws and ranks in one product: (o, s r) @ (s r, i).
    mean = np.moveaxis(b, 0, 1).reshape(b.shape[1], -1) @ a.reshape(-1, a.shape[2]) / len(a)
    # |b a|^2 = trace((a a^T) (b^T b)).
    squares = ((a @ np.swapaxes(a, 1, 2)) * (np.swapaxes(b, 1, 2) @ b)).sum((1, 2))
    cross = ((np.swapaxes(b, 1, 2) @ mean) * a).sum((1, 2))
    # Rounding can make a squared distance slightly negative.
    return np.maximum(squares - 2 * cross + (mean**2).sum(), 0.0), mean.size


def _cell(
    site: Site,
    index: int,
    factor: str,
    spreads: list[tuple[float, float]],
    parts: tuple[SiteDivergence, ...],
) -> Cell:
    (posterior, posterior_error), (prior, prior_error) = spreads
    ratio = posterior / prior if prior > 0 else np.nan
    wanted = [p for p in parts if p.family == site.name and factor in (UPDATE, p.factor)]
    tied = [p for p in parts if not p.family and any(n.split(".")[0] == site.name for n in p.sites)]
    split = wanted and not tied and all(p.by_layer is not None for p in wanted)
    kl = sum(p.by_layer[index] for p in wanted) if split else np.nan  # type: ignore[index]
    errors = [p.by_layer_error[index] for p in wanted] if split else [np.nan]  # type: ignore[index]
    return Cell(
        family=site.name,
        module=site.module,
        layer=site.layers[index],
        factor=factor,
        posterior_sd=posterior,
        prior_sd=prior,
        ratio=ratio,
        ratio_error=ratio * float(np.hypot(posterior_error, prior_error)),
        kl=float(kl),
        kl_error=float(np.linalg.norm(errors)),
    )


SPREAD = Diagnostic(
    name="spread",
    measurement="shrinkage",
    measure=lambda exam: shrinkage(exam.drawn),
    judge=lambda *_: None,  # used by "learned"
    needs=("prior", "draws of the prior"),
)
