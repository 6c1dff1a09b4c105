"""Properties of a fit that remedies depend on, so that no remedy names an option that the fit lacks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jax import Array
from numpyro import handlers

from bnlora.assess.diagnostics.divergence import points_of
from bnlora.assess.diagnostics.sample import Sample
from bnlora.guides.family import Family
from bnlora.infer.svi.result import Fit

_RICHER: Mapping[str, Callable[[Family], bool]] = {
    "full()": lambda family: family.form == "full",
    "low_rank(over='all')": lambda family: family.joint,
    "spline()": lambda family: family.form == "flow",
}
"""Richer variational families, and whether a family of a guide is already as rich."""


@dataclass(frozen=True)
class Subject:
    """Properties of a fit that decide which remedies apply.

    Attributes:
        random: Whether the prior has a latent site; plain LoRA has none.
        points: Latent sites that the guide sets to a point.
        collapsed: Whether draws of the guide are equal although it sets no site to a point.
        lam_max: Upper bound of the guide's `lam`; 1, which is no restriction, if it has none.
        richer: Richer families that the guide does not use.
        learns_scale: Whether the prior's scale is fitted.
    """

    random: bool = True
    points: tuple[str, ...] = ()
    collapsed: bool = False
    lam_max: float = 1.0
    richer: tuple[str, ...] = tuple(_RICHER)
    learns_scale: bool = False

    @property
    def no_density(self) -> str:
        """Reason why there is no density over the latent sites; "" if there is one."""
        if not self.random:
            return "the prior has no latent site, so that nothing is random"
        if self.points:
            more = f" and {len(self.points) - 3} more" if len(self.points) > 3 else ""
            return f"the guide sets {', '.join(self.points[:3])}{more} to a point"
        return "some latent number is the same in every draw" if self.collapsed else ""


def subject(sample: Sample) -> Subject:
    """Properties of the fit of a sample."""
    fit, random = sample.fit, sample.has_prior
    points = points_of(fit) if random else ()
    families = [family for family, _ in getattr(fit.guide, "groups", ())]
    return Subject(
        random=random,
        points=points,
        collapsed=random and not sample.has_density and not points,
        lam_max=_lam_max(fit),
        richer=tuple(name for name, holds in _RICHER.items() if not any(map(holds, families))),
        learns_scale=any(name.endswith(".scale") and ".q." not in name for name in fit.params),
    )


def _lam_max(fit: Fit) -> float:
    """Smallest upper bound of `lam` in the guide; 1 if there is none."""
    if not any(name.endswith(".q.lam") for name in fit.params):
        return 1.0
    caps = [1.0]

    def look(key: Array) -> None:
        for name, site in handlers.trace(handlers.seed(fit.guide, key)).get_trace().items():
            if name.endswith(".q.lam"):
                caps.append(float(site["kwargs"]["constraint"].upper_bound))

    jax.eval_shape(look, jax.random.key(0))  # abstract: reads the constraints, computes nothing
    return min(caps)
