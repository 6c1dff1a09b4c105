r"""How similar are prior and posterior of each function? Overlap of their densities.

    overlap(f) = integral min(q(f), p(f)) df = 1 - total variation

of posterior and prior of a scalar function that the data can identify: margins of the logits at probe rows,
the norm of each family's update. The overlap is one if the data contain no information about the function,
and near zero if they moved or narrowed it strongly. The position of the posterior median in the prior,
P_p(f <= median_q f), is reported as well: near 0 or 1 prior and posterior are in conflict, for any overlap.

Overlap is invariant under increasing maps of f. Both samples are therefore mapped to the normal scores of
their pooled ranks, which is robust to heavy tails, and smoothed with Gaussian kernels of Scott's bandwidth.
Smoothing makes the estimate of a small overlap slightly too large. The standard error is that of a jackknife
over ten groups of draws.

| finding             | problem                                | caution                                    |
|---------------------|----------------------------------------|--------------------------------------------|
| learned             | all overlaps of functions above 0.9    | some family's update is as under the prior |
| prior and posterior | norm of an update outside of the prior |                                            |

References: Inman and Bradley (1989), The overlapping coefficient as a measure of agreement between
probability distributions; Garrett and Zeger (2000), Latent class model diagnosis, for overlaps of prior and
posterior.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import rankdata

from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.assess.diagnostics.shrinkage import UPDATE, Shrinkage
from bnlora.assess.diagnostics.subject import Subject
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.prediction.functions import PROBES, identifiable, stacked

GROUPS = 10

SAME = 0.9
"""Overlap of prior and posterior above which they count as equal."""

AS_WIDE = 0.97
"""Ratio of posterior to prior spread above which a layer counts as unlearned."""

OUTSIDE = 0.001
"""Prior probability beyond the posterior median below which the two are in conflict."""

GRID = np.linspace(-4.5, 4.5, 181)


@dataclass(frozen=True, repr=False)
class Overlap(Shown):
    """Overlap of prior and posterior of identifiable functions.

    Attributes:
        names: Name of each function.
        posterior: Posterior draws of each function.
        prior: Prior draws of each function.
        value: Overlap of each function, between 0 and 1.
        error: Standard error of `value`.
        position: Prior probability of values up to the posterior median, for each function.
    """

    names: tuple[str, ...]
    posterior: tuple[Float[np.ndarray, " s"], ...]
    prior: tuple[Float[np.ndarray, " s"], ...]
    value: Float[np.ndarray, " k"]
    error: Float[np.ndarray, " k"]
    position: Float[np.ndarray, " k"]

    @property
    def table(self) -> Any:
        """A pandas DataFrame with one row for each function."""
        import pandas

        columns = {"overlap": self.value, "error": self.error, "position": self.position}
        for side, draws in (("posterior", self.posterior), ("prior", self.prior)):
            columns[f"{side}_mean"] = np.array([x.mean() for x in draws])
            columns[f"{side}_sd"] = np.array([x.std(ddof=1) for x in draws])
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="function"))

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (name, f"{self.value[k]:.2f} ± {self.error[k]:.2f}", f"{self.position[k]:.3f}")
            + tuple(f"{x[k].mean():.3g} ± {x[k].std(ddof=1):.3g}" for x in (self.posterior, self.prior))
            for k, name in enumerate(self.names)
        )
        header = ("function", "overlap", "position", "posterior, mean ± sd", "prior")
        return (Table("Overlap of prior and posterior", header, rows),)


def overlap(fit: Fit | Sample, data: Batch) -> Overlap:
    """Overlap of prior and posterior of margins at probe rows and of the norms of the updates.

    Args:
        fit: A fit, or a `Sample` of it.
        data: Rows for the margins, of which the first eight are used; labels are not read.

    Raises:
        ValueError: If the prior has no latent sites or cannot be drawn from.
    """
    sample = sample_of(fit)
    sample.require_prior("an overlap")
    functions = identifiable(sample.fit.model, data[:PROBES])
    posterior, prior = (functions.by_draw(x, None) for x in (sample.drawn[1], sample.prior_adapters))
    return overlap_by_name(posterior, prior)


def overlap_by_name(posterior: Mapping[str, Any], prior: Mapping[str, Any]) -> Overlap:
    """Overlap of functions from posterior and prior draws, whose numbers may differ."""
    names = tuple(sorted(posterior))
    at, below = (tuple(np.asarray(x[name], np.float64) for name in names) for x in (posterior, prior))
    pairs = list(zip(at, below, strict=True))
    value, error = (np.array(x) for x in zip(*(overlap_of_draws(*pair) for pair in pairs), strict=True))
    position = np.array([(y <= np.median(x)).mean() for x, y in pairs])
    return Overlap(names, at, below, value, error, position)


def probe_values(sample: Sample, adapters: Any, data: Batch) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and values, shape (draw, function), of margins and norms at adapters with a draw axis."""
    return stacked(identifiable(sample.fit.model, data[:PROBES]).by_draw(adapters, None))


def overlap_of_draws(first: Float[np.ndarray, " s"], second: Float[np.ndarray, " t"]) -> tuple[float, float]:
    """Overlap of two laws from draws of each, and its standard error."""
    value = _overlap(first, second)
    # Jackknife: leave out one of ten interleaved groups of both samples at a time.
    parts = [np.arange(len(x)) % GROUPS for x in (first, second)]
    without = [_overlap(first[parts[0] != g], second[parts[1] != g]) for g in range(GROUPS)]
    return value, float(np.sqrt((GROUPS - 1) * np.var(without)))


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two samples on the scale of the normal scores of their pooled ranks."""
    ranks = rankdata(np.concatenate([first, second]))
    scores = ndtri((ranks - 0.5) / len(ranks))
    one, two = (_smooth(x) for x in (scores[: len(first)], scores[len(first) :]))
    return float(min(np.minimum(one, two).sum(), 1.0))


def _smooth(scores: np.ndarray) -> np.ndarray:
    """Gaussian kernel density on the grid, normalised to sum to one."""
    width = max(scores.std(ddof=1), 1e-6) * len(scores) ** -0.2  # Scott's rule
    width = max(width, GRID[1] - GRID[0])  # a narrower kernel could fall between two points of the grid
    density = np.exp(-0.5 * ((GRID[:, None] - scores) / width) ** 2).sum(1)
    return density / density.sum()


def learned(shared: Overlap, spread: Shrinkage) -> Finding:
    """Finding about learning: whether the posterior differs from the prior, and in which families."""
    least, k = float(shared.value.min()), int(shared.value.argmin())
    cells = [c for c in spread.cells if c.factor == UPDATE and np.isfinite(c.ratio)]
    sentence = (
        f"least overlap of prior and posterior {least:.2f} ± {shared.error[k]:.2f}, in {shared.names[k]} (at "
        f"most {SAME:g}); {spread.total_words}"
    )
    if least > SAME:
        remedy = (
            "The posterior hardly differs from the prior: raise the prior's scale, use more rows, or adapt "
            "other modules."
        )
        return Finding("learned", "problem", sentence, least, SAME, remedy)
    by_family: dict[str, list[float]] = {}
    for cell in cells:
        by_family.setdefault(cell.family, []).append(cell.ratio - 2 * cell.ratio_error)
    # Families whose norm overlaps: the name is "norm[<family>]".
    same = {n.split("[")[-1][:-1] for n, x in zip(shared.names, shared.value, strict=True) if x > SAME}
    idle = [family for family, low in by_family.items() if min(low) > AS_WIDE and family in same]
    if idle:
        sentence += f"; size and spread of the update as under the prior: {', '.join(idle)}"
        remedy = (
            f"A few directions of {', '.join(idle)} may still matter: compare the evidence with and without "
            "it (bnlora.choose_scales under a core prior), or predictions of validation rows; leave it out "
            "if neither gets worse."
        )
        return Finding("learned", "caution", sentence, least, SAME, remedy)
    if cells:
        ratios = [cell.ratio for cell in cells]
        sentence += f"; spread of the updates {min(ratios):.2f} to {max(ratios):.2f} of the prior's"
    return Finding("learned", "fine", sentence, least, SAME)


def conflict(shared: Overlap, about: Subject) -> Finding:
    """Finding about conflict: whether the sizes of the updates are plausible under the prior."""
    norms = [k for k, name in enumerate(shared.names) if name.startswith("norm[")]
    tail = np.minimum(shared.position, 1 - shared.position)
    k = min(norms, key=lambda i: tail[i])
    position = float(shared.position[k])
    sentence = (
        f"the posterior median of {shared.names[k]} is at {position:.1%} of {len(shared.prior[k])} draws of "
        f"the prior (between {OUTSIDE:.1%} and {1 - OUTSIDE:.1%})"
    )
    if tail[k] >= OUTSIDE:
        return Finding("prior and posterior", "fine", sentence, position, OUTSIDE)
    wider = position > 0.5
    remedy = (
        f"The updates are {'larger' if wider else 'smaller'} than nearly all draws of the prior: "
        f"{'raise' if wider else 'lower'} its scale"
        + ("." if about.learns_scale else ", or learn it with priors.learned(...).")
    )
    return Finding("prior and posterior", "problem", sentence, position, OUTSIDE, remedy)


LEARNED = Diagnostic(
    name="learned",
    measurement="overlap",
    measure=lambda exam: overlap_by_name(exam.posterior, exam.prior),
    judge=lambda shared, exam: learned(shared, exam.measurements["shrinkage"]),
    needs=("prior", "draws of the prior"),
)

CONFLICT = Diagnostic(
    name="prior and posterior",
    measurement="overlap",
    measure=LEARNED.measure,
    judge=lambda shared, exam: conflict(shared, exam.about),
    needs=LEARNED.needs,
)
