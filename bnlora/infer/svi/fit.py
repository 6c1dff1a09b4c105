"""Fitting by stochastic variational inference: one compiled step, minibatches, honest bookkeeping.

The loop is our own because the frozen weights must be an argument of the compiled step. Every step
reports the terms of the bound. A step whose bound or gradient is not finite is skipped and counted;
when more than the budget are, the fit stops and hands over what it had.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console

from bnlora._util.checks import check_at_least, check_batch_size, check_key, check_option, check_parts
from bnlora._util.compilation import keys_from, options
from bnlora._util.typing import Parameters
from bnlora.data.batch import Batch, check_rows, minibatches
from bnlora.guides.automatic import check_automatic
from bnlora.infer.svi.elbo import TERMS, elbo_terms, initial_parameters
from bnlora.infer.svi.packing import packing
from bnlora.infer.svi.parts import InParts
from bnlora.infer.svi.plateau import Plateau
from bnlora.infer.svi.result import Fit, FitDiverged
from bnlora.infer.svi.validation import EarlyStopping, Validation
from bnlora.infer.svi.watch import Watch, iterate, step_bar
from bnlora.models.execution import Activations, Remat
from bnlora.priors.declared import declared
from bnlora.program.cache import cache_prefix

GROUPS = {"lam": (".lam",), "scale": (".scale", "_scale", "_tril")}
"""Endings of the names of parameters with an optimiser of their own; all others are locations."""


FEW_STEPS = 1000
"""Steps of a small model up to which a slower step costs less than compiling a faster one."""


class State(NamedTuple):
    """What a step carries over: unconstrained parameters (see `packing`), optimiser state, skipped steps."""

    params: dict[str, Array]
    optimizer: Any
    skipped: Array


def fit(
    key: Array,
    model: Any,
    guide: Callable,
    train: Batch,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    scale_optimizer: optax.GradientTransformation | None = None,
    clip_norm: float = 10.0,
    num_particles: int = 1,
    accumulate: int = 1,
    activations: Activations | None = None,
    remat: Remat | None = None,
    validation: Batch | None = None,
    early_stopping: EarlyStopping | None = None,
    plateau: Plateau | None = None,
    start: Parameters | None = None,
    on_step: Callable[[int, Parameters], None] | None = None,
    skip_budget: int = 10,
    prefix_cache: Literal["memory", "off"] = "memory",
    console: Console | None = None,
) -> Fit:
    """Maximise the bound over the parameters of guide and prior.

    Args:
        key: Random key of start values, minibatches and guide draws.
        model: A `Classifier`.
        guide: A NumPyro guide of `model.prior`.
        train: Rows to fit.
        optimizer: optax optimiser; it sees the gradient of the negative bound per row. One that treats every
            number alike, such as Adam, sees the parameters as a few vectors, which compiles sooner; any other
            sees them by name.
        num_steps: Number of steps.
        batch_size: Rows in a minibatch. Batches come from a stream of shuffled epochs and may
            straddle two, so that every one has this size and an unbiased scale N / B.
        scale_optimizer: Optimiser of every `lam` and every scale; Adam with rate 0.01 when omitted.
        clip_norm: The gradient of each group (locations, scales, `lam`) is clipped to this norm, separately.
        num_particles: Guide draws averaged in a step.
        accumulate: Equal parts in which a step runs its minibatch, one after the other, so that it keeps
            the activations of one part alone. The bound is the same: one draw of the guide for all parts, its
            KL terms counted once. Divides `batch_size`.
        activations: Type of the activations while a step runs, "float32" or "bfloat16"; as in the base when
            omitted. Parameters, likelihood and bound stay in float32.
        remat: What the backward pass of a step runs again instead of keeping it: "none", "elementwise",
            "attention" or "layers" (`bnlora.models.execution.Execution`); as in the base when omitted. These
            two are about steps alone: the prefix cache, looks at validation rows and predictions of the fit
            run as the model's base says (`Base.running`).
        validation: Rows whose negative log-likelihood picks the best step.
        early_stopping: How often to look at them, and when to stop.
        plateau: When to stop because the bound does not grow any more; never when omitted.
        start: Parameters to start from, constrained, such as the `params` of another fit of this model and
            guide; the start values of guide and prior when omitted.
        on_step: Called after each step with the number of steps done and the constrained parameters, those
            before the step where it was skipped.
        skip_budget: Steps that may be skipped as not finite before the fit stops.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        console: Where to draw the progress bar; the terminal or notebook when omitted, and
            `rich.console.Console(quiet=True)` for silence.

    Returns:
        The fit. With `validation`, its parameters are those of the best look. An interrupt (Ctrl-C, or the
        stop button of a notebook) ends the fit early and returns what there is.

    Raises:
        ValueError: On sizes below one, more rows in a minibatch than there are, parts that do not divide it,
            an unknown option, rows without labels or with labels that the model has no class for, an
            early-stopping rule without validation rows, a prior with a discrete latent site or a name that
            model or guide own, an automatic guide that cannot be fitted, or a `start` of other names or
            shapes than the parameters of this guide and prior, or outside their constraints.
        FitDiverged: When more than `skip_budget` steps were not finite.

    Example:
        >>> made = bl.fit(key, model, guide, rows, optax.adam(0.01), num_steps=4, batch_size=4)
        >>> made.stopped, len(made.history["elbo"])
        ('steps', 4)
    """
    key = check_key(key)
    check_at_least({"num_steps": num_steps, "num_particles": num_particles}, 1)
    check_batch_size(batch_size, len(train))
    check_parts("accumulate", accumulate, batch_size)
    check_option("prefix_cache", prefix_cache, ("memory", "off"))
    _check_rows(model, train, validation, early_stopping)
    declared(model.prior).check()  # before the work of the cache
    check_automatic(guide)
    program = _program(model, accumulate, activations=activations, remat=remat)
    if prefix_cache == "memory":
        train = cache_prefix(model, train, console=console)
        validation = None if validation is None else cache_prefix(model, validation, console=console)
    start_key, data_key, step_key, look_key, draw_key = keys_from(key, 5)
    loop, state = _prepare(
        start_key,
        program,
        guide,
        train,
        optimizer,
        scale_optimizer=scale_optimizer or optax.adam(1e-2),
        clip_norm=clip_norm,
        num_particles=num_particles,
        num_steps=num_steps,
        start=start,
    )
    rule = early_stopping or EarlyStopping()
    look = Validation(model, guide, loop.constrain, validation, rule, look_key, num_steps)
    rows = minibatches(data_key, len(train), batch_size)
    with step_bar(console, num_steps) as show:
        watch = Watch(look, plateau, skip_budget, on_step, show)
        state, stopped = iterate(step_key, loop, state, rows, watch, num_steps)
    result = loop.result(model, state, look, draw_key, stopped)
    if stopped == "diverged":
        raise FitDiverged(result, skip_budget)
    return result


def _check_rows(
    model: Any, train: Batch, validation: Batch | None, early_stopping: EarlyStopping | None
) -> None:
    check_rows("training", train, model)
    if validation is not None:
        check_rows("validation", validation, model)
    elif early_stopping is not None:
        raise ValueError("early_stopping needs validation rows; pass validation=...")


def _program(model: Any, accumulate: int, **running: Any) -> Any:
    """The model as a step runs it."""
    changes = {name: value for name, value in running.items() if value is not None}
    model = model.over(model.base.running(**changes)) if changes else model
    return model if accumulate == 1 else InParts(model, accumulate)


def _prepare(
    key: Array,
    program: Any,
    guide: Callable,
    train: Batch,
    optimizer: optax.GradientTransformation,
    *,
    scale_optimizer: optax.GradientTransformation,
    clip_norm: float = 10.0,
    num_particles: int = 1,
    num_steps: int | None = None,
    start: Parameters | None = None,
) -> "tuple[_Loop, State]":
    """The step of a fit, to be compiled when it first runs, and the state that it starts from."""
    arguments = (program.base.params, train[:1], len(train))
    values, constrain = initial_parameters(key, program, guide, *arguments, start=start)
    rules = {"location": optimizer, **dict.fromkeys(GROUPS, scale_optimizer)}
    layout = packing(values, constrain, _group, rules)
    # Every group clips its own gradient. The conditional KL drives `lam` with a gradient of the order of the
    # number of weights: clipped together with anything else, it would leave nothing of the other's gradient.
    clip = optax.clip_by_global_norm(clip_norm)
    grouped = optax.multi_transform({g: optax.chain(clip, rule) for g, rule in rules.items()}, layout.labels)

    def begin(values: dict[str, Array]) -> tuple[dict[str, Array], Any]:
        params = layout.pack(values)
        return params, grouped.init(params)

    loop = _Loop(program, guide, train, layout.constrain, grouped, num_particles, num_steps)
    # In one program: by itself, every array of another shape would be one.
    state = jax.jit(begin, compiler_options=options(0))(values)
    return loop, State(*state, jax.device_put(np.zeros((), np.int32)))


def _group(name: str) -> str:
    """The optimiser of a parameter: of locations, of scales, or of `lam`."""
    return next((g for g, endings in GROUPS.items() if name.endswith(endings)), "location")


@dataclass
class _Loop:
    """The compiled step and its record; `model` is as the step runs it."""

    model: Any
    guide: Callable
    train: Batch
    constrain: Callable[[dict], dict]
    optimizer: optax.GradientTransformation
    num_particles: int
    num_steps: int | None = None
    num_traces: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        self._step: Any = None
        self.constrained: Callable[[dict], dict] = jax.jit(
            self.constrain, compiler_options=options(self.model.numbers(()))
        )

    def step(self, batch_size: int) -> Any:
        """The jitted step for minibatches of this size, with the compiler options of a fit."""
        if self._step is None:
            often = self.num_steps is None or self.num_steps > FEW_STEPS
            numbers = None if often else self.model.numbers((batch_size, self.train.tokens.shape[1]))
            self._step = jax.jit(self._traced_step, compiler_options=options(numbers))
        return self._step

    def run(self, state: State, key: Array, rows: np.ndarray) -> State:
        """One step, recorded."""
        began = time.perf_counter()
        step = self.step(len(rows))
        state, terms = step(state, key, self.model.base.params, self.train, jnp.asarray(rows))
        record = {name: float(value) for name, value in terms.items()}
        self.steps.append(record | {"seconds": time.perf_counter() - began})
        return state

    def _traced_step(self, state: State, key: Array, frozen: Any, train: Batch, rows: Array):
        self.num_traces += 1  # runs when the step is traced, not when it is executed
        batch, n_total = train[rows], len(train)

        def loss(params):
            arguments = (frozen, batch, n_total)
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
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        return jax.tree.map(partial(jax.lax.select, finite), moved, stayed), terms

    def result(self, model: Any, state: State, look: Validation, draw_key: Array, stopped: str) -> Fit:
        last = self.constrained(state.params)
        return Fit(
            model=model,
            guide=self.guide,
            params=last if look.best_params is None else self.constrained(look.best_params),
            last_params=last,
            history={n: self._column(n) for n in TERMS},
            validation={"step": np.array(look.steps), "nll": np.array(look.losses)},
            train=self.train,
            best_step=look.best_step or len(self.steps),
            skipped_steps=int(state.skipped),
            num_traces=self.num_traces,
            step_seconds=self._column("seconds"),
            draw_key=draw_key,
            stopped=stopped,
        )

    @property
    def bound(self) -> np.ndarray:
        """The bound of every step so far."""
        return self._column("elbo")

    def _column(self, name: str) -> np.ndarray:
        return np.array([step[name] for step in self.steps])
