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

from bnlora.checks import broken_weights
from bnlora.diagnostics.bound import LEAST_STEPS, Bound, FinalBound
from bnlora.diagnostics.finding import Finding, Status
from bnlora.diagnostics.restarts import THRESHOLD, Restarts
from bnlora.diagnostics.weights import KHats
from bnlora.fits import Fit, divergence_remedy

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
        remedy = "Fit on from here with fit(start=fit.params)."
        return Finding("steps", "caution", measured, skipped, 0, remedy)
    if skipped:
        remedy = broken_weights(fit.model.base.params) or "lower the learning rate, or clip_norm"
        remedy = f"Some bounds or gradients were not finite: {remedy}."
        return Finding("steps", "caution", measured, skipped, 0, remedy)
    return Finding("steps", "fine", measured, skipped, 0)


def convergence(found: Bound) -> Finding:
    """Whether the smoothed bound has stopped changing."""
    measured = (
        f"the bound changed by {found.change:+.2f} ± {found.change_error:.2f} nats "
        f"({found.relative_change:+.2%}, tolerance {found.tolerance:.0%}) between the last two fifths of "
        f"{found.num_steps} steps, R-hat {found.rhat:.2f}; its KL by {found.kl_change:+.2f} ± "
        f"{found.kl_change_error:.2f}"
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
        remedy = (
            "The bound is falling: lower the learning rate, or let it decay."
            if falling
            else "Fit for more steps, or with higher rates that decay (of scales: scale_optimizer)."
        )
        return Finding("convergence", "problem", measured, *numbers, remedy)
    if found.verdict == "too noisy":
        remedy = (
            "The noise hides changes of this size: let the learning rate decay, use larger minibatches or "
            "more particles, or more steps."
        )
        return Finding("convergence", "caution", measured, *numbers, remedy)
    return Finding("convergence", "fine", measured, *numbers)


def last_step(found: Bound, final: FinalBound | None, fit: Fit) -> Finding:
    """Whether the parameters that are kept are as good as those of the steps before."""
    if final is None:
        return Finding(
            "last step", "not asked", "the guide has no density, so its bound has no other estimate"
        )
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


def weights(found: KHats, *, converged: bool, collapsed: bool) -> Finding:
    """Whether the draws can be reweighted to the posterior.

    Args:
        found: k-hat.
        converged: Whether the bound has.
        collapsed: Whether draws of the guide do not differ although it sets no site to a point.
    """
    if collapsed:
        measured = "some number is the same in every draw: its scale has collapsed below float32"
        remedy = "Lower the learning rate of the scales (scale_optimizer), or let it decay, and fit again."
        return Finding("k-hat", "problem", measured, remedy=remedy)
    if found.overall is None:
        remedy = "Without a density only predictions can be judged: look at held-out rows."
        return Finding("k-hat", "not asked", "the guide sets some site to a point", remedy=remedy)
    k, limit, size = found.overall.value, found.overall.threshold, found.num_dimensions["whole"]
    measured = (
        f"Pareto k-hat {k:.2f} (at most {limit:.2f} with {found.overall.num_draws} draws) in {size:,} "
        "dimensions"
    )
    if found.overall.passed:
        return Finding("k-hat", "fine", measured, k, limit)
    remedy = (
        "The guide misses part of the posterior, or has not reached its optimum: if k-hat does not fall in "
        "a longer fit with a decaying rate, give it a richer family, such as full() or "
        "low_rank(over='all'), and hold identifiable functions against bnlora.sample_nuts before its "
        "intervals are used."
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
    measured = f"{shown} given the means of the others (at most {limit:.2f})"
    if known[worst].passed:
        return Finding("k-hat by family", "fine", measured, k, limit)
    remedy = f"Begin with {worst}: give its sites a richer family in the guide."
    return Finding("k-hat by family", _severity(k), measured, k, limit, remedy)


def agreement(found: Restarts) -> Finding:
    """Whether fits from other keys agree."""
    k = found.worst
    measured = (
        f"nested R-hat {found.rhat[k]:.2f} in {found.names[k]} (at most {THRESHOLD:g}) over "
        f"{len(found.bounds)} fits with bounds {', '.join(f'{x:.1f}' for x in found.bounds)} nats"
    )
    numbers = (float(found.rhat[k]), THRESHOLD)
    if found.passed:
        return Finding("restarts", "fine", measured, *numbers)
    best = int(found.bounds.argmax())
    remedy = (
        f"The fits found different posteriors: take number {best + 1} (the highest bound), or fit longer "
        "and from better starts until they agree."
    )
    return Finding("restarts", "problem", measured, *numbers, remedy)


def _severity(k: float) -> Status:
    """Above one the weights have no mean, and no number of draws would help."""
    return "problem" if k > 1 else "caution"
