"""What the record of the optimisation and the importance weights say, by rules.

| finding         | problem                                          | caution                               |
|-----------------|--------------------------------------------------|---------------------------------------|
| steps           | it diverged                                      | it was interrupted, or steps skipped  |
| convergence     | still moving, too short, or fallen from its best | too noisy to say                      |
| last step       | bound there off its recent mean by 3 se + 5 %    |                                       |
| k-hat           | above 1, or a scale below what draws resolve     | above the threshold for so many draws |
| k-hat by family | above 1 in some family                           | above the threshold in some family    |
| restarts        | nested R-hat of some function above 1.05         |                                       |
"""

import numpy as np

from bnlora._util.checks import broken_weights
from bnlora.assess.diagnostics.bound import LEAST_STEPS, Bound, FinalBound
from bnlora.assess.diagnostics.finding import Finding, Status
from bnlora.assess.diagnostics.restarts import THRESHOLD, Restarts
from bnlora.assess.diagnostics.subject import Subject
from bnlora.assess.diagnostics.weights import KHats
from bnlora.infer.svi.result import Fit, divergence_remedy

MOST_SHOWN = 100
"""Nested R-hat above which it is said to be so large; that of points which differ is decided by rounding."""

FALL = 5
"""How many times the tolerance the bound may lie below its best window, or its mean, besides noise."""


def steps(fit: Fit) -> Finding:
    """Whether the optimisation ran to its end."""
    done, skipped = len(fit.step_seconds), fit.skipped_steps
    measured = f"{done} steps, {skipped} skipped as not finite, ended by: {fit.stopped}"
    if fit.stopped == "diverged":
        remedy = f"Fit again: {divergence_remedy(fit)}."
        return Finding("steps", "problem", measured, skipped, 0, remedy)
    if fit.stopped == "interrupted":
        remedy = "Fit on from here with fit(init_params=fit.params)."
        return Finding("steps", "caution", measured, skipped, 0, remedy)
    if skipped:
        remedy = broken_weights(fit.model.base.weights) or "lower the learning rate, or clip_norm"
        remedy = f"Some bounds or gradients were not finite: {remedy}."
        return Finding("steps", "caution", measured, skipped, 0, remedy)
    return Finding("steps", "fine", measured, skipped, 0)


def convergence(found: Bound) -> Finding:
    """Whether the smoothed bound has stopped changing."""
    rhat = "" if np.isnan(found.rhat) else f", R-hat {found.rhat:.2f}"
    measured = (
        f"the bound changed by {found.change:+.2f} ± {found.change_error:.2f} nats "
        f"({found.relative_change:+.2%}, tolerance {found.tolerance:.0%}) between the last two fifths of "
        f"{found.num_steps} steps{rhat}; its KL by {found.kl_change:+.2f} ± {found.kl_change_error:.2f}"
    )
    numbers = (abs(found.relative_change), found.tolerance)
    best = int(found.terms["elbo"].argmax())
    fall = float(found.terms["elbo"][best] - found.value)
    noise = 2 * float(np.hypot(found.errors["elbo"][best], found.errors["elbo"][-1]))
    if found.verdict == "too short":
        remedy = f"Fit for at least {LEAST_STEPS} steps, better for hundreds, before anything is read off it."
        return Finding("convergence", "problem", measured, *numbers, remedy)
    if not fall <= FALL * found.allowed + noise:
        measured += f"; it is {fall:.1f} nats below its best fifth"
        remedy = "The optimiser left a better place: lower the learning rate, or let it decay."
        return Finding("convergence", "problem", measured, *numbers, remedy)
    if found.verdict == "moving":
        falling = found.change < -found.allowed - 2 * found.change_error
        of_scales = abs(found.kl_change) > found.allowed + 2 * found.kl_change_error
        remedy = (
            "The bound is falling: lower the learning rate, or let it decay."
            if falling
            else "Fit for more steps, or with a higher rate that decays"
            + (" (of scales too: scale_optimizer)." if of_scales else ".")
        )
        return Finding("convergence", "problem", measured, *numbers, remedy)
    if found.verdict == "too noisy":
        remedy = (
            "The noise hides changes of this size: let the learning rate decay, use larger minibatches or "
            "more particles, or more steps."
        )
        return Finding("convergence", "caution", measured, *numbers, remedy)
    return Finding("convergence", "fine", measured, *numbers)


def last_step(found: Bound, final: FinalBound | None, fit: Fit, about: Subject) -> Finding:
    """Whether the parameters that are kept are as good as those of the steps before."""
    if final is None:
        return Finding("last step", "not asked", f"{about.no_density}, so the bound has no other estimate")
    if fit.best_step != len(fit.step_seconds):
        return Finding("last step", "not asked", f"validation rows chose step {fit.best_step}, not the last")
    gap, error = final.value - found.value, float(np.hypot(final.error, found.errors["elbo"][-1]))
    limit = 3 * error + FALL * found.allowed
    measured = (
        f"bound {final.value:.1f} ± {final.error:.1f} nats at the fitted parameters, {gap:+.1f} against the "
        f"mean of the last fifth (at most ± {limit:.1f})"
    )
    if abs(gap) <= limit:
        return Finding("last step", "fine", measured, abs(gap), limit)
    remedy = (
        "The last parameters are a worse point on a jumping path: let the learning rate decay to zero."
        if gap < 0
        else "The bound was still rising, or its minibatches scatter widely: fit on with a decaying rate."
    )
    return Finding("last step", "problem", measured, abs(gap), limit, remedy)


def weights(found: KHats, about: Subject, *, converged: bool) -> Finding:
    """Whether the draws can be reweighted to the posterior.

    Args:
        found: k-hat.
        about: What it is the k-hat of.
        converged: Whether the bound has.
    """
    if about.collapsed:
        measured = "some number is the same in every draw: its scale has collapsed below float32"
        remedy = "Lower the learning rate of the scales (scale_optimizer), or let it decay, and fit again."
        return Finding("k-hat", "problem", measured, remedy=remedy)
    if found.overall is None:
        remedy = "Without a density only predictions can be judged: look at held-out rows."
        return Finding("k-hat", "not asked", about.no_density, remedy=remedy)
    k, limit, size = found.overall.value, found.overall.threshold, found.num_dimensions["whole"]
    measured = (
        f"Pareto k-hat {k:.2f} (at most {limit:.2f} with {found.overall.num_draws} draws) in {size:,} "
        "dimensions"
    )
    if found.overall.passed:
        return Finding("k-hat", "fine", measured, k, limit)
    such = f", such as {' or '.join(about.richer)}," if about.richer else ""
    remedy = (
        "The guide misses part of the posterior, or has not reached its optimum: if k-hat does not fall in "
        f"a longer fit with a decaying rate, give it a richer family{such} and hold identifiable functions "
        "against bnlora.sample_nuts before its intervals are used."
        if converged
        else "Mend the convergence first; what is left of it then is the guide's."
    )
    return Finding("k-hat", _severity(k), measured, k, limit, remedy)


def families(found: KHats) -> Finding | None:
    """Which family of sites is to blame; None where there is but one."""
    if len(found.families) < 2 or found.overall is None:
        return None
    known = {name: k for name, k in found.families.items() if k is not None}
    if not known:
        return Finding("k-hat by family", "not asked", "the guide ties the families together")
    shown = ", ".join(f"{name} {k.value:.2f}" for name, k in known.items())
    worst = max(known, key=lambda name: known[name].value)
    k, limit = known[worst].value, known[worst].threshold
    tied = [name for name, k in found.families.items() if k is None]
    measured = f"{shown} given the means of the others (at most {limit:.2f})"
    measured += f"; not asked of {', '.join(tied)}, which the guide ties to others" if tied else ""
    if known[worst].passed:
        return Finding("k-hat by family", "fine", measured, k, limit)
    remedy = f"Begin with {worst}: give its sites a richer family in the guide."
    return Finding("k-hat by family", _severity(k), measured, k, limit, remedy)


def agreement(found: Restarts) -> Finding:
    """Whether fits from other keys agree."""
    bounds = f"over {len(found.bounds)} fits with bounds {', '.join(f'{x:.1f}' for x in found.bounds)} nats"
    if not len(found.rhat):
        return Finding("restarts", "not asked", f"every function is the same in all draws, {bounds}")
    k = found.worst
    rhat = float(found.rhat[k])
    if np.isnan(rhat):
        measured = f"{found.names[k]} has no nested R-hat, {bounds}"
        remedy = "Its draws are not finite or do not vary: look at the fits one by one."
        return Finding("restarts", "problem", measured, rhat, THRESHOLD, remedy)
    said = f"{rhat:.2f}" if rhat < MOST_SHOWN else f"above {MOST_SHOWN}"
    measured = f"nested R-hat {said} in {found.names[k]} (at most {THRESHOLD:g}) {bounds}"
    if found.passed:
        return Finding("restarts", "fine", measured, rhat, THRESHOLD)
    remedy = (
        f"The fits found different posteriors: {_higher_bound(found)}fit longer and from better starts until "
        "they agree."
    )
    return Finding("restarts", "problem", measured, rhat, THRESHOLD, remedy)


def _higher_bound(found: Restarts) -> str:
    """Which fit to take, where its bound is above that of every other by more than the noise of both."""
    best = int(found.bounds.argmax())
    gaps = found.bounds[best] - np.delete(found.bounds, best)
    noise = 2 * np.hypot(found.bound_errors[best], np.delete(found.bound_errors, best))
    if (gaps > noise).all():
        return f"take number {best + 1}, whose bound is the highest, or "
    return "their bounds do not tell which is the better one; "


def _severity(k: float) -> Status:
    """Above one the weights have no mean, and no number of draws would help."""
    return "problem" if k > 1 else "caution"
