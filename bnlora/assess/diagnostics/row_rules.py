"""What the rows say: leave-one-out, transforms and counts of the classes, by rules.

| finding       | problem                                | caution                     |
|---------------|----------------------------------------|-----------------------------|
| leave-one-out | k-hat above 0.7 in a tenth of the rows | k-hat above 0.7 in some row |
| LOO-PIT       |                                        | p below 0.01                |
| class counts  |                                        | p below 0.01                |
"""

import numpy as np
from jaxtyping import Float

from bnlora.assess.diagnostics.classes import ClassCounts
from bnlora.assess.diagnostics.finding import Finding
from bnlora.assess.diagnostics.loo import LeaveOneOut
from bnlora.assess.diagnostics.pit import Pit
from bnlora.assess.diagnostics.subject import Subject

LEVEL = 0.01
"""P-value below which a check of the predictions raises a caution."""

MANY = 0.1

HOPELESS = 0.7
"""k-hat above which no feasible number of draws helps; below, more of them do."""


def left_out(found: LeaveOneOut | None, about: Subject, *, whole_failed: bool) -> Finding:
    """Whether leave-one-out can be believed."""
    if found is None:
        return Finding("leave-one-out", "not asked", f"{about.no_density}, so there are no weights")
    bad, size = int((~(found.pareto_k <= HOPELESS)).sum()), len(found.rows)  # so that NaN is bad
    measured = (
        f"elpd {found.elpd:.1f} ± {found.error:.1f} nats, {found.p:.1f} effective parameters; k-hat above "
        f"{HOPELESS:g} in {bad} of {size} rows, above {found.threshold:.2f} in {len(found.unreliable)}"
    )
    numbers = (bad / size, MANY)
    if not (bad or whole_failed):
        return Finding("leave-one-out", "fine", measured, *numbers)
    if whole_failed:
        remedy = (
            "The weights of the whole fit fail (k-hat), so these must: mend that first, or hold rows out."
        )
        return Finding("leave-one-out", "not asked", measured, *numbers, remedy)
    shown = ", ".join(map(str, found.unreliable[:5]))
    remedy = f"Look at the training rows {shown}, and hold them out in fits of their own."
    return Finding("leave-one-out", "problem" if bad / size > MANY else "caution", measured, *numbers, remedy)


def transforms(found: Pit | None, *, reliable: bool) -> Finding:
    """Whether the training labels are as random as leave-one-out says."""
    if found is None:
        return Finding("LOO-PIT", "not asked", "there is no leave-one-out")
    if not reliable:
        return Finding("LOO-PIT", "not asked", "leave-one-out cannot be believed here")
    where = "within" if found.inside else "outside"
    measured = (
        f"{where} the simultaneous {found.level:.0%} band, p {found.p_value:.3f} (at least {LEVEL:g}), "
        f"{len(found.values)} training rows"
    )
    if found.p_value >= LEVEL:
        return Finding("LOO-PIT", "fine", measured, found.p_value, LEVEL)
    remedy = f"The predictions do not fit the labels{_shape(found.values)}: check labels, template and words."
    return Finding("LOO-PIT", "caution", measured, found.p_value, LEVEL, remedy)


def _shape(values: Float[np.ndarray, " n"]) -> str:
    """How transforms differ from uniform ones, where their mean or spread is two standard errors off."""
    centred, root = values - 0.5, len(values) ** 0.5
    lean = centred.mean() * root * 12**0.5
    if abs(lean) > 2:
        return f", the {'last' if lean > 0 else 'first'} classes come more often than predicted"
    spread = ((centred**2).mean() - 1 / 12) * root * 180**0.5
    if abs(spread) > 2:
        return f", they are too {'sure' if spread > 0 else 'cautious'} (inference.fit_temperature helps)"
    return ""


def counted(found: ClassCounts, *, of_training: bool) -> Finding:
    """Whether the classes of the given rows come as often as predicted."""
    rows = "training rows, which flatters" if of_training else "given rows"
    c, b = found.worst
    measured = (
        f"p {found.p_value:.3f} (at least {LEVEL:g}) over {int(found.rows[0].sum())} {rows}; furthest: "
        f"class {c}, bin {b + 1} of {found.rows.shape[1]}, {found.observed[c, b]:.0f} seen, "
        f"{found.expected[c, b]:.1f} expected (band {found.low[c, b]:.1f} to {found.high[c, b]:.1f})"
    )
    if found.p_value >= LEVEL:
        return Finding("class counts", "fine", measured, found.p_value, LEVEL)
    short = np.sign(found.observed[c, b] - found.expected[c, b]) < 0
    remedy = (
        f"Class {c} comes {'less' if short else 'more'} often than predicted where its probability is in "
        "that bin: are these rows of the training rows' kind? inference.fit_temperature mends confidence "
        "alone."
    )
    return Finding("class counts", "caution", measured, found.p_value, LEVEL, remedy)
