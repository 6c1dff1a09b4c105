r"""Do fits from other random keys find the same posterior? Nested R-hat, with fits as chains.

    nested R-hat = (1 + B / W)^(1/2),    B = variance of the fits' means,    W = mean variance in a fit

for functions that the data can identify: margins of the logits at probe rows, norms of the updates of each
family, singular values of each layer. A fit is a superchain. Its draws are split into subchains, which has no
effect on independent draws. At the threshold of 1.05, the means of the fits differ by a third of the
posterior standard deviation. R-hat is rank-normalised and computed for the values and for their distances to
the median, so that different spreads are also detected.

| finding  | problem                                  | caution |
|----------|------------------------------------------|---------|
| restarts | nested R-hat of some function above 1.05 |         |

The result also contains the R-hat of the bound over the last fifth of the steps of each fit, and the bounds.
Of several optima, the one with the highest bound is the closest to the posterior in KL divergence.

References: Margossian et al. (2024), Nested R-hat, arXiv 2110.13017; Dhaka et al. (2020), arXiv 2009.00666,
for R-hat over runs of variational inference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import check_at_least
from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.bound import WINDOWS, bound
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.overlap import probe_values
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.assess.diagnostics.updates import singular_values
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.metrics.monte_carlo import nested_rhat, rank_rhat

THRESHOLD = 1.05

MOST_SHOWN = 100
"""Largest nested R-hat that is reported as a number; for unequal point masses it depends on rounding."""

SUBCHAINS = 4


@dataclass(frozen=True, repr=False)
class Restarts(Shown):
    """Agreement of several fits of one model.

    Attributes:
        names: Name of each function.
        values: Draws, shape (fit, draw, function).
        rhat: Nested R-hat of each function.
        bounds: Bound of each fit, mean over the last fifth of its steps, in nats.
        bound_errors: Standard error of each bound.
        bound_rhat: R-hat of the bound over these steps.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "fit draw k"]
    rhat: Float[np.ndarray, " k"]
    bounds: Float[np.ndarray, " fit"]
    bound_errors: Float[np.ndarray, " fit"]
    bound_rhat: float

    @property
    def worst(self) -> int:
        """Index of the function with the largest nested R-hat; NaN counts as the largest."""
        return int(np.where(np.isnan(self.rhat), np.inf, self.rhat).argmax())

    @property
    def passed(self) -> bool:
        """Whether the nested R-hat of every function is at most the threshold."""
        return bool((self.rhat <= THRESHOLD).all())

    @property
    def table(self) -> Any:
        """A pandas DataFrame with one row for each function: nested R-hat and the mean of each fit."""
        import pandas

        means = {f"mean_{i}": x.mean(0) for i, x in enumerate(self.values)}
        return pandas.DataFrame({"rhat": self.rhat, **means}, index=pandas.Index(self.names, name="function"))

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        bounds = ", ".join(f"{x:.1f} ± {e:.1f}" for x, e in zip(self.bounds, self.bound_errors, strict=True))
        title = f"{len(self.bounds)} fits; bounds {bounds} nats, R-hat {self.bound_rhat:.2f}"
        order = np.argsort(-self.rhat)
        rows = tuple(
            (self.names[k], f"{self.rhat[k]:.3f}", ", ".join(f"{x[:, k].mean():.3g}" for x in self.values))
            for k in order[:12]
        )
        return (Table(title, ("function", "nested R-hat", "mean of each fit"), rows),)


def restarts(fits: Sequence[Fit | Sample], data: Batch) -> Restarts:
    """Compare fits of one model from different keys.

    Args:
        fits: Two or more fits, or samples of them with the same number of draws.
        data: Rows for the margins, of which the first eight are used; labels are not read.

    Raises:
        ValueError: If there are fewer than two fits, sites or label words differ from those of the first, or
            the numbers of draws differ or are below 16.
    """
    check_at_least({"the number of fits": len(fits)}, 2)
    samples = [sample_of(one) for one in fits]
    _require_same(samples)
    check_at_least({"num_draws": samples[0].num_draws}, 4 * SUBCHAINS)
    functions = [_values(one, data) for one in samples]
    every = np.stack([x for _, x in functions])  # (fit, draw, function)
    # R-hat is not defined for a function with the same value in all draws of all fits.
    varies = np.flatnonzero(np.ptp(every, axis=(0, 1)) > 0)
    names, values = tuple(functions[0][0][k] for k in varies), every[..., varies]
    length = values.shape[1] // SUBCHAINS
    # (fit * subchain, draw, function): the subchains of a fit are adjacent.
    chains = values[:, : SUBCHAINS * length].reshape(len(samples) * SUBCHAINS, length, -1)
    traces = [bound(one) for one in samples]
    return Restarts(
        names=names,
        values=values,
        rhat=nested_rhat(chains, size=SUBCHAINS),
        bounds=np.array([x.value for x in traces]),
        bound_errors=np.array([x.errors["elbo"][-1] for x in traces]),
        bound_rhat=_bound_rhat([one.fit for one in samples]),
    )


def _values(sample: Sample, data: Batch) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and draws of margins, norms and singular values."""
    _, adapters = sample.drawn
    names, values = probe_values(sample, adapters, data)
    columns = [values]
    for family, site in sample.fit.model.sites.items():
        pair = adapters[family]
        grid = abs(site.scale) * singular_values(pair["a"], pair["b"])
        columns.append(grid.reshape(len(grid), -1))
        names += tuple(
            f"singular value[{family}, {layer}, {i + 1}]" for layer in site.layers for i in range(site.rank)
        )
    return names, np.concatenate(columns, axis=1)


def _bound_rhat(fits: Sequence[Fit]) -> float:
    """R-hat of the bound over the last fifth of the finite steps; NaN with fewer than four of them."""
    finite = [x[np.isfinite(x)] for x in (fit.history["elbo"] for fit in fits)]
    length = min(len(x) for x in finite) // WINDOWS
    if length < 4:
        return float("nan")
    return float(rank_rhat(np.stack([x[-length:] for x in finite])[..., None])[0])


def _require_same(samples: Sequence[Sample]) -> None:
    """Raise `ValueError` unless all fits have the sites, label words and number of draws of the first."""
    first = samples[0]
    for number, one in enumerate(samples[1:], start=2):
        model = one.fit.model
        if model.sites != first.fit.model.sites or model.likelihood != first.fit.model.likelihood:
            raise ValueError(
                f"all fits must have the sites and label words of the first; fit {number} has others"
            )
        if one.num_draws != first.num_draws:
            raise ValueError(
                f"all fits must have the {first.num_draws} draws of the first; fit {number} has "
                f"{one.num_draws}"
            )


def agreement(fits: Restarts) -> Finding:
    """Finding about the agreement of fits from different keys."""
    bounds = f"over {len(fits.bounds)} fits with bounds {', '.join(f'{x:.1f}' for x in fits.bounds)} nats"
    if not len(fits.rhat):
        return Finding("restarts", "not asked", f"every function is the same in all draws, {bounds}")
    k = fits.worst
    rhat = float(fits.rhat[k])
    if np.isnan(rhat):
        sentence = f"{fits.names[k]} has no nested R-hat, {bounds}"
        remedy = "Its draws are not finite or do not vary: check each fit separately."
        return Finding("restarts", "problem", sentence, rhat, THRESHOLD, remedy)
    text = f"{rhat:.2f}" if rhat < MOST_SHOWN else f"above {MOST_SHOWN}"
    sentence = f"nested R-hat {text} in {fits.names[k]} (at most {THRESHOLD:g}) {bounds}"
    if fits.passed:
        return Finding("restarts", "fine", sentence, rhat, THRESHOLD)
    remedy = (
        f"The fits converged to different posteriors: {_higher_bound(fits)}fit longer and from better starts "
        "until they agree."
    )
    return Finding("restarts", "problem", sentence, rhat, THRESHOLD, remedy)


def _higher_bound(fits: Restarts) -> str:
    """Advice which fit to use, if its bound is above every other by more than two standard errors."""
    best = int(fits.bounds.argmax())
    gaps = fits.bounds[best] - np.delete(fits.bounds, best)
    noise = 2 * np.hypot(fits.bound_errors[best], np.delete(fits.bound_errors, best))
    if (gaps > noise).all():
        return f"take number {best + 1}, whose bound is the highest, or "
    return "their bounds do not differ by more than the noise; "


AGREEMENT = Diagnostic(
    name="restarts",
    measurement="restarts",
    measure=lambda exam: restarts([exam.drawn, *exam.others], exam.data),
    judge=lambda fits, _: agreement(fits),
    needs=("other fits",),
)
