r"""How many directions does the update of each layer use? Posterior singular values and effective rank.

The singular values and the effective rank are functions of each draw (`bnlora.assess.diagnostics.updates`).
The result has their posterior mean and 90 % interval, and the effective rank under the prior for comparison:
only a difference from the prior is evidence. Random matrices have well separated singular values, so the
effective rank of a prior draw is slightly below the rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.assess.diagnostics.updates import effective_rank, singular_values
from bnlora.infer.svi.result import Fit

INTERVAL = (0.05, 0.95)


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of the update of one layer.

    Attributes:
        family: Name of the family.
        module: Name of the adapted module.
        layer: Index of the layer; the number of layers for the head.
        values: Posterior draws of the singular values, largest first, shape (draw, rank).
        prior_values: The same under the prior; NaN if the prior cannot be drawn from.
    """

    family: str
    module: str
    layer: int
    values: Float[np.ndarray, "s r"]
    prior_values: Float[np.ndarray, "s r"]

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.values.shape[1]

    @cached_property
    def effective_rank(self) -> Float[np.ndarray, " s"]:
        """Effective rank of every posterior draw."""
        return effective_rank(self.values)

    @cached_property
    def prior_effective_rank(self) -> Float[np.ndarray, " s"]:
        """Effective rank of every prior draw."""
        return effective_rank(self.prior_values)


@dataclass(frozen=True, repr=False)
class Spectrum(Shown):
    """Singular values of the updates of a fit.

    Attributes:
        layers: One entry for each family and layer.
    """

    layers: tuple[LayerSpectrum, ...]

    @cached_property
    def table(self) -> Any:
        """A pandas DataFrame: effective rank (mean, 90 % interval, prior mean) and mean singular values."""
        import pandas

        return pandas.DataFrame([_row(one) for one in self.layers])

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (
                f"{one.family} {one.layer}",
                str(one.rank),
                "{effective_rank:.2f} ({low:.2f} to {high:.2f})".format(**_row(one)),
                f"{one.prior_effective_rank.mean():.2f}",
                ", ".join(f"{x:.3g}" for x in one.values.mean(0)[:4]) + (", ..." if one.rank > 4 else ""),
            )
            for one in self.layers
        )
        header = ("update", "rank", "effective rank, 90 %", "prior", "mean singular values")
        return (Table("Effective rank of the updates", header, rows),)


def spectrum(fit: Fit | Sample) -> Spectrum:
    """Posterior of the singular values and of the effective rank, by layer.

    Args:
        fit: A fit, or a `Sample` of it.
    """
    sample = sample_of(fit)
    layers = []
    for name, site in sample.fit.model.sites.items():
        posterior = abs(site.scale) * singular_values(**sample.drawn[1][name])
        if sample.prior_refusal:
            prior = np.full_like(posterior, np.nan)
        else:
            prior = abs(site.scale) * singular_values(**sample.prior_adapters[name])
        for index, layer in enumerate(site.layers):
            layers.append(LayerSpectrum(name, site.module, layer, posterior[:, index], prior[:, index]))
    return Spectrum(tuple(layers))


def _row(one: LayerSpectrum) -> dict[str, Any]:
    """One row of the table."""
    low, high = np.quantile(one.effective_rank, INTERVAL)
    row = {"family": one.family, "module": one.module, "layer": one.layer, "rank": one.rank}
    row |= {"effective_rank": float(one.effective_rank.mean()), "low": float(low), "high": float(high)}
    row |= {"prior_effective_rank": float(one.prior_effective_rank.mean())}
    return row | {f"singular_value_{i + 1}": float(x) for i, x in enumerate(one.values.mean(0))}


def ranks(measured: Spectrum) -> Finding:
    """Finding with the smallest and the largest share of the rank that is used; always "fine"."""
    shares = [one.effective_rank.mean() / one.rank for one in measured.layers]
    low, high = (measured.layers[int(pick(shares))] for pick in (np.argmin, np.argmax))
    under_prior = low.prior_effective_rank.mean()
    prior = f" (prior {under_prior:.1f})" if np.isfinite(under_prior) else ""
    sentence = (
        f"effective rank {low.effective_rank.mean():.1f} of {low.rank} in {low.family} {low.layer}{prior}"
    )
    if len(measured.layers) > 1:
        sentence += f" to {high.effective_rank.mean():.1f} of {high.rank} in {high.family} {high.layer}"
    return Finding("effective rank", "fine", sentence, float(min(shares)))


RANKS = Diagnostic(
    name="effective rank",
    measurement="spectrum",
    measure=lambda exam: spectrum(exam.drawn),
    judge=lambda measured, _: ranks(measured),
)
