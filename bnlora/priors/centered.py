r"""A prior around adapters that exist already: W = W_0 + W', with W' under any prior.

The posterior then says how far new data move an imported adapter. Its start is the imported adapter itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from bnlora._util.typing import Adapters
from bnlora.adapters.sites import Sites
from bnlora.priors.base import Prior


class _FactorsAtZero(Messenger):
    """Factors that are parameters (`point`, `subspace`) start at zero; other parameters where they did."""

    def __init__(self, sites: Sites):
        super().__init__()
        self.shapes = {
            f"{name}.{f}": shape for name, site in sites.items() for f, shape in site.shapes.items()
        }

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the start, unless a value is given."""
        if msg["type"] == "param" and msg["name"] in self.shapes:
            msg["fn"], msg["args"] = lambda **_: jnp.zeros(self.shapes[msg["name"]]), ()


def centered(prior: Prior, adapters: Adapters) -> Prior:
    """Another prior moved to given adapters.

    Args:
        prior: The law of the deviations, which start at zero in both factors.
        adapters: The centre, by family and factor, of the shapes that the sites have.

    Returns:
        A prior with the sites of `prior`.

    Raises:
        ValueError: When `adapters` has numbers that are NaN or infinite; when the prior runs on its sites,
            also where `adapters` lacks a family or has another shape.
    """
    for name, pair in adapters.items():
        for factor, value in pair.items():
            if not isinstance(value, jax.core.Tracer) and not np.isfinite(value).all():
                raise ValueError(
                    f"the centre has numbers that are NaN or infinite, in {factor!r} of {name!r}"
                )

    def at_zero(site: dict[str, Any]) -> dict[str, Any]:
        # Only what can be zero starts there: a scale of zero would lie outside its support.
        support = site["fn"].support
        can_be_zero = getattr(support, "base_constraint", support) is constraints.real
        return {"init": "zero"} if can_be_zero else {}

    def moved(sites: Sites) -> Adapters:
        centre = {
            name: {
                factor: jnp.asarray(adapters[name][factor])
                for factor in site.factors
                if factor in adapters[name]
            }
            for name, site in sites.items()
            if name in adapters
        }
        try:
            sites.check(centre)
        except ValueError as error:
            raise ValueError(
                f"the adapters that the prior is centred on do not fit the sites: {error}"
            ) from error
        with handlers.infer_config(config_fn=at_zero), _FactorsAtZero(sites):
            deviation = prior(sites)
        return {
            name: {factor: centre[name][factor] + moved_by for factor, moved_by in pair.items()}
            for name, pair in deviation.items()
        }

    return moved
