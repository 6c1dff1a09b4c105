"""One page about a fit: findings of all diagnostics, and remedies.

`DIAGNOSTICS` lists all diagnostics. The module of each has its formulas and its rule at the top. They share
draws and forward passes (`examination`). The page has limits: k-hat cannot detect a missed mode, a converged
bound may be at a poor optimum (pass `restarts`), and no check of predictions proves that a posterior is
right. The gold standard is `bnlora.sample_nuts` with `bnlora.compare`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax import Array
from rich.console import Console

from bnlora._util.checks import check_key
from bnlora._util.display import Shown
from bnlora._util.finding import Finding, Findings, Judged, count_words
from bnlora._util.progress import OneBar
from bnlora.assess.diagnostics.bound import CONVERGENCE, GUESSING, LAST_STEP
from bnlora.assess.diagnostics.classes import COUNTS
from bnlora.assess.diagnostics.examination import PRIOR_ROWS, Diagnostic, Examination, Request
from bnlora.assess.diagnostics.linearisation import LINEARISATION, passes
from bnlora.assess.diagnostics.loo import LEAVE_OUT
from bnlora.assess.diagnostics.overlap import CONFLICT, LEARNED
from bnlora.assess.diagnostics.pit import TRANSFORMS
from bnlora.assess.diagnostics.prior import PREDICTIVE
from bnlora.assess.diagnostics.restarts import AGREEMENT
from bnlora.assess.diagnostics.sample import sample
from bnlora.assess.diagnostics.sensitivity import SCALING
from bnlora.assess.diagnostics.shrinkage import SPREAD
from bnlora.assess.diagnostics.spectrum import RANKS
from bnlora.assess.diagnostics.steps import STEPS
from bnlora.assess.diagnostics.weights import FAMILIES, WEIGHTS
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.prediction.functions import PROBES
from bnlora.prediction.predict import require_labels

DIAGNOSTICS: tuple[Diagnostic, ...] = (
    STEPS,
    CONVERGENCE,
    LAST_STEP,
    WEIGHTS,
    FAMILIES,
    LINEARISATION,
    AGREEMENT,
    SPREAD,
    LEARNED,
    CONFLICT,
    PREDICTIVE,
    SCALING,
    GUESSING,
    RANKS,
    LEAVE_OUT,
    TRANSFORMS,
    COUNTS,
)
"""All diagnostics in order. Each may use measurements and findings of those before it."""

DRAWS, FIRST_LOOK = 400, 32
"""Default number of draws of a page, and of draws for its first predictions."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown, Judged):
    """Findings about a fit, and their measurements.

    Every measurement is also an attribute: `page.khat`, `page.loo`, `page.shrinkage`. It is None if it was
    not computed or is not defined for this fit.

    Attributes:
        findings: Finding of each diagnostic, in the order of `DIAGNOSTICS`.
        measurements: Measurements of the diagnostics, by name.
        num_draws: Number of draws of the guide and of the prior.
        num_used: Number of draws of the predictions of the training rows.
    """

    findings: tuple[Finding, ...]
    measurements: Mapping[str, Any]
    num_draws: int
    num_used: int

    def __getattr__(self, name: str) -> Any:
        """A measurement by its name."""
        measurements = self.__dict__.get("measurements", {})  # absent while the object is copied
        if name in measurements:
            return measurements[name]
        raise AttributeError(
            f"a diagnosis has no {name!r}; its measurements are {', '.join(measurements) or 'none yet'}"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.measurements})

    @property
    def summary(self) -> str:
        """Number of draws, and number of findings of each status."""
        used = "" if self.num_used == self.num_draws else f", {self.num_used} of them for training rows"
        return f"Diagnosis from {self.num_draws} draws{used}: {count_words(self.findings)}"

    @property
    def overview(self) -> tuple[Findings]:
        """The findings, worst first."""
        return (Findings(self.summary, self.findings),)


def diagnose(
    key: Array,
    fit: Fit,
    data: Batch,
    *,
    num_draws: int | None = None,
    batch_size: int = 32,
    tolerance: float = 0.01,
    families: bool = False,
    leave_out: int | None = None,
    restarts: Sequence[Fit] = (),
    console: Console | None = None,
) -> Diagnosis:
    """Run all diagnostics on a fit; return findings and remedies.

    Args:
        key: Random key; the same key gives the same page.
        fit: A fit.
        data: Rows with labels, if possible not used in the fit. All are used for counts of the classes, the
            first eight for margins, and the first 32 for the prior predictive.
        num_draws: Draws of the guide, and of the prior; all of them predict rows. By default there are 400
            draws, rows are predicted by 32 of them, and by more only if the standard error of k-hat or of a
            count requires it.
        batch_size: Rows to run at a time.
        tolerance: Relative change of the smoothed bound that counts as none.
        families: Whether to compute k-hat of each family as well. This is expensive: the training rows are
            predicted once more for each family.
        leave_out: Number of training rows for leave-one-out, chosen at random; by default all, at most 500.
        restarts: Other fits of this model, from other keys, to compare with this one.
        console: Where to draw a progress bar; the terminal or notebook by default.

    Returns:
        The page. It prints as a table in terminals and notebooks; every measurement is an attribute.

    Raises:
        ValueError: If `fit` is not a `Fit`, rows have no labels, or an option is out of range.

    Example:
        >>> page = bl.diagnose(key, fit, rows, num_draws=40)
        >>> page["convergence"].status  # after four steps
        'problem'
    """
    key = check_key(key)
    require_labels(fit.model, "bl.diagnose")
    bar = OneBar(console, 0)
    draws, first_look = (DRAWS, FIRST_LOOK) if num_draws is None else (num_draws, None)
    prepare = partial(sample, num_draws=draws, batch_size=batch_size, console=bar, first_look=first_look)
    fit_sample = prepare(key, fit)
    fit.model.check_outcomes("data", data)
    others = tuple(prepare(other.draw_key, other) for other in restarts)
    exam = Examination(fit_sample, data, others, Request(tolerance, families, leave_out))
    with bar.bar:
        bar.more(planned(exam))
        for diagnostic in DIAGNOSTICS:
            exam.run(diagnostic)
    findings = tuple(exam.findings.values())
    return Diagnosis(findings, exam.measurements, draws, fit_sample.num_used)


def planned(exam: Examination) -> int:
    """Expected number of forward passes of one row under one draw; standard errors may require more."""
    fit, few = exam.fit, exam.drawn.few
    families = len(fit.model.sites) if exam.request.families else 0
    fits = 1 + len(exam.others) if exam.others else 0
    margins = exam.drawn.num_draws * min(PROBES, len(exam.data))
    work = few * (len(fit.train) * (1 + families) + len(exam.data)) + fits * margins
    if exam.drawn.has_prior:
        work += margins
    if exam.drawn.has_prior and not exam.drawn.prior_refusal:
        draws = few if exam.drawn.first_look else few + 1  # the additional draw is without adapters
        work += margins + draws * min(PRIOR_ROWS, len(exam.data))
    return work + (passes(len(exam.data)) if fit.model.kind == "tangent" else 0)
