"""A diagnostic, and an examination: what all diagnostics of one fit share, and what they have found so far.

A diagnostic is one file: it opens with its mathematics, measures, and judges what it measured by its own
rule. `page.DIAGNOSTICS` lists all of them. They share

    S draws of guide and prior                     for norms, spreads and singular values
    8 given rows under S draws of both             for margins
    training rows under T draws of the guide       for k-hat, leave-one-out, its PIT and power-scaling
    given rows under some draws of the guide       for counts of the classes
    32 given rows under some draws of the prior    for the prior predictive

and every forward pass is made once. T is chosen by `Sample.train_prediction`. The given rows are predicted
by as many draws as make the Monte Carlo error of the number of rows of each class at most a third of its
binomial standard deviation, which makes the deviation 5 % wider. The numbers of the prior predictive must be
two standard errors away from their thresholds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.finding import Finding
from bnlora._util.progress import OneBar
from bnlora._util.typing import Adapters
from bnlora.assess.diagnostics.sample import Sample
from bnlora.assess.diagnostics.subject import Subject, subject
from bnlora.assess.prior_predictive import HARDLY, MOST, NEARLY_ALL
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.prediction.functions import PROBES, Identifiable, identifiable
from bnlora.prediction.predict import Prediction
from bnlora.program.cache import cache_prefix

PRIOR_ROWS = 32
"""Rows of the prior predictive."""

SHARE = 1 / 3
"""Largest Monte Carlo error of a count, in binomial standard deviations."""

CACHE = 2**30
"""Bytes up to which the given rows keep what no draw changes."""

Need = Literal["ten steps", "density", "prior", "draws of the prior", "other fits", "tangent", "families"]


class Lack(NamedTuple):
    """Why a diagnostic does not run.

    Attributes:
        reason: In words; empty where the question is not defined, so that the page has no line for it.
        remedy: How to run it, where that is possible.
    """

    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Request:
    """Options of the diagnostics.

    Attributes:
        tolerance: Relative change of the smoothed bound that counts as none.
        families: Whether k-hat is computed for each family too, which is costly.
        leave_out: Training rows for leave-one-out; all when None.
    """

    tolerance: float = 0.01
    families: bool = False
    leave_out: int | None = None


@dataclass(frozen=True)
class Diagnostic:
    """One question about a fit.

    Attributes:
        name: Name of its finding.
        measurement: Name of what it measures, an attribute of the page. Diagnostics that share a measurement
            have the same name here; the first of them measures.
        measure: Measures.
        judge: The finding about the measurement; None where there is nothing to say.
        needs: What must be there to measure. Else the finding says "not asked" and why.
    """

    name: str
    measurement: str
    measure: Callable[["Examination"], Any]
    judge: Callable[[Any, "Examination"], Finding | None]
    needs: tuple[Need, ...] = ()


@dataclass(eq=False)
class Examination:
    """An examination of a fit.

    Attributes:
        drawn: Draws of the fit.
        data: Rows with labels.
        others: Draws of other fits of the same model.
        request: Options.
        measurements: What has been measured so far, by name; None for what could not be.
        findings: What has been found so far, by name.
    """

    drawn: Sample
    data: Batch
    others: tuple[Sample, ...] = ()
    request: Request = Request()
    measurements: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)

    def run(self, diagnostic: Diagnostic) -> None:
        """Measure and judge, and write both down."""
        lack = next((lack for need in diagnostic.needs if (lack := _LACKS[need](self)) is not None), None)
        known = self.measurements
        if lack is not None:
            known.setdefault(diagnostic.measurement, None)
            finding = Finding(diagnostic.name, "not asked", lack.reason, remedy=lack.remedy)
            if lack.reason:
                self.findings[diagnostic.name] = finding
            return
        if diagnostic.measurement not in known:
            if isinstance(self.drawn.console, OneBar):
                self.drawn.console.show(diagnostic.name)
            known[diagnostic.measurement] = diagnostic.measure(self)
        judged = diagnostic.judge(known[diagnostic.measurement], self)
        if judged is not None:
            self.findings[judged.name] = judged

    def is_fine(self, name: str) -> bool:
        """Whether there is a finding of this name and its status is "fine"."""
        return name in self.findings and self.findings[name].status == "fine"

    @property
    def weights_failed(self) -> bool:
        """Whether there are importance weights of the whole fit, and they cannot be used."""
        finding = self.findings["k-hat"]
        return finding.number is not None and finding.status != "fine"

    @property
    def fit(self) -> Fit:
        """The fit."""
        return self.drawn.fit

    @cached_property
    def about(self) -> Subject:
        """Properties of the fit that decide which remedies suit it."""
        return subject(self.drawn)

    @cached_property
    def rows(self) -> Batch:
        """The given rows, with what no draw changes unless that would take too much memory."""
        model, drawn = self.fit.model, self.drawn
        if model.cache_bytes(self.data) > CACHE:
            return self.data
        return cache_prefix(model, self.data, batch_size=drawn.batch_size, console=drawn.console)

    @cached_property
    def prediction(self) -> Prediction:
        """Predictions of the given rows by the first draws of the guide."""
        return self.drawn.predict_until(_counts_are_sharp, self.drawn.drawn[1], self.rows, "given rows")

    @cached_property
    def prior_prediction(self) -> Prediction:
        """Predictions of some given rows without adapters, the first draw, and by draws of the prior."""
        with_base = jax.tree.map(_after_zeros, self.drawn.prior_adapters)
        rows = self.rows[:PRIOR_ROWS]
        return self.drawn.predict_until(_shares_are_clear, with_base, rows, "draws of the prior")

    @cached_property
    def functions(self) -> Identifiable:
        """Margins at the first given rows and norms of the updates."""
        return identifiable(self.fit.model, self.data[:PROBES])

    @cached_property
    def posterior(self) -> dict[str, Float[np.ndarray, " s"]]:
        """Draws of the functions under the posterior."""
        return self._values(self.drawn.drawn[1])

    @cached_property
    def prior(self) -> dict[str, Float[np.ndarray, " s"]]:
        """Draws of the functions under the prior."""
        return self._values(self.drawn.prior_adapters)

    def _values(self, adapters: Adapters) -> dict[str, Float[np.ndarray, " s"]]:
        prediction = self.drawn.predict(adapters, self.rows[:PROBES], "margins")
        return self.functions.margins(prediction.draw_log_probs) | self.functions.norms(adapters)


def _counts_are_sharp(prediction: Prediction) -> bool:
    """Whether the Monte Carlo error of the expected number of rows of each class is small."""
    probs = np.exp(prediction.draw_log_probs)
    error = probs.sum(1).std(0, ddof=1) / len(probs) ** 0.5
    mean = probs.mean(0)
    return bool((error <= SHARE * np.sqrt((mean * (1 - mean)).sum(0))).all())


def _shares_are_clear(prediction: Prediction) -> bool:
    """Whether the numbers of a prior predictive are two standard errors away from their thresholds."""
    base, *draws = np.exp(prediction.draw_log_probs)
    probs = np.stack(draws)
    decided = (probs.max(-1) > NEARLY_ALL).mean(1), MOST
    moved = 0.5 * np.abs(probs - base).sum(-1).mean(1), HARDLY
    errors = 2 * len(probs) ** -0.5
    return all(abs(x.mean() - limit) >= errors * x.std(ddof=1) for x, limit in (decided, moved))


def _after_zeros(draws: Array) -> Array:
    known = np.asarray(draws)
    return jax.device_put(np.concatenate([np.zeros_like(known[:1]), known]))


def _lacks_steps(exam: Examination) -> Lack | None:
    return None if has_ten_steps(exam.fit) else Lack()


def has_ten_steps(fit: Fit) -> bool:
    """Whether the bound can be smoothed."""
    return int(np.isfinite(fit.history["elbo"]).sum()) >= 10


def _lacks_density(exam: Examination) -> Lack | None:
    return None if exam.drawn.has_density else Lack(f"{exam.about.no_density}, so there is no density")


def _lacks_prior(exam: Examination) -> Lack | None:
    return None if exam.drawn.has_prior else Lack()


def _lacks_prior_draws(exam: Examination) -> Lack | None:
    refusal = exam.drawn.prior_refusal
    return Lack(refusal) if refusal else _lacks_prior(exam)


def _lacks_fits(exam: Examination) -> Lack | None:
    remedy = "Fit again from other keys and give these fits: diagnose(..., restarts=[...])."
    return None if exam.others else Lack("not run, because no other fits were given", remedy)


def _lacks_tangent(exam: Examination) -> Lack | None:
    return None if exam.fit.model.kind == "tangent" else Lack()


def _lacks_families(exam: Examination) -> Lack | None:
    """k-hat by family; it comes after k-hat, which counts the families."""
    khat = exam.measurements["khat"]
    families = len(khat.num_dimensions) - 1
    if khat.overall is None or families < 2:
        return Lack()
    if exam.request.families:
        return None
    reason = (
        f"not run, because it predicts the {len(exam.fit.train)} training rows once more for each of "
        f"{families} families"
    )
    return Lack(reason, "Run diagnose(..., families=True) to find the family with the worst weights.")


_LACKS: dict[Need, Callable[[Examination], Lack | None]] = {
    "ten steps": _lacks_steps,
    "density": _lacks_density,
    "prior": _lacks_prior,
    "draws of the prior": _lacks_prior_draws,
    "other fits": _lacks_fits,
    "tangent": _lacks_tangent,
    "families": _lacks_families,
}
