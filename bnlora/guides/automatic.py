"""NumPyro's automatic guides: which of them can be fitted here, and why the others cannot.

The guides in `REFUSED` would fit without an error, but their results would be wrong. All other guides are
accepted, including those of later NumPyro versions and of users.
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
        "to bl.approximate.laplace"
    ),
    autoguide.AutoSemiDAIS: (
        "is made for a latent variable of every row, and a prior over adapters has none; use "
        "AutoMultivariateNormal"
    ),
    autoguide.AutoDAIS: ANNEALS,  # and with it AutoSurrogateLikelihoodDAIS, which is one
}
"""Automatic guides that are refused, with the reason."""


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
    """Run an automatic guide once outside of compiled programs.

    Its first call stores values, such as its start; inside a compiled program they would be tracers.

    Args:
        key: Random key of this run.
        guide: Any guide; nothing is done to guides that are not automatic.
        *args: Arguments of the guide.

    Raises:
        ValueError: When the guide is one that cannot be fitted here.
    """
    check_automatic(guide)
    if isinstance(guide, autoguide.AutoGuide):
        handlers.seed(guide, key)(*args)
