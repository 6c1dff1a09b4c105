r"""Do fits from other random keys find the same posterior? Nested R-hat of restarts taken as chains.

    nested R-hat = (1 + B / W)^(1/2),    B = variance of the fits' means,    W = mean variance in a fit

on functions that the data can identify: margins of the logits at probe rows, norms of the updates of each
family, singular values of each layer. A fit is a superchain and its draws are cut into subchains, which for
independent draws changes nothing but the bookkeeping. At the threshold of 1.05 the fits' means differ by a
third of the posterior standard deviation. It is the rank-normalised R-hat of values and of their distances
to the median, so that fits with other spreads are found too.

| finding  | problem                                  | caution |
|----------|------------------------------------------|---------|
| restarts | nested R-hat of some function above 1.05 |         |

The bound has an R-hat of its own, over the last fifth of the steps of each fit, and the bounds themselves
are given: of several optima the one with the highest bound is the closest to the posterior in KL.

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
"""Nested R-hat above which it is said to be so large; that of points which differ is decided by rounding."""

SUBCHAINS = 4


@dataclass(frozen=True, repr=False)
class Restarts(Shown):
    """Agreement of several fits of one model.

    Attributes:
        names: Name of each function.
        values: Draws, shape (fit, draw, function).
        rhat: Nested R-hat of each function.
        bounds: Bound of each fit, mean over the last fifth of its steps, in nats.
        bound_errors: Standard error of each.
        bound_rhat: R-hat of the bound over those steps.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "fit draw k"]
    rhat: Float[np.ndarray, " k"]
    bounds: Float[np.ndarray, " fit"]
    bound_errors: Float[np.ndarray, " fit"]
    bound_rhat: float

    @property
    def worst(self) -> int:
        """Index of the function with the largest nested R-hat; one that has none comes before all others."""
        return int(np.where(np.isnan(self.rhat), np.inf, self.rhat).argmax())

    @property
    def passed(self) -> bool:
        """Whether the nested R-hat of every function is at most the threshold."""
        return bool((self.rhat <= THRESHOLD).all())

    @property
    def table(self) -> Any:
        """One row for each function with the means by fit, a pandas DataFrame."""
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
    """Hold fits of one model from different keys against each other.

    Args:
        fits: Two fits or more, or samples of them, with equally many draws.
        data: Rows whose margins are looked at, the first eight of them; labels are not read.

    Raises:
        ValueError: With fewer than two fits, fits of other sites or label words than the first, or with too
            few or different numbers of draws.
    """
    check_at_least({"the number of fits": len(fits)}, 2)
    drawn = [sample_of(one) for one in fits]
    _require_same(drawn)
    check_at_least({"num_draws": drawn[0].num_draws}, 4 * SUBCHAINS)
    found = [_values(one, data) for one in drawn]
    every = np.stack([x for _, x in found])
    varies = np.flatnonzero(
        np.ptp(every, axis=(0, 1)) > 0
    )  # nothing is defined for values that are all equal
    names, values = tuple(found[0][0][k] for k in varies), every[..., varies]
    length = values.shape[1] // SUBCHAINS
    chains = values[:, : SUBCHAINS * length].reshape(len(drawn) * SUBCHAINS, length, -1)
    traces = [bound(one) for one in drawn]
    return Restarts(
        names=names,
        values=values,
        rhat=nested_rhat(chains, size=SUBCHAINS),
        bounds=np.array([x.value for x in traces]),
        bound_errors=np.array([x.errors["elbo"][-1] for x in traces]),
        bound_rhat=_bound_rhat([one.fit for one in drawn]),
    )


def _values(drawn: Sample, data: Batch) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and draws of margins, norms and singular values."""
    _, adapters = drawn.drawn
    names, values = probe_values(drawn, adapters, data)
    columns = [values]
    for family, site in drawn.fit.model.sites.items():
        pair = adapters[family]
        grid = abs(site.scale) * singular_values(pair["a"], pair["b"])
        columns.append(grid.reshape(len(grid), -1))
        names += tuple(
            f"singular value[{family}, {layer}, {i + 1}]" for layer in site.layers for i in range(site.rank)
        )
    return names, np.concatenate(columns, axis=1)


def _bound_rhat(fits: Sequence[Fit]) -> float:
    finite = [x[np.isfinite(x)] for x in (fit.history["elbo"] for fit in fits)]
    length = min(len(x) for x in finite) // WINDOWS
    if length < 4:
        return float("nan")
    return float(rank_rhat(np.stack([x[-length:] for x in finite])[..., None])[0])


def _require_same(drawn: Sequence[Sample]) -> None:
    first = drawn[0]
    for number, one in enumerate(drawn[1:], start=2):
        model = one.fit.model
        if model.sites != first.fit.model.sites or model.label_ids != first.fit.model.label_ids:
            raise ValueError(
                f"all fits must have the sites and label words of the first; fit {number} has others"
            )
        if one.num_draws != first.num_draws:
            raise ValueError(
                f"all fits must have the {first.num_draws} draws of the first; fit {number} has "
                f"{one.num_draws}"
            )


def agreement(fits: Restarts) -> Finding:
    """Whether fits from other keys agree."""
    bounds = f"over {len(fits.bounds)} fits with bounds {', '.join(f'{x:.1f}' for x in fits.bounds)} nats"
    if not len(fits.rhat):
        return Finding("restarts", "not asked", f"every function is the same in all draws, {bounds}")
    k = fits.worst
    rhat = float(fits.rhat[k])
    if np.isnan(rhat):
        sentence = f"{fits.names[k]} has no nested R-hat, {bounds}"
        remedy = "Its draws are not finite or do not vary: look at the fits one by one."
        return Finding("restarts", "problem", sentence, rhat, THRESHOLD, remedy)
    said = f"{rhat:.2f}" if rhat < MOST_SHOWN else f"above {MOST_SHOWN}"
    sentence = f"nested R-hat {said} in {fits.names[k]} (at most {THRESHOLD:g}) {bounds}"
    if fits.passed:
        return Finding("restarts", "fine", sentence, rhat, THRESHOLD)
    remedy = (
        f"The fits found different posteriors: {_higher_bound(fits)}fit longer and from better starts until "
        "they agree."
    )
    return Finding("restarts", "problem", sentence, rhat, THRESHOLD, remedy)


def _higher_bound(fits: Restarts) -> str:
    """Which fit to take, where its bound is above that of every other by more than the noise of both."""
    best = int(fits.bounds.argmax())
    gaps = fits.bounds[best] - np.delete(fits.bounds, best)
    noise = 2 * np.hypot(fits.bound_errors[best], np.delete(fits.bound_errors, best))
    if (gaps > noise).all():
        return f"take number {best + 1}, whose bound is the highest, or "
    return "their bounds do not tell which is the better one; "


AGREEMENT = Diagnostic(
    name="restarts",
    measurement="restarts",
    measure=lambda exam: restarts([exam.drawn, *exam.others], exam.data),
    judge=lambda fits, _: agreement(fits),
    needs=("other fits",),
)
