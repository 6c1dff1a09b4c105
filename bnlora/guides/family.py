"""What a guide is made of: families, and what they do to the sites they are given."""

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
        label: What the guide's repr calls it.
        build: Declares the parameters and returns the law of every site that it is given, over its support.
            It may sample auxiliary sites (`infer={"is_auxiliary": True}`), whose density counts towards the
            bound.
        joint: Whether it ties its sites together.
        has_density: Whether the law has a density over the sites. Without one the objective is no bound on
            the evidence, and there are no importance weights.
        form: What the law can represent, as far as advice depends on it.
        constants: Arrays that the law holds fixed and its parameters refer to; a stored fit needs the same.
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
    """The family that treats each site on its own.

    Args:
        label: What the guide's repr calls it.
        law: From a site to a distribution of its value, in its support and with its plates as batch axes. It
            declares parameters by `latent.location()`, `latent.scale(start)` and `latent.parameter(...)`, and
            carries a law of unconstrained values to the support by `latent.constrained(...)`.
        has_density: As in `Family`, like `form`.
        form: What the law can represent.

    Returns:
        A family for `Guide`.
    """

    def build(latents: Sequence[Latent]) -> Mapping[str, dist.Distribution]:
        return {latent.name: law(latent) for latent in latents}

    return Family(label, build, has_density=has_density, form=form)
