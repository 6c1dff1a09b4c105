r"""The compiled step of a fit, which you can call in your own loop, time, or read.

    g = grad of -bound / N at the parameters,      g <- clip(g) by group,      params <- params + optimiser(g)

The frozen weights are an argument of the compiled step, so that they are not constants of the program. A step
whose bound or gradient is not finite does not change the parameters, and counts as skipped.

Several steps run in one call of the program, a loop on the device, so that a device need not wait for the
host at every step. One program runs any number of steps up to `CHUNK`, so their number in a call changes no
bit of the result.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnlora._util.checks import check_batch_size, check_key, check_parts
from bnlora._util.compilation import SMALL, options
from bnlora._util.typing import Parameters
from bnlora.data.batch import Batch
from bnlora.infer.svi.elbo import TERMS, elbo_terms, initial_parameters, run_once
from bnlora.infer.svi.options import Memory, Optimisation
from bnlora.infer.svi.packing import packing
from bnlora.infer.svi.parts import InParts
from bnlora.infer.svi.record import Record
from bnlora.models.sharding import whole

GROUPS = {"lam": (".lam",), "scale": (".scale", "_scale", "_tril")}
"""Endings of the names of parameters with a separate optimiser; all others are locations."""


SCALE_RATE = 1e-2
"""Rate of Adam for the scales, unless `Optimisation` names another optimiser."""

CHUNK = 64
"""Most steps in one call of the compiled program."""

FEW_STEPS = {"small": 1000, "large": 60}
"""Number of steps up to which compiling a faster step costs more than it saves, by the size of the model."""


class State(NamedTuple):
    """The state of a fit: unconstrained parameters (see `packing`), optimiser state, skipped steps."""

    params: dict[str, Array]
    optimizer: Any
    skipped: Array


def svi_step(
    key: Array,
    model: Any,
    guide: Callable,
    train: Batch,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    num_particles: int = 1,
    optimisation: Optimisation = Optimisation(),  # noqa: B008 (frozen)
    memory: Memory = Memory(),  # noqa: B008
    init_params: Parameters | None = None,
) -> "tuple[Step, State]":
    """The step of `bl.fit`, and its first state.

    Args:
        key: Random key of the start values.
        model: A `Classifier`.
        guide: A NumPyro guide of `model.prior`.
        train: Rows to fit.
        optimizer: optax optimiser of the locations.
        batch_size: Rows of a step.
        num_particles: Guide draws averaged in a step.
        optimisation: As in `bl.fit`, like `memory`.
        memory: What a step keeps in memory.
        init_params: Parameters to start from.

    Returns:
        The step and its first state. Nothing is compiled yet.

    Raises:
        ValueError: If there are fewer rows than `batch_size`, or parts that do not divide it.

    Example:
        >>> step, state = bl.svi_step(key, model, guide, rows, optax.adam(0.01), batch_size=4)
        >>> state = step.run(state, key, np.arange(8).reshape(2, 4))  # two steps of four rows
        >>> len(step.bound), step.num_traces
        (2, 1)
    """
    key = check_key(key)
    check_batch_size(batch_size, len(train))
    check_parts("accumulate", memory.accumulate, batch_size)
    program = running(model, memory)
    return prepared_step(
        key,
        program,
        guide,
        train,
        optimizer,
        optimisation,
        num_particles=num_particles,
        init_params=init_params,
    )


def running(model: Any, memory: Memory) -> Any:
    """The model as a step runs it: in parts, and with the settings of `memory`."""
    execution = {"activations": memory.activations, "remat": memory.remat}
    changes = {name: value for name, value in execution.items() if value is not None}
    model = model.over(model.base.running(**changes)) if changes else model
    return model if memory.accumulate == 1 else InParts(model, memory.accumulate)


def prepared_step(
    key: Array,
    program: Any,
    guide: Callable,
    train: Batch,
    optimizer: optax.GradientTransformation,
    optimisation: Optimisation,
    *,
    num_particles: int = 1,
    num_steps: int | None = None,
    init_params: Parameters | None = None,
) -> "tuple[Step, State]":
    """The step of a fit, which is compiled when it first runs, and its first state."""
    over = program.base.mesh
    train = whole(over, train)
    arguments = (program.base.weights, train[:1], len(train))
    values, constrain = initial_parameters(key, program, guide, *arguments, init_params=init_params)
    scale_optimizer = optimisation.scale_optimizer or optax.adam(SCALE_RATE)
    rules = {"location": optimizer, **dict.fromkeys(GROUPS, scale_optimizer)}
    layout = packing(values, constrain, _group, rules)
    # Every group clips its own gradient. The conditional KL drives `lam` with a gradient of the order of the
    # number of weights: clipped together, it would leave almost nothing of the other parameters' gradient.
    clip = optax.clip_by_global_norm(optimisation.clip_norm)
    grouped = optax.multi_transform({g: optax.chain(clip, rule) for g, rule in rules.items()}, layout.labels)

    def begin(values: dict[str, Array]) -> tuple[dict[str, Array], Any]:
        params = layout.pack(values)
        return params, grouped.init(params)

    step = Step(program, guide, train, layout.constrain, grouped, num_particles, num_steps)
    # One program for all arrays; otherwise JAX would compile one for each shape.
    params, optimizer_state = run_once(begin, values)
    return step, whole(over, State(params, optimizer_state, jax.device_put(np.zeros((), np.int32))))


def _group(name: str) -> str:
    """The optimiser of a parameter: of locations, of scales, or of `lam`."""
    return next((g for g, endings in GROUPS.items() if name.endswith(endings)), "location")


@dataclass
class Step:
    """The compiled step of a fit and the record of the steps that it ran.

    Attributes:
        model: The model as the step runs it.
        guide: The guide.
        train: Rows to fit.
        constrain: From the parameters of a `State` to constrained ones by name.
        optimizer: The optimiser of all groups.
        num_particles: Guide draws averaged in a step.
        num_steps: Planned number of steps, which decides how much the compiler optimises; None for many.
        num_traces: Number of times that the step was traced.
        steps: Of each step, the terms of the bound in nats over all rows, the number of skipped steps so far,
            and its seconds, which are the mean over the steps of a call.
    """

    model: Any
    guide: Callable
    train: Batch
    constrain: Callable[[dict], dict]
    optimizer: optax.GradientTransformation
    num_particles: int
    num_steps: int | None = None
    num_traces: int = 0
    steps: Record = field(default_factory=Record)

    def __post_init__(self):
        self._compiled: Any = None
        self.constrained: Callable[[dict], dict] = jax.jit(self.constrain, compiler_options=options())

    def compiled(self, batch_size: int) -> Any:
        """The jitted `several` for minibatches of this size, with the compiler options of a fit."""
        if self._compiled is None:
            numbers = self.model.numbers((batch_size, *self.train.row_shape))
            few = FEW_STEPS["small" if numbers <= SMALL else "large"]
            rarely = self.num_steps is not None and self.num_steps <= few
            self._compiled = jax.jit(self.several, compiler_options=options(0 if rarely else 1))
        return self._compiled

    def run(self, state: State, key: Array, rows: np.ndarray) -> State:
        """The next steps, recorded.

        Args:
            state: State before them.
            key: Random key of the fit; step s, counted from zero over all calls, folds s into it.
            rows: Rows of each step, of shape (steps, batch size); at most `CHUNK` steps.

        Returns:
            The state after them.

        Raises:
            ValueError: If `rows` has another shape.
        """
        if rows.ndim != 2 or not 1 <= len(rows) <= CHUNK:
            raise ValueError(
                f"rows must have the shape (steps, batch size), with 1 to {CHUNK} steps; got {rows.shape}"
            )
        began, count = time.perf_counter(), len(rows)
        program, arguments = self.compiled(rows.shape[1]), self.arguments(state, key, rows)
        state, terms = program(*arguments)
        found = {name: values[:count] for name, values in jax.device_get(terms).items()}
        seconds = (time.perf_counter() - began) / count
        self.steps.add(found | {"seconds": np.full(count, seconds)})
        return state

    def arguments(self, state: State, key: Array, rows: np.ndarray) -> tuple[Any, ...]:
        """The arguments of `several` for the next steps, with `rows` filled up to `CHUNK` steps."""
        filled = np.zeros((CHUNK, rows.shape[1]), np.int32)
        filled[: len(rows)] = rows
        begin, count = np.int32(len(self.steps)), np.int32(len(rows))
        return state, key, self.model.base.weights, self.train, begin, count, filled

    def several(
        self, state: State, key: Array, weights: Any, train: Batch, begin: Array, count: Array, rows: Array
    ) -> tuple[State, dict[str, Array]]:
        """Some steps as a pure function: the state after them, and the terms of each.

        Args:
            state: State before them.
            key: Random key of the fit.
            weights: The frozen weights.
            train: Rows to fit.
            begin: Number of the first step.
            count: How many steps to run.
            rows: Rows of each step; those of later steps are not used.
        """

        def one(turn: Array, carry: tuple[State, dict[str, Array]]) -> tuple[State, dict[str, Array]]:
            state, record = carry
            step_key = jax.random.fold_in(key, begin + turn)
            state, terms = self.traced(state, step_key, weights, train, rows[turn])
            terms = terms | {"skipped": state.skipped}
            return state, {n: x.at[turn].set(terms[n].astype(x.dtype)) for n, x in record.items()}

        record = {name: jnp.zeros(len(rows)) for name in (*TERMS, "skipped")}
        # Whole on every device, so that each of several processes can read it.
        return whole(self.model.base.mesh, jax.lax.fori_loop(0, count, one, (state, record)))

    def traced(
        self, state: State, key: Array, weights: Any, train: Batch, rows: Array
    ) -> tuple[State, dict[str, Array]]:
        """One step as a pure function: the next state, and the terms of the bound."""
        self.num_traces += 1  # runs when the step is traced, not when it is executed
        batch, n_total = train[rows], len(train)

        def loss(params):
            arguments = (weights, batch, n_total)
            terms = elbo_terms(
                key,
                self.constrain(params),
                self.model,
                self.guide,
                *arguments,
                num_particles=self.num_particles,
            )
            return -terms["elbo"] / n_total, terms

        (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.params)
        moved = State(optax.apply_updates(state.params, updates), optimizer, state.skipped)
        stayed = state._replace(skipped=state.skipped + 1)
        norm = optax.tree.norm(gradient)
        # The norm is finite only if every entry of the gradient is.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        return jax.tree.map(partial(jax.lax.select, finite), moved, stayed), terms

    @property
    def bound(self) -> np.ndarray:
        """The bound of every step so far."""
        return self.steps.column("elbo")
