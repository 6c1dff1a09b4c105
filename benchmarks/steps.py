"""The compiled step of a fit by itself. No other benchmark uses the inside of `bnlora.fit`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnlora as bl
from bnlora._util.compilation import SMALL, options
from bnlora.infer.svi.fit import State, _Loop, _prepare, _program

LEVELS = {"default": None, "least": options(), "none": options(SMALL)}
"""Compiler options by level of optimisation; a fit chooses between the last two."""


@dataclass
class Step:
    """A step of a fit, and the state that it starts from.

    Attributes:
        loop: The library's own loop.
        state: What the first step gets.
        batch_size: Rows of a step.
    """

    loop: _Loop
    state: State
    batch_size: int

    def run(self, state: State, key: jax.Array, indices: np.ndarray) -> State:
        """One step on some rows, recorded."""
        return self.loop.run(state, key, indices)

    @property
    def bound(self) -> float:
        """The bound of the last step that was run, in nats over all rows."""
        return self.loop.steps[-1]["elbo"]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of a compiled step."""
        loop, indices = self.loop, jnp.arange(self.batch_size)
        return self.state, jax.random.key(0), loop.model.base.weights, loop.train, indices

    def lower(self, level: str | None = None) -> jax.stages.Lowered:
        """The step, traced anew and lowered, to be compiled at a level of `LEVELS` or as in a long fit."""
        if level is None:
            return self.loop.step(self.batch_size).lower(*self.inputs)
        return jax.jit(self.loop._traced_step, compiler_options=LEVELS[level]).lower(*self.inputs)


def svi_step(
    key: jax.Array,
    model: bl.Classifier,
    guide: Callable,
    rows: bl.Batch,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    num_particles: int = 1,
    accumulate: int = 1,
    init_params: dict[str, jax.Array] | None = None,
    **running: Any,
) -> Step:
    """The step of `bl.fit` with these arguments; scales have the optimiser of all else."""
    program = _program(model, accumulate, **running)
    loop, state = _prepare(
        key,
        program,
        guide,
        rows,
        optimizer,
        scale_optimizer=optimizer,
        num_particles=num_particles,
        init_params=init_params,
    )
    return Step(loop, state, batch_size)
