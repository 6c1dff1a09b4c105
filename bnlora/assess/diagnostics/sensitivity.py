r"""Would a stronger or weaker prior or likelihood change the posterior? Power-scaling sensitivity.

    prior:       p_alpha(theta | y)  proportional to  p(y | theta) p(theta)^alpha
    likelihood:  p_alpha(theta | y)  proportional to  p(y | theta)^alpha p(theta)

near alpha = 1, by importance weights of the draws, smoothed by Pareto laws. The sensitivity of a function is
the change of its distribution (cumulative Jensen-Shannon distance) per doubling of alpha. Above 0.05 in both:
prior and data disagree, or both are informative. Above 0.05 only in the prior: the prior determines the
function and the data have little effect. Above 0.05 only in the likelihood: the desired case.

The draws are those of the guide: the scaled posterior is the approximation. The power acts on the joint
density of all latent sites (all adapter weights); the standard deviation of its log over draws is the square
root of half their number. In thousands of dimensions even a power of 0.99 gives uneven weights; `khat_prior`
and `khat_likelihood` show whether the weights are reliable.

| finding       | problem | caution                          |
|---------------|---------|----------------------------------|
| power-scaling |         | some margin depends on the prior |

Reference: Kallioinen, Paananen, Buerkner and Vehtari (2024), arXiv 2107.14054.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic, Examination
from bnlora.assess.diagnostics.hyper import log_prior_groups
from bnlora.assess.diagnostics.overlap import probe_values
from bnlora.assess.diagnostics.sample import Sample, first_draws, sample_of
from bnlora.assess.diagnostics.tree import tree_of_draws
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.metrics.khat import KHat
from bnlora.metrics.monte_carlo import pareto_k, power_sensitivity
from bnlora.prediction.functions import stacked

THRESHOLD = 0.05
ALPHA = 0.99


@dataclass(frozen=True, repr=False)
class Sensitivity(Shown):
    """Power-scaling sensitivity of identifiable functions.

    Attributes:
        names: Name of each function.
        prior: Sensitivity of each to the prior.
        likelihood: Sensitivity of each to the likelihood of the training rows.
        khat_prior: Pareto k-hat of the weights for `prior`.
        khat_likelihood: Pareto k-hat of the weights for `likelihood`.
        num_draws: Number of draws.
    """

    names: tuple[str, ...]
    prior: Float[np.ndarray, " k"]
    likelihood: Float[np.ndarray, " k"]
    khat_prior: float
    khat_likelihood: float
    num_draws: int

    @property
    def conflicts(self) -> tuple[str, ...]:
        """Functions that depend on both; prior and data may disagree about them."""
        both = (self.prior >= THRESHOLD) & (self.likelihood >= THRESHOLD)
        return tuple(name for name, chosen in zip(self.names, both, strict=True) if chosen)

    @property
    def prior_alone(self) -> tuple[str, ...]:
        """Functions that depend on the prior and little on the data."""
        only_prior = (self.prior >= THRESHOLD) & (self.likelihood < THRESHOLD)
        return tuple(name for name, chosen in zip(self.names, only_prior, strict=True) if chosen)

    @property
    def table(self) -> Any:
        """A pandas DataFrame with one row for each function."""
        import pandas

        columns = {"prior": self.prior, "likelihood": self.likelihood}
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="function"))

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (name, f"{self.prior[k]:.3f}", f"{self.likelihood[k]:.3f}") for k, name in enumerate(self.names)
        )
        title = (
            f"Power-scaling sensitivity, threshold {THRESHOLD:g} (k-hat of the weights: prior "
            f"{self.khat_prior:.2f}, likelihood {self.khat_likelihood:.2f})"
        )
        return (Table(title, ("function", "prior", "likelihood"), rows),)


def sensitivity(fit: Fit | Sample, data: Batch) -> Sensitivity:
    """Power-scaling sensitivity of margins at probe rows and of the norms of the updates.

    Args:
        fit: A fit, or a `Sample` of it.
        data: Rows for the margins, of which the first eight are used; labels are not read.

    Raises:
        ValueError: If the prior has no latent sites.
    """
    sample = sample_of(fit)
    sample.require_prior("power-scaling")
    adapters = first_draws(sample.drawn[1], sample.num_used)
    return sensitivity_of(sample, *probe_values(sample, adapters, data))


def sensitivity_of(sample: Sample, names: tuple[str, ...], values: Float[np.ndarray, "s k"]) -> Sensitivity:
    """Power-scaling sensitivity of functions.

    Args:
        sample: A sample of a fit.
        names: Names of the functions.
        values: Their values at the first draws of the sample, at most `sample.num_used` of them.
    """
    count = len(values)
    log_likelihood = sample.log_likelihood[:count]
    by_group = log_prior_groups(sample.fit.model, first_draws(sample.drawn[0].log_prior_of, count))
    tree = tree_of_draws(
        {
            "posterior": {"value": values},
            "log_prior": by_group,
            "log_likelihood": {"y": log_likelihood},
        },
        dims={"value": ["function"], "y": ["row"]},
        coords={"function": list(names)},
    )
    prior, likelihood = (power_sensitivity(tree, group)["value"] for group in ("prior", "likelihood"))
    # log weights of a power alpha relative to alpha = 1: (alpha - 1) times the scaled log density.
    log_prior = sum(by_group.values(), start=np.zeros(len(values)))
    of_prior, of_likelihood = (pareto_k((ALPHA - 1) * x) for x in (log_prior, log_likelihood.sum(1)))
    return Sensitivity(names, prior, likelihood, of_prior, of_likelihood, count)


def power_scaling(measured: Sensitivity) -> Finding:
    """Finding about the prior: whether margins depend on its strength."""
    worst = max(measured.khat_prior, measured.khat_likelihood)
    limit = KHat(worst, measured.num_draws).threshold
    if worst > limit:
        sentence = f"the weights of a changed power have k-hat {worst:.2f} (at most {limit:.2f})"
        return Finding("power-scaling", "not asked", sentence, worst, limit, "Fit again under another scale.")
    # Only margins count: norms include a shift of all classes, which the likelihood does not inform.
    margins = [
        k
        for k, name in enumerate(measured.names)
        if name.startswith("margin[") and np.isfinite([measured.prior[k], measured.likelihood[k]]).all()
    ]
    if not margins:
        return Finding("power-scaling", "not asked", "no margin has a sensitivity: their draws do not vary")
    both, only_prior = (
        sum(measured.names[k] in names for k in margins)
        for names in (measured.conflicts, measured.prior_alone)
    )
    k = max(margins, key=lambda i: measured.prior[i])
    sentence = (
        f"of {len(margins)} margins {both} depend on prior and data, {only_prior} only on the prior; largest "
        f"sensitivity to the prior: {measured.names[k]}, {measured.prior[k]:.2f} (below {THRESHOLD:g}; to "
        f"the data {measured.likelihood[k]:.2f})"
    )
    numbers = (float(measured.prior[k]), THRESHOLD)
    if not both + only_prior:
        return Finding("power-scaling", "fine", sentence, *numbers)
    remedy = "Report how these predictions change under a wider and under a narrower prior."
    return Finding("power-scaling", "caution", sentence, *numbers, remedy)


def _measure(exam: Examination) -> Sensitivity:
    return sensitivity_of(exam.drawn, *stacked(first_draws(exam.posterior, exam.drawn.num_used)))


SCALING = Diagnostic(
    name="power-scaling",
    measurement="sensitivity",
    measure=_measure,
    judge=lambda measured, _: power_scaling(measured),
    needs=("prior",),
)
