"""What is diagnosed, as far as advice depends on it: no remedy names a thing that the fit does not have."""

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
"""Families that hold more, and whether a family of a guide holds that already."""


@dataclass(frozen=True)
class Subject:
    """Properties of a fit that decide which remedies fit it.

    Attributes:
        random: Whether the prior has a latent site; plain LoRA has none.
        points: Latent sites that the guide sets to a point.
        collapsed: Whether draws of the guide do not differ although it sets no site to a point.
        lam_max: Cap on the guide's `lam`; 1, which is no restriction, where it has none.
        richer: Families that its guide does not have.
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
        """Why there is no density over the latent sites, in words; "" where there is one."""
        if not self.random:
            return "the prior has no latent site, so that nothing is random"
        if self.points:
            more = f" and {len(self.points) - 3} more" if len(self.points) > 3 else ""
            return f"the guide sets {', '.join(self.points[:3])}{more} to a point"
        return "some number is the same in every draw" if self.collapsed else ""


def subject(drawn: Sample) -> Subject:
    """The properties of the fit of a sample."""
    fit, random = drawn.fit, drawn.has_prior
    points = points_of(fit) if random else ()
    families = [family for family, _ in getattr(fit.guide, "groups", ())]
    return Subject(
        random=random,
        points=points,
        collapsed=random and not drawn.has_density and not points,
        lam_max=_lam_max(fit),
        richer=tuple(name for name, holds in _RICHER.items() if not any(map(holds, families))),
        learns_scale=any(name.endswith(".scale") and ".q." not in name for name in fit.params),
    )


def _lam_max(fit: Fit) -> float:
    if not any(name.endswith(".q.lam") for name in fit.params):
        return 1.0
    caps = [1.0]

    def look(key: Array) -> None:
        for name, site in handlers.trace(handlers.seed(fit.guide, key)).get_trace().items():
            if name.endswith(".q.lam"):
                caps.append(float(site["kwargs"]["constraint"].upper_bound))

    jax.eval_shape(look, jax.random.key(0))  # constraints alone: nothing is computed
    return min(caps)
