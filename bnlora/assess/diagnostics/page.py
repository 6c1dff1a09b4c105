"""One page about a fit: what is fine, what is not, and what to do about it.

`DIAGNOSTICS` lists all diagnostics; each is a file that opens with its mathematics and its rule. They share
draws and forward passes (`examination`). The page makes no claim beyond its findings: k-hat sees no missed
mode, a bound that stands still may stand in a poor optimum (give `restarts`), and no check of predictions
proves a posterior. A gold standard is `bnlora.sample_nuts` with `bnlora.compare`.
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
from bnlora.data.batch import Batch, check_labels
from bnlora.infer.svi.result import Fit
from bnlora.prediction.functions import PROBES

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
"""All diagnostics. One may read what those before it measured and found."""

DRAWS, FIRST_LOOK = 400, 32
"""Draws of a page, and draws that rows are predicted with at first, unless a number of draws is given."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown, Judged):
    """Findings about a fit, and the measurements behind them.

    Every measurement is an attribute too: `page.khat`, `page.loo`, `page.shrinkage`. It is None where it was
    not run or is not defined for this fit.

    Attributes:
        findings: What each diagnostic concludes, in the order of `DIAGNOSTICS`.
        measurements: What the diagnostics measured, by name.
        num_draws: Number of draws of the guide and of the prior.
        num_used: Number of draws that the training rows were predicted with.
    """

    findings: tuple[Finding, ...]
    measurements: Mapping[str, Any]
    num_draws: int
    num_used: int

    def __getattr__(self, name: str) -> Any:
        """A measurement by its name."""
        measurements = self.__dict__.get("measurements", {})  # absent while a copy is made
        if name in measurements:
            return measurements[name]
        raise AttributeError(
            f"a diagnosis has no {name!r}; its measurements are {', '.join(measurements) or 'not there yet'}"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.measurements})

    @property
    def summary(self) -> str:
        """How many findings there are of each status, in a sentence."""
        used = "" if self.num_used == self.num_draws else f", {self.num_used} of them for training rows"
        return f"Diagnosis from {self.num_draws} draws{used}: {count_words(self.findings)}"

    @property
    def overview(self) -> tuple[Findings]:
        """The findings, the worst first."""
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
    """Run every diagnostic on a fit and say what is fine, what is not, and what to do about it.

    Args:
        key: Random key; the same key gives the same page.
        fit: A fit.
        data: Rows with labels, best ones that were not fitted: for counts of the classes, the first eight for
            margins and the first 32 for the prior predictive.
        num_draws: Draws of the guide, and of the prior; rows are predicted by all of them. Omitted, there
            are 400 draws. Rows are then predicted by 32 of them, and by more only where the standard error
            of k-hat or of a count asks for it.
        batch_size: Rows to run at a time.
        tolerance: Relative change of the smoothed bound that counts as none.
        families: Whether to compute k-hat of each family too. It is costly: it predicts the training rows
            once more for each family.
        leave_out: Training rows for leave-one-out, chosen at random; all, and at most 500, when omitted.
        restarts: Other fits of this model, from other keys, to compare with this one.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        The page. It prints as a table in terminals and notebooks; every measurement is an attribute.

    Raises:
        ValueError: When it is no `Fit`, rows are without labels, or an option is out of range.

    Example:
        >>> page = bl.diagnose(key, fit, rows, num_draws=40)
        >>> page["convergence"].status  # after four steps
        'problem'
    """
    key = check_key(key)
    bar = OneBar(console, 0)
    draws, first_look = (DRAWS, FIRST_LOOK) if num_draws is None else (num_draws, None)
    of = partial(sample, num_draws=draws, batch_size=batch_size, console=bar, first_look=first_look)
    drawn = of(key, fit)
    check_labels("data", data, len(fit.model.label_ids))
    others = tuple(of(other.draw_key, other) for other in restarts)
    exam = Examination(drawn, data, others, Request(tolerance, families, leave_out))
    with bar.bar:
        bar.more(planned(exam))
        for diagnostic in DIAGNOSTICS:
            exam.run(diagnostic)
    findings = tuple(exam.findings.values())
    return Diagnosis(findings, exam.measurements, draws, drawn.num_used)


def planned(exam: Examination) -> int:
    """Forward passes that are foreseen, each of one row under one draw; standard errors may ask for more."""
    fit, few = exam.fit, exam.drawn.few
    families = len(fit.model.sites) if exam.request.families else 0
    fits = 1 + len(exam.others) if exam.others else 0
    work = few * (len(fit.train) * (1 + families) + len(exam.data) + fits * min(PROBES, len(exam.data)))
    margins = exam.drawn.num_draws * min(PROBES, len(exam.data))
    if exam.drawn.has_prior:
        work += margins
    if exam.drawn.has_prior and not exam.drawn.prior_refusal:
        draws = few if exam.drawn.first_look else few + 1  # the first one is without adapters
        work += margins + draws * min(PRIOR_ROWS, len(exam.data))
    return work + (passes(len(exam.data)) if fit.model.kind == "tangent" else 0)
