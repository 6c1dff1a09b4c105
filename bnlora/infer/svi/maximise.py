"""The loop of small fits: a fixed number of steps on all rows, as a pure function that can be compiled.

`bnlora.infer.svi.fit.fit` is the loop for real data. It uses minibatches, keeps a record and skips steps that
are not finite; this loop does none of these.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

from bnlora._util.typing import Parameters
from bnlora.infer.svi.elbo import elbo_terms
from bnlora.program.protocol import Program


def maximise(
    key: Array,
    start: dict[str, Array],
    constrain: Callable[[dict], dict],
    model: Program,
    guide: Callable,
    *args: Any,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    num_particles: int = 1,
    num_rows: int = 1,
) -> Parameters:
    """Maximise the bound from a start, and return the constrained parameters of prior and guide.

    Args:
        key: Random key of the guide's draws.
        start: Unconstrained values by name, from `elbo.initial_parameters`, like the next argument.
        constrain: Map from unconstrained to constrained values.
        model: The NumPyro model, with `prior` as an attribute.
        guide: The NumPyro guide.
        *args: Arguments of model and guide.
        optimizer: optax optimiser of the negative bound divided by `num_rows`.
        num_steps: Number of steps.
        num_particles: Guide draws averaged in a step.
        num_rows: Number that divides the bound.
    """

    def loss(params: dict, k: Array) -> Array:
        terms = elbo_terms(k, constrain(params), model, guide, *args, num_particles=num_particles)
        return -terms["elbo"] / num_rows

    def step(state: tuple, k: Array) -> tuple[tuple, None]:
        params, memory = state
        updates, memory = optimizer.update(jax.grad(loss)(params, k), memory, params)
        return (optax.apply_updates(params, updates), memory), None

    (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, num_steps))
    return constrain(params)
