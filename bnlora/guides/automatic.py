"""NumPyro's automatic guides: which ones this library can fit, and why it refuses the others.

The guides in `REFUSED` would fit without an error, but their results would be wrong. All other guides are
accepted, including those of later NumPyro versions and of users.
"""

from collections.abc import Callable
from typing import Any

from jax import Array
from numpyro import handlers
from numpyro.infer import autoguide

ANNEALS = (
    "anneals its draws towards the program from which it is built, which here is the prior without the data; "
    "use bl.sample_smc, which anneals to the posterior, or AutoMultivariateNormal"
)

REFUSED: dict[type, str] = {
    autoguide.AutoLaplaceApproximation: (
        "is a point during the fit, so all its draws would be equal; fit AutoDelta and pass the fit "
        "to bl.approximate.laplace"
    ),
    autoguide.AutoSemiDAIS: (
        "needs one latent variable for each row, and a prior over adapters has none; use "
        "AutoMultivariateNormal"
    ),
    autoguide.AutoDAIS: ANNEALS,  # also refuses its subclass AutoSurrogateLikelihoodDAIS
}
"""Automatic guides that are refused, with the reason."""


def check_automatic(guide: Any) -> None:
    """Raise `ValueError` if this library cannot fit a guide or a part of an `AutoGuideList`.

    Args:
        guide: Any guide.
    """
    for kind, reason in REFUSED.items():
        if isinstance(guide, kind):
            raise ValueError(f"{type(guide).__name__} {reason}")
    if isinstance(guide, autoguide.AutoGuideList):
        for part in guide:
            check_automatic(part)


def prepare(key: Array, guide: Callable[..., Any], *args: Any) -> None:
    """Run an automatic guide once, outside of compiled programs.

    The first call stores values such as the start. Inside a compiled program these would be tracers.

    Args:
        key: Random key of this run.
        guide: Any guide. A guide that is not automatic is left unchanged.
        *args: Arguments of the guide.

    Raises:
        ValueError: If this library cannot fit the guide.
    """
    check_automatic(guide)
    if isinstance(guide, autoguide.AutoGuide):
        handlers.seed(guide, key)(*args)
