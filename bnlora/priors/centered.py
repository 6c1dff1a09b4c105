r"""A prior centred on existing adapters: W = W_0 + W', where W' has any prior.

The posterior then shows how far new data move an imported adapter. A fit starts at the imported adapter.
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
    """Start factors that are parameters (`point`, `subspace`) at zero; leave other parameters unchanged."""

    def __init__(self, sites: Sites):
        super().__init__()
        self.shapes = {
            f"{name}.{f}": shape for name, site in sites.items() for f, shape in site.shapes.items()
        }

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the start value of a factor by zeros."""
        if msg["type"] == "param" and msg["name"] in self.shapes:
            msg["fn"], msg["args"] = lambda **_: jnp.zeros(self.shapes[msg["name"]]), ()


def centered(prior: Prior, adapters: Adapters) -> Prior:
    """Centre another prior on existing adapters.

    Args:
        prior: The law of the deviations. They start at zero in both factors.
        adapters: The centre, by family and factor, with the shapes of the sites.

    Returns:
        A prior with the sites of `prior`.

    Raises:
        ValueError: If `adapters` has numbers that are NaN or infinite. The prior itself raises it if
            `adapters` lacks a family of its sites or has another shape.
    """
    for name, pair in adapters.items():
        for factor, value in pair.items():
            if not isinstance(value, jax.core.Tracer) and not np.isfinite(value).all():
                raise ValueError(f"the centre has numbers that are NaN or infinite in {factor!r} of {name!r}")

    def at_zero(site: dict[str, Any]) -> dict[str, Any]:
        # Only sites on the real line start at zero; zero is outside the support of a scale.
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
            raise ValueError(f"the adapters of the centred prior do not fit the sites: {error}") from error
        with handlers.infer_config(config_fn=at_zero), _FactorsAtZero(sites):
            deviation = prior(sites)
        return {
            name: {factor: centre[name][factor] + moved_by for factor, moved_by in pair.items()}
            for name, pair in deviation.items()
        }

    return moved
