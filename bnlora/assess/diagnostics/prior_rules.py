"""What prior and posterior say about each other, by rules.

| finding             | problem                                | caution                                    |
|---------------------|----------------------------------------|--------------------------------------------|
| prior predictive    | the prior leaves the base as it is     | over half of draws and rows are decided,   |
|                     |                                        | and the base model is not                  |
| learned             | all overlaps of functions above 0.9    | some family's update is as under the prior |
| prior and posterior | norm of an update outside of the prior |                                            |
| power-scaling       |                                        | some margin depends on the prior           |
| against guessing    | bound 10 % below that of guessing      |                                            |
| effective rank      |                                        |                                            |
"""

import numpy as np

from bnlora.assess.diagnostics.bound import Bound
from bnlora.assess.diagnostics.finding import Finding
from bnlora.assess.diagnostics.overlap import Overlap
from bnlora.assess.diagnostics.sensitivity import THRESHOLD, Sensitivity
from bnlora.assess.diagnostics.shrinkage import UPDATE, Shrinkage
from bnlora.assess.diagnostics.spectrum import Spectrum
from bnlora.assess.diagnostics.subject import Subject
from bnlora.assess.prior_predictive import HARDLY, MOST, NEARLY_ALL, PriorPredictive

SAME = 0.9
"""Overlap of prior and posterior from which they count as one."""

AS_WIDE = 0.97
"""Ratio of posterior to prior spread from which a layer counts as unlearned."""

OUTSIDE = 0.001
"""Prior probability beyond the posterior median below which the two are in conflict."""


def predictive(found: PriorPredictive) -> Finding:
    """Whether the prior says something that the data may correct."""
    moved, decided = found.distance_from_base, found.decided
    own = float((found.base_probs.max(-1) > NEARLY_ALL).mean())
    if moved < HARDLY:
        measured = f"the prior's draws move probabilities by {moved:.4f} on average (at least {HARDLY:g})"
        remedy = "The prior is far too narrow: raise its scale, bnlora.scale_for_spread finds one."
        return Finding("prior predictive", "problem", measured, moved, HARDLY, remedy)
    measured = (
        f"{decided:.0%} of prior draws and rows put more than {NEARLY_ALL:.0%} on one class (at most "
        f"{MOST:.0%}); probabilities move by {moved:.2f} on average (at least {HARDLY:g})"
    )
    if decided > MOST and own > MOST:
        measured += f"; the base model is as sure in {own:.0%} of the rows, which no scale changes"
    if decided > MOST >= own:
        remedy = (
            "The prior believes in confident nonsense: lower its scale, bnlora.scale_for_spread finds one."
        )
        return Finding("prior predictive", "caution", measured, decided, MOST, remedy)
    return Finding("prior predictive", "fine", measured, decided, MOST)


def learned(found: Overlap, spread: Shrinkage) -> Finding:
    """Whether the posterior differs from the prior, and where it does not."""
    least, k = float(found.value.min()), int(found.value.argmin())
    cells = [c for c in spread.cells if c.factor == UPDATE and np.isfinite(c.ratio)]
    measured = (
        f"least overlap of prior and posterior {least:.2f} ± {found.error[k]:.2f}, in {found.names[k]} (at "
        f"most {SAME:g}); {spread.total_words}"
    )
    if least > SAME:
        remedy = "The data changed hardly anything: raise the prior's scale, give more rows, or adapt others."
        return Finding("learned", "problem", measured, least, SAME, remedy)
    by_family: dict[str, list[float]] = {}
    for cell in cells:
        by_family.setdefault(cell.family, []).append(cell.ratio - 2 * cell.ratio_error)
    same = {n.split("[")[-1][:-1] for n, x in zip(found.names, found.value, strict=True) if x > SAME}
    idle = [family for family, low in by_family.items() if min(low) > AS_WIDE and family in same]
    if idle:
        measured += f"; size and spread of the update as under the prior: {', '.join(idle)}"
        remedy = (
            f"A few directions of {', '.join(idle)} may count all the same: compare the evidence with and "
            "without it (bnlora.choose_scales under a core prior), or predictions of validation rows; if "
            "nothing is lost, leave it out."
        )
        return Finding("learned", "caution", measured, least, SAME, remedy)
    if cells:
        ratios = [cell.ratio for cell in cells]
        measured += f"; spread of the updates {min(ratios):.2f} to {max(ratios):.2f} of the prior's"
    return Finding("learned", "fine", measured, least, SAME)


def conflict(found: Overlap, about: Subject) -> Finding:
    """Whether the sizes of the updates are ones that the prior allows."""
    norms = [k for k, name in enumerate(found.names) if name.startswith("norm[")]
    tail = np.minimum(found.position, 1 - found.position)
    k = min(norms, key=lambda i: tail[i])
    position = float(found.position[k])
    measured = (
        f"the posterior median of {found.names[k]} is at {position:.1%} of {len(found.prior)} draws of the "
        f"prior (between {OUTSIDE:.1%} and {1 - OUTSIDE:.1%})"
    )
    if tail[k] >= OUTSIDE:
        return Finding("prior and posterior", "fine", measured, position, OUTSIDE)
    wider = position > 0.5
    remedy = (
        f"The updates are {'larger' if wider else 'smaller'} than nearly any draw of the prior: "
        f"{'raise' if wider else 'lower'} its scale"
        + ("." if about.learns_scale else ", or learn it with priors.learned(...).")
    )
    return Finding("prior and posterior", "problem", measured, position, OUTSIDE, remedy)


def scaling(found: Sensitivity, limit: float) -> Finding:
    """Whether another strength of the prior would change the answer."""
    worst = max(found.khat_prior, found.khat_likelihood)
    if worst > limit:
        measured = f"the weights of a changed power have k-hat {worst:.2f} (at most {limit:.2f})"
        return Finding("power-scaling", "not asked", measured, worst, limit, "Fit again under another scale.")
    # Norms hold what is added to all classes alike, which only the prior knows: margins are what is asked.
    margins = [
        k
        for k, name in enumerate(found.names)
        if name.startswith("margin[") and np.isfinite([found.prior[k], found.likelihood[k]]).all()
    ]
    if not margins:
        return Finding("power-scaling", "not asked", "no margin has a sensitivity: their draws do not vary")
    both, alone = (
        sum(found.names[k] in names for k in margins) for names in (found.conflicts, found.prior_alone)
    )
    k = max(margins, key=lambda i: found.prior[i])
    measured = (
        f"of {len(margins)} margins {both} depend on prior and data, {alone} on the prior alone; most on "
        f"the prior: {found.names[k]}, {found.prior[k]:.2f} (below {THRESHOLD:g}; its data "
        f"{found.likelihood[k]:.2f})"
    )
    numbers = (float(found.prior[k]), THRESHOLD)
    if not both + alone:
        return Finding("power-scaling", "fine", measured, *numbers)
    remedy = "Report how these predictions change under a wider and a narrower prior: both matter."
    return Finding("power-scaling", "caution", measured, *numbers, remedy)


def guessing(
    found: Bound, num_rows: int, num_classes: int, about: Subject, *, converged: bool, weighable: bool
) -> Finding:
    """Whether the bound is above the log-evidence of equal probabilities.

    Args:
        found: The bound.
        num_rows: Number of training rows.
        num_classes: Number of classes.
        about: What it is the bound of.
        converged: Whether it has.
        weighable: Whether k-hat finds no fault with the guide.
    """
    if about.points:
        return Finding("against guessing", "not asked", f"{about.no_density}, so there is no bound")
    guess = -num_rows * float(np.log(num_classes))
    what = "bound" if about.random else "log-likelihood"
    measured = f"{what} {found.value:.1f} nats, guessing among {num_classes} classes {guess:.1f}"
    if found.value >= 1.1 * guess:
        return Finding("against guessing", "fine", measured, found.value, guess)
    longer = [] if converged else ["fit until it converges"]
    if not about.random:
        also = " or ".join([*longer, "look for the fault in labels, template and words"])
        remedy = f"The training rows are predicted worse than by equal probabilities: {also}."
        return Finding("against guessing", "problem", measured, found.value, guess, remedy)
    if about.lam_max < 1:
        longer.append(f"widen the variational family (lam_max={about.lam_max:g} restricts it, 1 would not)")
    elif not weighable and about.richer:
        longer.append(f"give the guide a richer family, such as {' or '.join(about.richer)}")
    also = ", ".join([*longer, "mend the prior's scale"])
    remedy = f"The price of the posterior is more than what it earns: {also}, and do not compare evidences."
    return Finding("against guessing", "problem", measured, found.value, guess, remedy)


def ranks(found: Spectrum) -> Finding:
    """How much of the rank is used."""
    shares = [one.effective_rank.mean() / one.rank for one in found.layers]
    low, high = (found.layers[int(pick(shares))] for pick in (np.argmin, np.argmax))
    under_prior = low.prior_effective_rank.mean()
    beside = f" (prior {under_prior:.1f})" if np.isfinite(under_prior) else ""
    measured = (
        f"effective rank {low.effective_rank.mean():.1f} of {low.rank} in {low.family} {low.layer}{beside}"
    )
    if len(found.layers) > 1:
        measured += f" to {high.effective_rank.mean():.1f} of {high.rank} in {high.family} {high.layer}"
    return Finding("effective rank", "fine", measured, float(min(shares)))
