"""The parts of a guide: variational families, which map latent sites to distributions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpyro.distributions as dist

from bnlora._util.copying import state
from bnlora.guides.latent import Latent

Form = Literal["full", "flow", "other"]
"""A Gaussian with every covariance of its vector, a flow, or something else."""

Build = Callable[[Sequence[Latent]], Mapping[str, dist.Distribution]]


@dataclass(frozen=True)
class Family:
    """A variational family for some latent sites.

    Attributes:
        label: Name of the family in the guide's repr.
        build: Declares the parameters and returns the law of each of its sites, on the site's support. It may
            sample auxiliary sites (`infer={"is_auxiliary": True}`); their density counts towards the bound.
        joint: Whether the sites depend on each other.
        has_density: Whether the law has a density over the sites. Without one the objective is no bound on
            the evidence, and there are no importance weights.
        form: What the law can represent, as far as advice depends on it.
        constants: Fixed arrays of the law on which the meaning of its parameters depends. A stored fit can
            only be loaded with the same constants.
    """

    label: str
    build: Build
    joint: bool = False
    has_density: bool = True
    form: Form = "other"
    constants: Any = field(default=(), compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return state(self, "build")


def per_site(
    label: str,
    law: Callable[[Latent], dist.Distribution],
    *,
    has_density: bool = True,
    form: Form = "other",
) -> Family:
    """Make a family that treats each site separately.

    Args:
        label: Name of the family in the guide's repr.
        law: Maps a site to the distribution of its value, on the site's support, with its plates as batch
            axes. Use `latent.location()`, `latent.scale(start)` and `latent.parameter(...)` to declare
            parameters, and `latent.constrained(...)` to map a law of unconstrained values to the support.
        has_density: As in `Family`, like `form`.
        form: What the law can represent.

    Returns:
        A family for `Guide`.
    """

    def build(latents: Sequence[Latent]) -> Mapping[str, dist.Distribution]:
        return {latent.name: law(latent) for latent in latents}

    return Family(label, build, has_density=has_density, form=form)
