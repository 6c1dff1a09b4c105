"""A diagnostic, and an examination: the results that all diagnostics of one fit share.

A diagnostic is one module: it states its formulas, computes a measurement, and derives a finding by its rule.
`page.DIAGNOSTICS` lists all of them. They share

    S draws of guide and prior                     for norms, spreads and singular values
    8 given rows under S draws of both             for margins
    training rows under T draws of the guide       for k-hat, leave-one-out, its PIT and power-scaling
    given rows under some draws of the guide       for counts of the classes
    32 given rows under some draws of the prior    for the prior predictive

and every forward pass is computed once. `Sample.train_prediction` chooses T. The number of draws for the
given rows is such that the Monte Carlo error of the number of rows of each class is at most a third of its
binomial standard deviation, which increases this deviation by 5 %. The number of draws of the prior is such
that the shares of the prior predictive are two standard errors away from their thresholds.
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
"""Largest cache, in bytes, of the part of the given rows that no draw changes."""

Need = Literal["ten steps", "density", "prior", "draws of the prior", "other fits", "tangent", "families"]


class Lack(NamedTuple):
    """Reason why a diagnostic does not run.

    Attributes:
        reason: In words; empty if the diagnostic is not defined for the fit, so that the page omits it.
        remedy: How to run it, if that is possible.
    """

    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Request:
    """Options of the diagnostics.

    Attributes:
        tolerance: Relative change of the smoothed bound that counts as none.
        families: Whether k-hat is also computed for each family, which is expensive.
        leave_out: Number of training rows for leave-one-out; all if None.
    """

    tolerance: float = 0.01
    families: bool = False
    leave_out: int | None = None


@dataclass(frozen=True)
class Diagnostic:
    """One question about a fit.

    Attributes:
        name: Name of its finding.
        measurement: Name of its measurement, an attribute of the page. Diagnostics that share a measurement
            have the same name here; the first of them computes it.
        measure: Computes the measurement.
        judge: Derives the finding from the measurement; None if there is no finding.
        needs: Requirements. If one is not met, the status is "not asked" and the sentence is the reason.
    """

    name: str
    measurement: str
    measure: Callable[["Examination"], Any]
    judge: Callable[[Any, "Examination"], Finding | None]
    needs: tuple[Need, ...] = ()


@dataclass(eq=False)
class Examination:
    """Shared results of the diagnostics of one fit.

    Attributes:
        drawn: Draws of the fit.
        data: Rows with labels.
        others: Draws of other fits of the same model.
        request: Options.
        measurements: Measurements so far, by name; None if not computed.
        findings: Findings so far, by name.
    """

    drawn: Sample
    data: Batch
    others: tuple[Sample, ...] = ()
    request: Request = Request()
    measurements: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)

    def run(self, diagnostic: Diagnostic) -> None:
        """Run a diagnostic; record its measurement and its finding."""
        lack = next((lack for need in diagnostic.needs if (lack := _LACKS[need](self)) is not None), None)
        measurements = self.measurements
        if lack is not None:
            measurements.setdefault(diagnostic.measurement, None)
            if lack.reason:
                reason, remedy = lack
                self.findings[diagnostic.name] = Finding(diagnostic.name, "not asked", reason, remedy=remedy)
            return
        if diagnostic.measurement not in measurements:
            if isinstance(self.drawn.console, OneBar):
                self.drawn.console.show(diagnostic.name)
            measurements[diagnostic.measurement] = diagnostic.measure(self)
        finding = diagnostic.judge(measurements[diagnostic.measurement], self)
        if finding is not None:
            self.findings[finding.name] = finding

    def is_fine(self, name: str) -> bool:
        """Whether there is a finding of this name and its status is "fine"."""
        return name in self.findings and self.findings[name].status == "fine"

    @property
    def weights_failed(self) -> bool:
        """Whether there are importance weights of the whole fit and they cannot be used."""
        finding = self.findings["k-hat"]
        return finding.number is not None and finding.status != "fine"

    @property
    def fit(self) -> Fit:
        """The fit."""
        return self.drawn.fit

    @cached_property
    def about(self) -> Subject:
        """Properties of the fit that decide which remedies apply."""
        return subject(self.drawn)

    @cached_property
    def rows(self) -> Batch:
        """The given rows; with a cache of the part that no draw changes, unless it is larger than `CACHE`."""
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
        """Predictions of some given rows by draws of the prior; the first draw is without adapters."""
        with_base = jax.tree.map(_after_zeros, self.drawn.prior_adapters)
        rows = self.rows[:PRIOR_ROWS]
        return self.drawn.predict_until(_shares_are_clear, with_base, rows, "draws of the prior")

    @cached_property
    def functions(self) -> Identifiable:
        """Functions: margins at the first given rows and norms of the updates."""
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
    # Standard error over draws of the expected count of each class, against its binomial deviation.
    error = probs.sum(1).std(0, ddof=1) / len(probs) ** 0.5
    mean = probs.mean(0)
    return bool((error <= SHARE * np.sqrt((mean * (1 - mean)).sum(0))).all())


def _shares_are_clear(prediction: Prediction) -> bool:
    """Whether both shares of a prior predictive are two standard errors away from their thresholds."""
    base, *draws = np.exp(prediction.draw_log_probs)
    probs = np.stack(draws)
    decided = (probs.max(-1) > NEARLY_ALL).mean(1), MOST
    moved = 0.5 * np.abs(probs - base).sum(-1).mean(1), HARDLY
    errors = 2 * len(probs) ** -0.5
    return all(abs(x.mean() - limit) >= errors * x.std(ddof=1) for x, limit in (decided, moved))


def _after_zeros(draws: Array) -> Array:
    """The draws after one of zeros, which is the base model."""
    values = np.asarray(draws)
    return jax.device_put(np.concatenate([np.zeros_like(values[:1]), values]))


def _lacks_steps(exam: Examination) -> Lack | None:
    return None if has_ten_steps(exam.fit) else Lack()


def has_ten_steps(fit: Fit) -> bool:
    """Whether there are ten finite steps, so that the bound can be smoothed."""
    return int(np.isfinite(fit.history["elbo"]).sum()) >= 10


def _lacks_density(exam: Examination) -> Lack | None:
    return None if exam.drawn.has_density else Lack(f"{exam.about.no_density}, so there is no density")


def _lacks_prior(exam: Examination) -> Lack | None:
    return None if exam.drawn.has_prior else Lack()


def _lacks_prior_draws(exam: Examination) -> Lack | None:
    refusal = exam.drawn.prior_refusal
    return Lack(refusal) if refusal else _lacks_prior(exam)


def _lacks_fits(exam: Examination) -> Lack | None:
    remedy = "Fit again from other keys and pass these fits: diagnose(..., restarts=[...])."
    return None if exam.others else Lack("not run, because there are no other fits", remedy)


def _lacks_tangent(exam: Examination) -> Lack | None:
    return None if exam.fit.model.kind == "tangent" else Lack()


def _lacks_families(exam: Examination) -> Lack | None:
    """Requirement of k-hat by family, which runs after k-hat: that measurement lists the families."""
    khat = exam.measurements["khat"]
    families = len(khat.num_dimensions) - 1
    if khat.overall is None or families < 2:
        return Lack()
    if exam.request.families:
        return None
    reason = (
        f"not run, because it predicts the {len(exam.fit.train)} training rows again for each of "
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
