r"""A prior around adapters that exist already: W = W_0 + W', with W' under any prior.

The posterior then says how far new data move an imported adapter. Its start is the imported adapter itself.
"""

from typing import Any

import jax.numpy as jnp
from numpyro import handlers

from bnlora.priors.base import Prior
from bnlora.sites import Sites
from bnlora.typing import Adapters


def centered(prior: Prior, adapters: Adapters) -> Prior:
    """Another prior moved to given adapters.

    Args:
        prior: The law of the deviations; both of its factors start at zero.
        adapters: The centre, by family and factor, of the shapes that the sites have.

    Returns:
        A prior with the sites of `prior`. Run on its sites, it raises `ValueError` where `adapters` lacks a
        family or has another shape.
    """

    def at_zero(site: dict[str, Any]) -> dict[str, Any]:
        # Hyper-parameters keep their start: a scale of zero is outside its support.
        return {} if site["infer"].get("start") == "median" else {"start": "zero"}

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
        with handlers.infer_config(config_fn=at_zero):
            deviation = prior(sites)
        return {
            name: {factor: centre[name][factor] + moved_by for factor, moved_by in pair.items()}
            for name, pair in deviation.items()
        }

    return moved
