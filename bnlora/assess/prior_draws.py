"""Draws from a prior by running its program forwards, and start values of its parameters."""

from typing import Any

import jax
from jax import Array
from numpyro import handlers

from bnlora._util.checks import check_key
from bnlora._util.typing import Adapters, Parameters
from bnlora.priors.declared import require_drawable, runnable
from bnlora.program.density import check_parameters
from bnlora.program.protocol import Program


def prior_parameters(key: Array, model: Program) -> dict[str, Any]:
    """Start values of the NumPyro parameters that a prior declares, such as frames; constrained."""
    key = check_key(key)
    trace = handlers.trace(handlers.seed(runnable(model.prior), key)).get_trace()
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def draw_prior(
    key: Array, model: Program, params: Parameters, num_draws: int, *, num_together: int = 1
) -> Adapters:
    """Draw adapters from the prior, with a leading draw axis.

    Args:
        key: Random key.
        model: A `Classifier`.
        params: All parameters of the prior, from `prior_parameters` or a fit; others are ignored.
        num_draws: Number of draws.
        num_together: Draws computed at a time. Use more than one only for priors that factorise no matrix
            of random numbers.

    Raises:
        ValueError: If a parameter of the prior is missing, or a forward run does not sample from the prior:
            a law is improper, or a `numpyro.factor` or an observed site weights the draws.
    """
    key = check_key(key)
    check_parameters(model.prior, params)
    require_drawable(model.prior)

    def one(k: Array) -> Adapters:
        with handlers.block():
            return handlers.substitute(handlers.seed(model.prior, k), data=dict(params))()

    return jax.lax.map(one, jax.random.split(key, num_draws), batch_size=num_together)
