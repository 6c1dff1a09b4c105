r"""Pareto k-hat of the whole fit, and of each family of sites with the other sites fixed at their means.

    whole:       w_s = p(y, theta_s) / q(theta_s)
    family f:    w_s = p(y, theta_f,s, mean_-f) / q_f(theta_f,s),    theta_f,s ~ q_f

The weights of a family test q_f as an approximation to the *conditional* posterior of its sites, given the
posterior means of all others. This is well defined if the families are independent under the guide. It is not
the k-hat of the marginal posterior of the family, whose density is unknown. It shows which family causes a
large k-hat of the whole, and cannot detect a missing dependence between families. If every family passes and
the whole does not, the cause is the number of dimensions or the dependence between families. Sites without a
family, such as a global scale, form one group of hyper-parameters.

| finding         | problem                                         | caution                                |
|-----------------|-------------------------------------------------|----------------------------------------|
| k-hat           | above 1, or draws that are equal in float32     | above the threshold for the draws      |
| k-hat by family | above 1 in some family                          | above the threshold in some family     |

In high dimension k-hat of the whole is nearly always large: small errors in many dimensions multiply.

References: see `bnlora.metrics.khat`, which computes the shape.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding, Status
from bnlora.assess.diagnostics.divergence import place, tied_sites
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.sample import Sample, first_draws, sample_of
from bnlora.assess.diagnostics.subject import Subject
from bnlora.infer.svi.result import Fit
from bnlora.metrics.khat import KHat
from bnlora.metrics.khat import khat as khat_of
from bnlora.prediction.predict import log_likelihood_by_draw

HYPER = "hyper-parameters"


@dataclass(frozen=True, repr=False)
class KHats(Shown):
    """Pareto k-hat of a fit.

    Attributes:
        overall: k-hat of the whole; None if the guide has no density.
        families: k-hat of each family given the means of the others; None if the guide ties it to another.
        num_dimensions: Number of latent dimensions of the whole and of each family.
    """

    overall: KHat | None
    families: dict[str, KHat | None]
    num_dimensions: dict[str, int]

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (name, f"{self.num_dimensions[name]:,}", *_words(khat))
            for name, khat in {"whole": self.overall, **self.families}.items()
        )
        return (Table("Pareto k-hat of log p - log q", ("sites", "dimensions", "k-hat", "at most"), rows),)


def _words(khat: KHat | None) -> tuple[str, str]:
    return ("-", "-") if khat is None else (f"{khat.value:.2f}", f"{khat.threshold:.2f}")


def khat(fit: Fit | Sample, *, families: bool = True) -> KHats:
    """k-hat of the importance weights of a fit, as a whole and by family.

    Args:
        fit: A fit, or a `Sample` of it.
        families: Whether to compute k-hat of each family, which predicts all training rows again for each.
    """
    sample = sample_of(fit)
    sites = sample.drawn[0].sites
    groups = _groups(sample)
    sizes = {"whole": sum(_size(x) for x in sites.values())}
    sizes |= {f: sum(_size(sites[n]) for n in names) for f, names in groups.items()}
    if not sample.has_density:
        return KHats(None, dict.fromkeys(groups), sizes)
    whole = khat_of(sample.log_joint, sample.log_q)
    if not families or len(groups) == 1:
        return KHats(whole, dict.fromkeys(groups, whole) if families else {}, sizes)
    tied = tied_sites(sample.fit)
    return KHats(whole, {f: _family_khat(sample, names, tied) for f, names in groups.items()}, sizes)


def _groups(sample: Sample) -> dict[str, tuple[str, ...]]:
    """Latent sites by family."""
    groups: dict[str, list[str]] = {}
    for name in sample.drawn[0].sites:
        family, _ = place(sample.fit.model.sites, name)
        groups.setdefault(family or HYPER, []).append(name)
    return {family: tuple(names) for family, names in groups.items()}


def _size(draws: Any) -> int:
    return int(np.prod(np.shape(draws)[1:]))


def _family_khat(
    sample: Sample, names: tuple[str, ...], tied: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
) -> KHat | None:
    """k-hat of one family; None if the guide ties it to sites of another."""
    blocks = [(sites, parts) for sites, parts in tied if set(sites) & set(names)]
    if any(not set(sites) <= set(names) for sites, _ in blocks):
        return None
    log_q_of = sample.drawn[0].log_q_of
    log_q = sum(np.asarray(log_q_of[part], np.float64) for _, parts in blocks for part in parts)
    return khat_of(held_log_joint(sample, names), np.asarray(log_q)[: sample.num_used])


def held_log_joint(sample: Sample, names: tuple[str, ...]) -> Float[np.ndarray, " s"]:
    """Log joint density at draws of the named sites, with every other site at its posterior mean."""
    train = sample.fit.train
    sites = {n: np.asarray(x) for n, x in sample.drawn[0].sites.items()}
    # Fixed sites are repeated along the draw axis, so that one compiled program serves every family.
    values = {n: x if n in names else np.broadcast_to(x.mean(0), x.shape) for n, x in sites.items()}
    log_prior, _, adapters = sample.fit.at(first_draws(values, sample.num_used), sample.num_used)
    prediction = sample.predict(adapters, train, f"k-hat of {', '.join(names[:1])}")
    log_likelihood = log_likelihood_by_draw(sample.fit.model, prediction.draw_log_probs, train)
    return np.asarray(log_prior, np.float64) + log_likelihood.sum(1)


def judge_weights(measured: KHats, about: Subject, *, converged: bool) -> Finding:
    """Finding about k-hat: whether the draws can be reweighted to the posterior.

    Args:
        measured: k-hat.
        about: Properties of the fit.
        converged: Whether the bound has converged.
    """
    if about.collapsed:
        sentence = "some latent number is the same in every draw: its scale has collapsed below float32"
        remedy = "Lower the learning rate of the scales (scale_optimizer), or let it decay, and fit again."
        return Finding("k-hat", "problem", sentence, remedy=remedy)
    if measured.overall is None:
        remedy = "Without a density only predictions can be tested: use held-out rows."
        return Finding("k-hat", "not asked", about.no_density, remedy=remedy)
    k, limit, size = measured.overall.value, measured.overall.threshold, measured.num_dimensions["whole"]
    sentence = (
        f"Pareto k-hat {k:.2f} (at most {limit:.2f} with {measured.overall.num_draws} draws) in {size:,} "
        "dimensions"
    )
    if measured.overall.passed:
        return Finding("k-hat", "fine", sentence, k, limit)
    such = f", such as {' or '.join(about.richer)}," if about.richer else ""
    remedy = (
        "The guide misses part of the posterior, or has not reached its optimum: if k-hat does not decrease "
        f"in a longer fit with a decaying rate, give it a richer family{such} and compare identifiable "
        "functions with bnlora.sample_nuts before you use its intervals."
        if converged
        else "Fix the convergence first; k-hat then shows the error of the guide."
    )
    return Finding("k-hat", _severity(k), sentence, k, limit, remedy)


def judge_families(measured: KHats) -> Finding:
    """Finding about the families: which one has the largest k-hat."""
    known = {name: k for name, k in measured.families.items() if k is not None}
    if not known:
        return Finding("k-hat by family", "not asked", "the guide ties the families together")
    shown = ", ".join(f"{name} {k.value:.2f}" for name, k in known.items())
    worst = max(known, key=lambda name: known[name].value)
    k, limit = known[worst].value, known[worst].threshold
    tied = [name for name, k in measured.families.items() if k is None]
    sentence = f"{shown} given the means of the others (at most {limit:.2f})"
    sentence += f"; not computed for {', '.join(tied)}, which the guide ties to others" if tied else ""
    if known[worst].passed:
        return Finding("k-hat by family", "fine", sentence, k, limit)
    remedy = f"Start with {worst}: give its sites a richer family in the guide."
    return Finding("k-hat by family", _severity(k), sentence, k, limit, remedy)


def _severity(k: float) -> Status:
    """Status of a k-hat above the threshold: above one, the weights have no mean; more draws do not help."""
    return "problem" if k > 1 else "caution"


WEIGHTS = Diagnostic(
    name="k-hat",
    measurement="khat",
    measure=lambda exam: khat(exam.drawn, families=exam.request.families),
    judge=lambda measured, exam: judge_weights(measured, exam.about, converged=exam.is_fine("convergence")),
)

FAMILIES = Diagnostic(
    name="k-hat by family",
    measurement="khat",
    measure=WEIGHTS.measure,
    judge=lambda measured, _: judge_families(measured),
    needs=("families",),
)
