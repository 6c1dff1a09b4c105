"""The parts of a guide: variational families, which map latent sites to distributions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpyro.distributions as dist

from bnlora._util.copying import state
from bnlora.guides.latent import Latent

Build = Callable[[Sequence[Latent]], Mapping[str, dist.Distribution]]


@dataclass(frozen=True)
class Family:
    """A variational family for some latent sites.

    Attributes:
        label: Name of the family in the guide's repr.
        build: Declares the parameters and returns the law of each of its sites, on the site's support. It may
            sample auxiliary sites (`infer={"is_auxiliary": True}`); their density counts towards the bound.
        joint: Whether the sites depend on each other.
        constants: Fixed arrays of the law on which the meaning of its parameters depends. A stored fit can
            only be loaded with the same constants.
    """

    label: str
    build: Build
    joint: bool = False
    constants: Any = field(default=(), compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return state(self, "build")


def per_site(label: str, law: Callable[[Latent], dist.Distribution]) -> Family:
    """Make a family that treats each site separately.

    Args:
        label: Name of the family in the guide's repr.
        law: Maps a site to the distribution of its value, on the site's support, with its plates as batch
            axes. Use `latent.location()`, `latent.scale(start)` and `latent.parameter(...)` to declare
            parameters, and `latent.constrained(...)` to map a law of unconstrained values to the support.

    Returns:
        A family for `Guide`.
    """
    return Family(label, lambda latents: {latent.name: law(latent) for latent in latents})
