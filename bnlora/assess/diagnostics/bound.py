r"""Has the bound converged? Its terms over the steps, averaged over windows, and two tests of the end.

    m_k = mean of the bound over window k,    change = m_K - m_{K-1},    se = (se_K^2 + se_{K-1}^2)^(1/2)

with K = 5 windows of equal length, in nats. The verdict is

- *moving* if |change| > tolerance * max(|m_K|, 1) + 2 se, for the bound or for its KL term: further steps
  would change the bound by more than its noise. The KL term in closed form has hardly any noise, and detects
  a scale that still grows although the bound looks flat;
- *too noisy* if 2 se is above ten times that tolerance and above one nat, so that a change of this size would
  not be detected;
- *too short* with fewer than `LEAST_STEPS` steps.

R-hat of the last two windows, taken as chains, measures the change in units of the noise of a step. Steps
that were not finite are left out.

| finding          | problem                                          | caution          |
|------------------|--------------------------------------------------|------------------|
| convergence      | still moving, too short, or fallen from its best | too noisy        |
| last step        | bound there off its recent mean by 3 se + 5 %    |                  |
| against guessing | bound 10 % below that of equal probabilities     |                  |

`final_bound` is the bound at the fitted parameters, from new draws and all rows. If it is far below the mean
of the last window, the path fluctuates strongly and ended at a bad point.

A path that moves very slowly, or fluctuates without a trend, looks converged here. A learning rate that is
far too low or too high may be visible only in the importance weights (`weights`), or in fits from other keys
(`restarts`).

References: Dhaka, Catalina, Andersen, Magnusson, Huggins and Vehtari (2020), Robust, accurate stochastic
optimization for variational inference, arXiv 2009.00666; Yao et al. (2018), arXiv 1802.02538, for the
relative change of the bound.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import check_positive
from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic, Examination, has_ten_steps
from bnlora.assess.diagnostics.sample import Sample
from bnlora.assess.diagnostics.subject import Subject
from bnlora.infer.svi.elbo import TERMS
from bnlora.infer.svi.result import Fit
from bnlora.metrics.monte_carlo import rank_rhat

WINDOWS = 5
KL_TERMS = ("inducing_kl", "conditional_kl")
LEAST_STEPS = 50
NOISE = 10

FALL = 5
"""Allowed distance below the best window, or from the mean, in multiples of the tolerance, besides noise."""

Verdict = Literal["converged", "moving", "too noisy", "too short"]


@dataclass(frozen=True, repr=False)
class Bound(Shown):
    """The bound over the steps of a fit, in nats over all training rows.

    Attributes:
        terms: Mean of every term in each window, oldest first.
        errors: Standard error of each mean, from the spread of the steps within the window.
        last_step: Last step of each window.
        num_steps: Number of finite steps.
        tolerance: Relative change of the smoothed bound that counts as none.
        rhat: R-hat of the last two windows as chains; NaN with fewer than four steps in each, or if the
            bound is constant.
    """

    terms: dict[str, Float[np.ndarray, " window"]]
    errors: dict[str, Float[np.ndarray, " window"]]
    last_step: np.ndarray
    num_steps: int
    tolerance: float
    rhat: float

    @property
    def value(self) -> float:
        """Mean of the bound over the last window."""
        return float(self.terms["elbo"][-1])

    @property
    def change(self) -> float:
        """Mean of the last window minus mean of the one before, in nats."""
        return float(np.diff(self.terms["elbo"][-2:])[0])

    @property
    def change_error(self) -> float:
        """Standard error of `change`."""
        return float(np.linalg.norm(self.errors["elbo"][-2:]))

    @property
    def kl_change(self) -> float:
        """Sum of the KL terms in the last window minus that in the one before, in nats."""
        return float(np.diff(self._kl[-2:])[0])

    @property
    def kl_change_error(self) -> float:
        """Upper bound on the standard error of `kl_change`: both terms are taken as perfectly correlated."""
        return float(np.linalg.norm(sum(self.errors[name][-2:] for name in KL_TERMS)))

    @property
    def _kl(self) -> np.ndarray:
        return np.sum([self.terms[name] for name in KL_TERMS], axis=0)

    @property
    def relative_change(self) -> float:
        """`change` divided by the absolute bound, or by one nat if the bound is smaller."""
        return self.change / max(abs(self.value), 1.0)

    @property
    def allowed(self) -> float:
        """Largest change in nats that counts as none."""
        return self.tolerance * max(abs(self.value), 1.0)

    @property
    def verdict(self) -> Verdict:
        """Verdict by the rules at the top of this module."""
        if self.num_steps < LEAST_STEPS:
            return "too short"
        moves = (self.change, self.change_error), (self.kl_change, self.kl_change_error)
        # Written so that NaN counts as moving.
        if not all(abs(change) <= self.allowed + 2 * error for change, error in moves):
            return "moving"
        undetectable = 2 * self.change_error
        return "too noisy" if undetectable > max(NOISE * self.allowed, 1.0) else "converged"

    @cached_property
    def table(self) -> Any:
        """A pandas DataFrame: means of all terms by window and their errors, indexed by the last step."""
        import pandas

        columns = self.terms | {f"{name}_error": x for name, x in self.errors.items()}
        return pandas.DataFrame(columns, index=pandas.Index(self.last_step, name="last_step"))

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (f"to step {step}", *(f"{self.terms[n][k]:,.1f} ± {self.errors[n][k]:,.1f}" for n in TERMS))
            for k, step in enumerate(self.last_step)
        )
        title = (
            f"The bound by window: {self.verdict}, last change {self.relative_change:+.2%} "
            f"({self.change:+.2f} ± {self.change_error:.2f} nats), R-hat {self.rhat:.2f}"
        )
        return (Table(title, ("window", *TERMS), rows),)


def bound(fit: Fit | Sample, *, tolerance: float = 0.01) -> Bound:
    """Average the terms of the bound over windows and test whether it has converged.

    Args:
        fit: A fit, or a `Sample` of it; no draws are needed.
        tolerance: Relative change from one fifth of the steps to the next that counts as none.

    Raises:
        ValueError: If the tolerance is not positive, or fewer than ten steps were finite.
    """
    check_positive({"tolerance": tolerance})
    history = (fit.fit if isinstance(fit, Sample) else fit).history
    finite = np.isfinite(np.stack([history[name] for name in TERMS])).all(0)
    length = int(finite.sum()) // WINDOWS
    if length < 2:
        raise ValueError(f"expected at least {2 * WINDOWS} finite steps; got {finite.sum()}")
    # The last finite steps, as many as fill the windows; `last` has shape (2 windows, step, 1).
    used = np.flatnonzero(finite)[-WINDOWS * length :]
    windows = {n: history[n][used].astype(np.float64).reshape(WINDOWS, length) for n in TERMS}
    last = windows["elbo"][-2:, :, None]
    return Bound(
        terms={n: x.mean(1) for n, x in windows.items()},
        errors={n: x.std(1, ddof=1) / length**0.5 for n, x in windows.items()},
        last_step=used.reshape(WINDOWS, length)[:, -1] + 1,
        num_steps=int(finite.sum()),
        tolerance=tolerance,
        rhat=float(rank_rhat(last)[0]) if length >= 4 and np.ptp(last) > 0 else np.nan,
    )


@dataclass(frozen=True)
class FinalBound:
    """The bound at the fitted parameters, from draws of the fit and all training rows.

    Attributes:
        value: Mean of log p - log q in nats.
        error: Standard error of `value`.
    """

    value: float
    error: float


def final_bound(sample: Sample) -> FinalBound:
    """The bound at the fitted parameters.

    Raises:
        ValueError: If the guide has no density.
    """
    if not sample.has_density:
        raise ValueError("the bound at the fit needs a guide with a density over every latent site")
    ratio = sample.log_joint - sample.log_q
    return FinalBound(float(ratio.mean()), float(ratio.std(ddof=1)) / len(ratio) ** 0.5)


def convergence(path: Bound | None, num_steps: int) -> Finding:
    """Finding about the convergence of the bound; `path` is None with fewer than ten finite steps."""
    if path is None:
        sentence = f"{num_steps} steps, too few to smooth"
        return Finding("convergence", "problem", sentence, remedy="Fit for hundreds of steps.")
    rhat = "" if np.isnan(path.rhat) else f", R-hat {path.rhat:.2f}"
    sentence = (
        f"the bound changed by {path.change:+.2f} ± {path.change_error:.2f} nats "
        f"({path.relative_change:+.2%}, tolerance {path.tolerance:.0%}) between the last two fifths of "
        f"{path.num_steps} steps{rhat}; its KL by {path.kl_change:+.2f} ± {path.kl_change_error:.2f}"
    )
    numbers = (abs(path.relative_change), path.tolerance)
    best = int(path.terms["elbo"].argmax())
    fall = float(path.terms["elbo"][best] - path.value)
    noise = 2 * float(np.hypot(path.errors["elbo"][best], path.errors["elbo"][-1]))
    if path.verdict == "too short":
        remedy = f"Fit for at least {LEAST_STEPS} steps, better for hundreds, before you use the results."
        return Finding("convergence", "problem", sentence, *numbers, remedy)
    if not fall <= FALL * path.allowed + noise:  # written so that NaN is a problem
        sentence += f"; it is {fall:.1f} nats below its best fifth"
        remedy = "The optimiser left a better optimum: lower the learning rate, or let it decay."
        return Finding("convergence", "problem", sentence, *numbers, remedy)
    if path.verdict == "moving":
        falling = path.change < -path.allowed - 2 * path.change_error
        of_scales = abs(path.kl_change) > path.allowed + 2 * path.kl_change_error
        remedy = (
            "The bound is falling: lower the learning rate, or let it decay."
            if falling
            else "Fit for more steps, or with a higher rate that decays"
            + (" (of scales too: scale_optimizer)." if of_scales else ".")
        )
        return Finding("convergence", "problem", sentence, *numbers, remedy)
    if path.verdict == "too noisy":
        remedy = (
            "Changes of this size cannot be detected in the noise: let the learning rate decay, or use "
            "larger minibatches, more particles or more steps."
        )
        return Finding("convergence", "caution", sentence, *numbers, remedy)
    return Finding("convergence", "fine", sentence, *numbers)


def last_step(path: Bound, final: FinalBound, fit: Fit) -> Finding:
    """Finding about the last parameters: whether they are as good as those of the preceding steps."""
    if fit.best_step != len(fit.step_seconds):
        return Finding("last step", "not asked", f"validation rows chose step {fit.best_step}, not the last")
    gap, error = final.value - path.value, float(np.hypot(final.error, path.errors["elbo"][-1]))
    limit = 3 * error + FALL * path.allowed
    sentence = (
        f"bound {final.value:.1f} ± {final.error:.1f} nats at the fitted parameters, {gap:+.1f} relative to "
        f"the mean of the last fifth (at most ± {limit:.1f})"
    )
    if abs(gap) <= limit:
        return Finding("last step", "fine", sentence, abs(gap), limit)
    remedy = (
        "The path fluctuates and its last point is a worse one: let the learning rate decay to zero."
        if gap < 0
        else "The bound was still rising, or minibatches vary widely: continue with a decaying rate."
    )
    return Finding("last step", "problem", sentence, abs(gap), limit, remedy)


def guessing(
    path: Bound, num_rows: int, num_classes: int, about: Subject, *, converged: bool, weighable: bool
) -> Finding:
    """Finding about the bound against the log-evidence of equal probabilities, -n log(C) nats.

    Args:
        path: The bound.
        num_rows: Number of training rows n.
        num_classes: Number of classes C.
        about: Properties of the fit.
        converged: Whether the bound has converged.
        weighable: Whether the importance weights of the guide can be used.
    """
    if about.points:
        return Finding("against guessing", "not asked", f"{about.no_density}, so there is no bound")
    guess = -num_rows * float(np.log(num_classes))
    what = "bound" if about.random else "log-likelihood"
    sentence = f"{what} {path.value:.1f} nats, guessing among {num_classes} classes {guess:.1f}"
    if path.value >= 1.1 * guess:
        return Finding("against guessing", "fine", sentence, path.value, guess)
    longer = [] if converged else ["fit until it converges"]
    if not about.random:
        also = " or ".join([*longer, "check labels, template and label words"])
        remedy = f"The training rows are predicted worse than by equal probabilities: {also}."
        return Finding("against guessing", "problem", sentence, path.value, guess, remedy)
    if about.lam_max < 1:
        longer.append(f"widen the variational family (lam_max={about.lam_max:g} restricts it, 1 would not)")
    elif not weighable and about.richer:
        longer.append(f"give the guide a richer family, such as {' or '.join(about.richer)}")
    also = ", ".join([*longer, "change the prior's scale"])
    remedy = f"The KL divergence exceeds the gain in fit: {also}, and do not compare evidences."
    return Finding("against guessing", "problem", sentence, path.value, guess, remedy)


def _guessing(path: Bound, exam: Examination) -> Finding:
    rows, classes = len(exam.fit.train), exam.fit.model.num_classes
    options = {"converged": exam.is_fine("convergence"), "weighable": not exam.weights_failed}
    return guessing(path, rows, classes, exam.about, **options)


CONVERGENCE = Diagnostic(
    name="convergence",
    measurement="bound",
    measure=lambda exam: (
        bound(exam.drawn, tolerance=exam.request.tolerance) if has_ten_steps(exam.fit) else None
    ),
    judge=lambda path, exam: convergence(path, len(exam.fit.step_seconds)),
)

LAST_STEP = Diagnostic(
    name="last step",
    measurement="final_bound",
    measure=lambda exam: final_bound(exam.drawn),
    judge=lambda path, exam: last_step(exam.measurements["bound"], path, exam.fit),
    needs=("ten steps", "density"),
)

GUESSING = Diagnostic("against guessing", "bound", CONVERGENCE.measure, _guessing, needs=("ten steps",))
