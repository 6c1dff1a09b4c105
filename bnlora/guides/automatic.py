"""NumPyro's automatic guides: which of them can be fitted here, and why the others cannot.

Whatever is not refused runs as any NumPyro guide does, guides of later versions and of one's own included.
Those that are refused would be fitted without an error, and what they then say would be wrong.
"""

from collections.abc import Callable
from typing import Any

from jax import Array
from numpyro import handlers
from numpyro.infer import autoguide

ANNEALS = (
    "anneals its draws towards the program that it is built on, which here is the prior without the data; "
    "use bl.sample_smc, which anneals to the posterior, or AutoMultivariateNormal"
)

REFUSED: dict[type, str] = {
    autoguide.AutoLaplaceApproximation: (
        "is a point while it is fitted, so that its draws would all be equal; fit AutoDelta and pass the fit "
        "to bl.inference.laplace"
    ),
    autoguide.AutoSemiDAIS: (
        "is made for a latent variable of every row, and a prior over adapters has none; use "
        "AutoMultivariateNormal"
    ),
    autoguide.AutoDAIS: ANNEALS,  # and with it AutoSurrogateLikelihoodDAIS, which is one
}
"""Automatic guides that are refused, by class, and what is said of them."""


def check_automatic(guide: Any) -> None:
    """Raise `ValueError` when a guide, or a part of an `AutoGuideList`, is one that cannot be fitted here.

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
    """Let an automatic guide run once outside of compiled programs.

    It keeps what its first call computes, such as its start, and inside of one that would be tracers.

    Args:
        key: Random key of what it draws then.
        guide: Any guide; others than automatic ones are left alone.
        *args: Arguments of the guide.

    Raises:
        ValueError: When the guide is one that cannot be fitted here.
    """
    check_automatic(guide)
    if isinstance(guide, autoguide.AutoGuide):
        handlers.seed(guide, key)(*args)
