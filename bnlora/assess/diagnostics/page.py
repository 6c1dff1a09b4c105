"""One page about a fit: what is fine, what is not, and what to do about it.

Every diagnostic of this package runs on one set of draws; the rules of `fit_rules`, `prior_rules` and
`row_rules` turn each into a finding. The page makes no claim beyond its findings: k-hat sees no missed
mode, a bound that stands still may stand in a poor optimum (give `restarts`), and no check of predictions
proves a posterior. A gold standard is `bnlora.sample_nuts` with `bnlora.compare`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from io import StringIO

import jax
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bnlora.assess.diagnostics import fit_rules, prior_rules, row_rules
from bnlora.assess.diagnostics.bound import Bound, FinalBound, bound, final_bound
from bnlora.assess.diagnostics.classes import ClassCounts, class_counts
from bnlora.assess.diagnostics.finding import COLOURS, MARKS, Finding, Status
from bnlora.assess.diagnostics.linearisation import Linearisation, linearisation
from bnlora.assess.diagnostics.loo import LeaveOneOut, loo, loo_probs
from bnlora.assess.diagnostics.overlap import Overlap, overlap
from bnlora.assess.diagnostics.pit import Pit, randomised_pit
from bnlora.assess.diagnostics.restarts import Restarts
from bnlora.assess.diagnostics.restarts import restarts as hold_together
from bnlora.assess.diagnostics.sample import Sample, sample
from bnlora.assess.diagnostics.sensitivity import Sensitivity, sensitivity
from bnlora.assess.diagnostics.shrinkage import Shrinkage, shrinkage
from bnlora.assess.diagnostics.spectrum import Spectrum, spectrum
from bnlora.assess.diagnostics.subject import subject
from bnlora.assess.diagnostics.weights import KHats, khat
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.data.batch import Batch, check_labels
from bnlora.infer.svi.result import Fit
from bnlora.prediction.predict import predict_with_draws

MOST_ROWS = 500
"""Training rows above which leave-one-out takes a random part of them, unless told otherwise."""

LEVEL = 1 - row_rules.LEVEL
"""Probability of the simultaneous bands, so that they are left when the p-value raises a caution."""

PRIOR_ROWS = 32
"""Rows of the prior predictive."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Findings about a fit, and the measurements behind them.

    Attributes:
        findings: What each diagnostic says, in the order in which to read them.
        bound: The bound over the steps; None with fewer than ten.
        final_bound: The bound at the fitted parameters; None without a density.
        khat: Importance weights.
        shrinkage: Posterior spread relative to the prior's; None without a prior that can be drawn from.
        overlap: Overlap of prior and posterior; None likewise.
        sensitivity: Power-scaling; None without a prior.
        prior_predictive: What the prior says of some of the given rows; None as `shrinkage`.
        spectrum: Singular values and effective ranks.
        loo: Leave-one-out; None without a density, as the next.
        pit: Transforms of the training rows.
        class_counts: Counts of the classes of the given rows.
        restarts: Agreement with other fits; None where none were given.
        linearisation: Distance of the network from its tangent; None for a fit of the network.
        num_draws: Number of draws behind all of it.
    """

    findings: tuple[Finding, ...]
    bound: Bound | None
    final_bound: FinalBound | None
    khat: KHats
    shrinkage: Shrinkage | None
    overlap: Overlap | None
    sensitivity: Sensitivity | None
    prior_predictive: PriorPredictive | None
    spectrum: Spectrum
    loo: LeaveOneOut | None
    pit: Pit | None
    class_counts: ClassCounts
    restarts: Restarts | None
    linearisation: Linearisation | None
    num_draws: int

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings for which the fit should not be used as it is."""
        return self._with("problem")

    @property
    def cautions(self) -> tuple[Finding, ...]:
        """Findings to know before numbers are reported."""
        return self._with("caution")

    @property
    def passed(self) -> bool:
        """Whether there is no problem and no caution."""
        return not (self.problems or self.cautions)

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name, such as "k-hat"."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no finding {name!r}; there are {', '.join(f.name for f in self.findings)}")

    @property
    def summary(self) -> str:
        """How many findings of each status, in a sentence."""
        counts = {s: len(self._with(s)) for s in MARKS}
        words = {"problem": "problems", "caution": "cautions"}
        said = [f"{n} {s if n == 1 else words.get(s, s)}" for s, n in counts.items() if n]
        return f"Diagnosis from {self.num_draws} draws: {', '.join(said)}"

    def _with(self, status: Status) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == status)

    @property
    def _ordered(self) -> list[Finding]:
        return [finding for status in MARKS for finding in self._with(status)]

    def __rich__(self) -> RichTable:
        table = RichTable(
            title=self.summary, title_justify="left", box=None, show_header=False, pad_edge=False
        )
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column()
        for finding in self._ordered:
            colour = COLOURS[finding.status]
            text = Text(finding.measured)
            if finding.remedy:
                text.append(f"\n→ {finding.remedy}", style="bold")
            table.add_row(Text(MARKS[finding.status], style=colour), Text(finding.name, style=colour), text)
        return table

    def __repr__(self) -> str:
        console = Console(width=110, file=StringIO(), force_jupyter=False)
        with console.capture() as text:
            console.print(self)
        return "\n".join(line.rstrip() for line in text.get().rstrip().splitlines())

    def _repr_html_(self) -> str:
        rows = "".join(map(_html_row, self._ordered))
        caption = f"<caption style='text-align:left'><b>{escape(self.summary)}</b></caption>"
        return f"<table class='bnlora-diagnosis'>{caption}<tbody>{rows}</tbody></table>"


def _html_row(finding: Finding) -> str:
    colour = {"problem": "#d9443a", "caution": "#c07600", "fine": "#3a9a3f", "not asked": "#888888"}
    remedy = f"<br><b>→ {escape(finding.remedy)}</b>" if finding.remedy else ""
    mark = f"{MARKS[finding.status]} {escape(finding.name)}"
    return (
        f"<tr class='{finding.status.replace(' ', '-')}'><td style='color:{colour[finding.status]};"
        f"white-space:nowrap;text-align:left;vertical-align:top'>{mark}</td>"
        f"<td style='text-align:left'>{escape(finding.measured)}{remedy}</td></tr>"
    )


def diagnose(
    fit: Fit,
    data: Batch,
    *,
    num_draws: int = 400,
    batch_size: int = 32,
    tolerance: float = 0.01,
    families: bool = True,
    leave_out: int | None = None,
    restarts: Sequence[Fit] = (),
    key: Array | None = None,
    console: Console | None = None,
) -> Diagnosis:
    """Run every diagnostic on a fit and say what is fine, what is not, and what to do about it.

    Args:
        fit: A fit.
        data: Rows with labels, best ones that were not fitted: for counts of the classes, the first eight for
            margins and the first 32 for the prior predictive.
        num_draws: Draws of the guide, and of the prior.
        batch_size: Rows to run at a time.
        tolerance: Relative change of the smoothed bound that counts as none.
        families: Whether k-hat is asked of each family too, running the training rows once more for each.
        leave_out: Training rows for leave-one-out, chosen at random; all, and at most 500, when omitted.
        restarts: Other fits of this model, from other keys, to hold against this one.
        key: Random key; the fit's own when omitted, so that two calls agree.
        console: Where to draw progress bars; the terminal or notebook when omitted.

    Returns:
        The page. It prints as a table in terminals and notebooks; every measurement is an attribute.

    Raises:
        ValueError: When it is no `Fit`, rows are without labels, or an option is out of range.

    Example:
        >>> page = bl.diagnose(fit, rows, num_draws=40)
        >>> page["convergence"].status  # after four steps
        'problem'
    """
    drawn = sample(fit, num_draws=num_draws, batch_size=batch_size, key=key, console=console)
    check_labels("data", data, len(fit.model.label_ids))
    others = [sample(f, num_draws=num_draws, batch_size=batch_size, console=console) for f in restarts]
    asked = MOST_ROWS if leave_out is None and len(fit.train) > MOST_ROWS else leave_out
    prior = drawn.has_prior and not drawn.prior_refusal
    page = Diagnosis(
        findings=(),
        bound=bound(drawn, tolerance=tolerance) if _long_enough(fit) else None,
        final_bound=final_bound(drawn) if drawn.has_density else None,
        khat=khat(drawn, families=families),
        shrinkage=shrinkage(drawn) if prior else None,
        overlap=overlap(drawn, data) if prior else None,
        sensitivity=sensitivity(drawn, data) if drawn.has_prior else None,
        prior_predictive=_prior_predictive(drawn, data) if prior else None,
        spectrum=spectrum(drawn),
        loo=loo(drawn, observations=asked) if drawn.has_density else None,
        pit=_pit(drawn) if drawn.has_density else None,
        class_counts=_class_counts(drawn, data),
        restarts=hold_together([drawn, *others], data) if others else None,
        linearisation=linearisation(drawn, data),
        num_draws=num_draws,
    )
    return replace(page, findings=tuple(_findings(page, drawn, data)))


def _findings(page: Diagnosis, drawn: Sample, data: Batch) -> list[Finding]:
    """Every finding that is defined for this fit."""
    fit, found, about = drawn.fit, [fit_rules.steps(drawn.fit)], subject(drawn)
    if page.bound is not None:
        found.append(fit_rules.convergence(page.bound))
        found.append(fit_rules.last_step(page.bound, page.final_bound, fit, about))
    else:
        measured = f"{len(fit.step_seconds)} steps, too few to smooth"
        found.append(Finding("convergence", "problem", measured, remedy="Fit for hundreds of steps."))
    converged = found[1].status == "fine"
    found.append(fit_rules.weights(page.khat, about, converged=converged))
    found += [one for one in [fit_rules.families(page.khat)] if one is not None]
    if page.linearisation is not None:
        found.append(page.linearisation.finding)
    if page.restarts is not None:
        found.append(fit_rules.agreement(page.restarts))
    if page.overlap is not None and page.shrinkage is not None:
        found += [
            prior_rules.learned(page.overlap, page.shrinkage),
            prior_rules.conflict(page.overlap, about),
        ]
    if page.prior_predictive is not None:
        found.append(prior_rules.predictive(page.prior_predictive))
    elif drawn.has_prior:
        found.append(Finding("prior predictive", "not asked", drawn.prior_refusal))
    if page.sensitivity is not None:
        limit = min(1 - 1 / np.log10(drawn.num_draws), 0.7)
        found.append(prior_rules.scaling(page.sensitivity, limit))
    failed = page.khat.overall is not None and not page.khat.overall.passed
    if page.bound is not None:
        sizes = len(fit.train), len(fit.model.label_ids)
        found.append(
            prior_rules.guessing(page.bound, *sizes, about, converged=converged, weighable=not failed)
        )
    left_out = row_rules.left_out(page.loo, about, whole_failed=failed)
    found += [prior_rules.ranks(page.spectrum), left_out]
    found.append(row_rules.transforms(page.pit, reliable=left_out.status in ("fine", "caution")))
    found.append(row_rules.counted(page.class_counts, of_training=_same_rows(fit.train, data)))
    return found


def _long_enough(fit: Fit) -> bool:
    return int(np.isfinite(fit.history["elbo"]).sum()) >= 10


def _pit(drawn: Sample) -> Pit:
    return randomised_pit(drawn.random(4), loo_probs(drawn), np.asarray(drawn.fit.train.labels), level=LEVEL)


def _class_counts(drawn: Sample, data: Batch) -> ClassCounts:
    found = predict_with_draws(
        drawn.fit.model, drawn.drawn[1], data, batch_size=drawn.batch_size, console=drawn.console
    )
    return class_counts(drawn.random(5), found.probs, np.asarray(data.labels), level=LEVEL)


def _prior_predictive(drawn: Sample, data: Batch) -> PriorPredictive:
    """Predictions of some rows by the draws of the prior, and with zero adapters, through one program."""
    with_base = jax.tree.map(_after_zeros, drawn.prior_adapters)
    rows = data[:PRIOR_ROWS]
    found = predict_with_draws(
        drawn.fit.model, with_base, rows, batch_size=drawn.batch_size, console=drawn.console
    )
    return PriorPredictive(found.draw_log_probs[1:], found.draw_log_probs[0])


def _after_zeros(draws: Array) -> Array:
    known = np.asarray(draws)
    return jax.device_put(np.concatenate([np.zeros_like(known[:1]), known]))


def _same_rows(first: Batch, second: Batch) -> bool:
    return np.array_equal(first.tokens, second.tokens)
