r"""Pareto k-hat of the whole fit, and of each family of sites with the others held at their means.

    whole:       w_s = p(y, theta_s) / q(theta_s)
    family f:    w_s = p(y, theta_f,s, mean_-f) / q_f(theta_f,s),    theta_f,s ~ q_f

The weights of a family are those of q_f as an approximation to the *conditional* posterior of its sites,
given the posterior means of all others. That is well defined where the guide makes the families
independent. It is not the k-hat of the marginal posterior of the family, whose density nobody has; it says
which family a large whole k-hat comes from, and cannot see a missing dependence between families. Where
each family passes and the whole does not, the number of dimensions or the dependence between families is to
blame. Sites that are named after no family, such as a global scale, are one of their own.

In high dimension k-hat of the whole is nearly always large: small misfits of many numbers multiply.

References: those of `bnlora.metrics.khat`, which computes the shape.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora._util.display import Shown, Table
from bnlora.assess.diagnostics.divergence import place, tied_sites
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.infer.svi.result import Fit
from bnlora.metrics.khat import KHat
from bnlora.metrics.khat import khat as khat_of
from bnlora.prediction.predict import predict_with_draws

HYPER = "hyper-parameters"


@dataclass(frozen=True, repr=False)
class KHats(Shown):
    """Pareto k-hat of a fit.

    Attributes:
        overall: Of the whole; None where the guide has no density.
        families: Of each family given the means of the others; None where the guide ties it to another.
        num_dimensions: Latent numbers of the whole and of each family.
    """

    overall: KHat | None
    families: dict[str, KHat | None]
    num_dimensions: dict[str, int]

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        rows = tuple(
            (name, f"{self.num_dimensions[name]:,}", *_words(found))
            for name, found in {"whole": self.overall, **self.families}.items()
        )
        return (Table("Pareto k-hat of log p - log q", ("sites", "dimensions", "k-hat", "at most"), rows),)


def _words(found: KHat | None) -> tuple[str, str]:
    return ("-", "-") if found is None else (f"{found.value:.2f}", f"{found.threshold:.2f}")


def khat(fit: Fit | Sample, *, families: bool = True) -> KHats:
    """k-hat of the importance weights of a fit, as a whole and by family.

    Args:
        fit: A fit, or a `Sample` of it.
        families: Whether to look at each family too, which runs all training rows once more for each.
    """
    drawn = sample_of(fit)
    sites = drawn.drawn[0].sites
    groups = _groups(drawn)
    sizes = {"whole": sum(_size(x) for x in sites.values())}
    sizes |= {f: sum(_size(sites[n]) for n in names) for f, names in groups.items()}
    if not drawn.has_density:
        return KHats(None, dict.fromkeys(groups), sizes)
    whole = khat_of(drawn.log_joint, drawn.log_q)
    if not families or len(groups) == 1:
        return KHats(whole, dict.fromkeys(groups, whole) if families else {}, sizes)
    tied = tied_sites(drawn.fit)
    return KHats(whole, {f: _family_khat(drawn, names, tied) for f, names in groups.items()}, sizes)


def _groups(drawn: Sample) -> dict[str, tuple[str, ...]]:
    """Latent sites by family."""
    groups: dict[str, list[str]] = {}
    for name in drawn.drawn[0].sites:
        family, _ = place(drawn.fit.model.sites, name)
        groups.setdefault(family or HYPER, []).append(name)
    return {family: tuple(names) for family, names in groups.items()}


def _size(draws: Any) -> int:
    return int(np.prod(np.shape(draws)[1:]))


def _family_khat(
    drawn: Sample, names: tuple[str, ...], tied: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
) -> KHat | None:
    blocks = [(sites, parts) for sites, parts in tied if set(sites) & set(names)]
    if any(not set(sites) <= set(names) for sites, _ in blocks):
        return None
    log_q_of = drawn.drawn[0].log_q_of
    log_q = sum(np.asarray(log_q_of[part], np.float64) for _, parts in blocks for part in parts)
    return khat_of(held_log_joint(drawn, names), np.asarray(log_q))


def held_log_joint(drawn: Sample, names: tuple[str, ...]) -> Float[np.ndarray, " s"]:
    """Log of the joint density at draws of the named sites, every other site at its posterior mean."""
    fit = drawn.fit
    sites = {n: np.asarray(x) for n, x in drawn.drawn[0].sites.items()}
    # Every family through one program, whichever sites are held.
    held = {n: x if n in names else np.broadcast_to(x.mean(0), x.shape) for n, x in sites.items()}
    log_prior, _, adapters = fit.at(held, drawn.num_draws)
    found = predict_with_draws(
        fit.model, adapters, fit.train, batch_size=drawn.batch_size, console=drawn.console
    )
    return np.asarray(log_prior, np.float64) + found.log_probs_of(fit.train.labels).sum(1)
