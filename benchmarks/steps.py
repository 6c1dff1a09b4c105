"""The compiled step of a fit, for the benchmarks that time or compile it."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import bnlora as bl
from bnlora._util.compilation import SMALL, options
from bnlora.infer.svi.step import State, Step

LEVELS = {"default": None, "least": options(), "none": options(SMALL)}
"""Compiler options by level of optimisation; a fit uses one of the last two."""


@dataclass
class Started:
    """A step of a fit, and its initial state.

    Attributes:
        step: The step.
        state: Initial state.
        batch_size: Rows of a step.
    """

    step: Step
    state: State
    batch_size: int

    def run(self, state: State, key: jax.Array, indices: np.ndarray) -> State:
        """Run one step on some rows, and record its bound."""
        return self.step.run(state, key, indices[None])

    @property
    def bound(self) -> float:
        """The bound of the last step, in nats over all rows."""
        return float(self.step.bound[-1])

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of a compiled step."""
        return self.step.arguments(self.state, jax.random.key(0), np.arange(self.batch_size)[None])

    def lower(self, level: str | None = None) -> jax.stages.Lowered:
        """Trace and lower the step, for a level of `LEVELS`, or with the options of a long fit if None."""
        if level is None:
            return self.step.compiled(self.batch_size).lower(*self.inputs)
        return jax.jit(self.step.several, compiler_options=LEVELS[level]).lower(*self.inputs)


def svi_step(*arguments: Any, batch_size: int, **options: Any) -> Started:
    """`bl.svi_step` and its initial state."""
    return Started(*bl.svi_step(*arguments, batch_size=batch_size, **options), batch_size)
