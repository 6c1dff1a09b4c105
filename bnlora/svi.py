"""Fitting by stochastic variational inference: one compiled step, minibatches, honest bookkeeping.

The loop is our own because the frozen weights must be an argument of the compiled step. Every step
reports the terms of the bound. A step whose bound or gradient is not finite is skipped and counted;
when more than the budget are, the fit stops and hands over what it had.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console

from bnlora.cache import cache_prefix
from bnlora.data import Batch, minibatches
from bnlora.elbo import TERMS, elbo_terms, initial_parameters
from bnlora.posterior import draw_adapters
from bnlora.progress import progress_bar
from bnlora.typing import Adapters, Parameters

SCALE_SUFFIXES = (".lam", ".scale", "_scale")
"""Endings of the parameter names that form the scale group, with their own optimiser."""


@dataclass(frozen=True)
class Fit:
    """A fitted guide, with the record of how it was fitted.

    Attributes:
        model: The classifier.
        guide: The guide.
        params: Fitted NumPyro parameters of prior and guide, constrained, by name.
        history: One array over steps for each term of the bound, in nats over the whole data set.
        validation: Steps and mean negative log-likelihood on the validation rows, where given.
        train: The rows that were fitted, with cached activations.
        last_params: Parameters after the last step; those of `params` unless validation rows picked others.
        best_step: Number of steps behind `params`.
        skipped_steps: Steps that were skipped because something was not finite.
        num_traces: How many times the step was traced; 1 unless something is wrong.
        step_seconds: Wall time of each step; the first contains compilation.
        draw_key: Random key of the draws that summaries of this fit use.
    """

    model: Any
    guide: Callable
    params: dict[str, Array]
    last_params: dict[str, Array]
    history: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    train: Batch
    best_step: int
    skipped_steps: int
    num_traces: int
    step_seconds: np.ndarray
    draw_key: Array

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def draw_adapters(self, key: Array, num_samples: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws."""
        return self._compiled_draw(key, self.params, num_samples)

    @cached_property
    def _compiled_draw(self) -> Callable[..., Adapters]:
        def draw(key: Array, params: Parameters, num_samples: int) -> Adapters:
            return draw_adapters(key, self.model, self.guide, params, num_samples)

        return jax.jit(draw, static_argnums=2)

    def __repr__(self) -> str:
        tail = {name: values[-min(len(values), 50) :].mean() for name, values in self.history.items()}
        terms = ", ".join(f"{name} {tail[name]:,.1f}" for name in TERMS)
        return (
            f"Fit({len(self.train)} rows, {self.num_parameters:,} parameters, "
            f"{len(self.step_seconds)} steps, {self.skipped_steps} skipped, best step {self.best_step})\n"
            f"  nats, mean of the last 50 steps: {terms}"
        )


class FitDiverged(ValueError):
    """Too many steps were not finite. `fit` holds the last finite state and the whole record."""

    def __init__(self, message: str, fit: Fit):
        super().__init__(message)
        self.fit = fit


class State(NamedTuple):
    """What a step carries over: unconstrained parameters, optimiser state, skipped steps."""

    params: dict[str, Array]
    optimizer: Any
    skipped: Array


@dataclass(frozen=True)
class EarlyStopping:
    """When to look at validation rows and when to stop; `fit` then returns the best parameters seen.

    Attributes:
        every: Steps between looks.
        patience: Looks without a better negative log-likelihood before stopping.
        num_samples: Posterior draws at each look, the same ones each time.
    """

    every: int = 50
    patience: int = 5
    num_samples: int = 8


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
    validation: Batch | None = None,
    early_stopping: EarlyStopping | None = None,
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
        optimizer: optax optimiser; it sees the gradient of the negative bound per row.
        num_steps: Number of steps.
        batch_size: Rows in a minibatch. Batches come from a stream of shuffled epochs and may
            straddle two, so that every one has this size and an unbiased scale N / B.
        scale_optimizer: Optimiser of the scale group (every `lam` and `scale`); Adam with rate 0.01
            when omitted.
        clip_norm: Each group's gradient is clipped to this global norm, separately.
        num_particles: Guide draws averaged in a step.
        validation: Rows whose negative log-likelihood picks the best step.
        early_stopping: How often to look at them, and when to stop.
        skip_budget: Steps that may be skipped as not finite before the fit stops.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        console: Where to draw the progress bar; silent when omitted.

    Returns:
        The fit. With `validation`, its parameters are those of the best look.

    Raises:
        ValueError: On sizes below one, or an early-stopping rule without validation rows.
        FitDiverged: When more than `skip_budget` steps were not finite.
    """
    _check(num_steps, batch_size, num_particles, train, prefix_cache)
    if early_stopping is not None and validation is None:
        raise ValueError("early_stopping needs validation rows; pass validation=...")
    if prefix_cache == "memory":
        train = cache_prefix(model, train, console=console)
        validation = validation and cache_prefix(model, validation, console=console)
    start_key, data_key, step_key, look_key, draw_key = jax.random.split(key, 5)
    params, constrain = initial_parameters(start_key, model, guide, model.base.params, train[:1], len(train))
    grouped = _by_group(params, optimizer, scale_optimizer or optax.adam(1e-2), clip_norm)
    loop = _Loop(model, guide, train, constrain, grouped, num_particles)
    state = State(params, grouped.init(params), jnp.zeros((), jnp.int32))
    look = _Validation(model, guide, constrain, validation, early_stopping or EarlyStopping(), look_key)
    rows = minibatches(data_key, len(train), batch_size)
    with _bar(console, num_steps) as show:
        for step in range(num_steps):
            state = loop.run(state, jax.random.fold_in(step_key, step), next(rows))
            show(loop)
            if int(state.skipped) > skip_budget:
                raise FitDiverged(
                    f"{int(state.skipped)} of {step + 1} steps gave a bound or gradient that is not finite, "
                    f"more than skip_budget={skip_budget}; lower the learning rate or the prior's scale "
                    "(the last finite state is in this error's `fit`)",
                    loop.result(state, look, draw_key),
                )
            if look.should_stop(step + 1, state.params):
                break
    return loop.result(state, look, draw_key)


def _check(num_steps: int, batch_size: int, num_particles: int, train: Batch, prefix_cache: str) -> None:
    sizes = {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "num_particles": num_particles,
        "number of rows": len(train),
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if int(train.labels.min()) < 0:
        raise ValueError("the training rows have no labels (-1); read them with `label=` naming their column")
    if prefix_cache not in ("memory", "off"):
        raise ValueError(f"prefix_cache must be 'memory' or 'off'; got {prefix_cache!r}")


def _by_group(
    params: dict[str, Array],
    optimizer: optax.GradientTransformation,
    scale_optimizer: optax.GradientTransformation,
    clip_norm: float,
) -> optax.GradientTransformation:
    """One optimiser for locations, one for scales; each clips its own gradient."""
    labels = {
        name: jax.tree.map(lambda _, n=name: "scale" if n.endswith(SCALE_SUFFIXES) else "location", value)
        for name, value in params.items()
    }
    clip = optax.clip_by_global_norm(clip_norm)
    groups = {"location": optax.chain(clip, optimizer), "scale": optax.chain(clip, scale_optimizer)}
    return optax.multi_transform(groups, labels)


@dataclass
class _Loop:
    """The compiled step and its record."""

    model: Any
    guide: Callable
    train: Batch
    constrain: Callable[[dict], dict]
    optimizer: optax.GradientTransformation
    num_particles: int
    num_traces: int = 0
    terms: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self):
        self._step = jax.jit(self._traced_step, donate_argnums=0)

    def run(self, state: State, key: Array, rows: np.ndarray) -> State:
        """One step, recorded."""
        began = time.perf_counter()
        state, terms = self._step(state, key, self.model.base.params, self.train, jnp.asarray(rows))
        self.terms.append({name: float(value) for name, value in terms.items()})
        self.seconds.append(time.perf_counter() - began)
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
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, stayed), terms

    def result(self, state: State, look: "_Validation", draw_key: Array) -> Fit:
        best = look.best_params if look.best_params is not None else state.params
        return Fit(
            model=self.model,
            guide=self.guide,
            params=self.constrain(best),
            last_params=self.constrain(state.params),
            history={n: np.array([t[n] for t in self.terms]) for n in TERMS},
            validation={"step": np.array(look.steps), "nll": np.array(look.losses)},
            train=self.train,
            best_step=look.best_step or len(self.terms),
            skipped_steps=int(state.skipped),
            num_traces=self.num_traces,
            step_seconds=np.array(self.seconds),
            draw_key=draw_key,
        )


@dataclass
class _Validation:
    """Looks at the validation rows and remembers the best parameters."""

    model: Any
    guide: Callable
    constrain: Callable[[dict], dict]
    rows: Batch | None
    rule: EarlyStopping
    key: Array
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_params: dict[str, Array] | None = None
    best_step: int = 0

    def __post_init__(self):
        self._nll = jax.jit(self._traced_nll)

    def should_stop(self, step: int, params: dict[str, Array]) -> bool:
        if self.rows is None or step % self.rule.every:
            return False
        loss = float(self._nll(params, self.model.base.params, self.rows))
        if not self.losses or loss < min(self.losses):
            self.best_params, self.best_step = jax.tree.map(jnp.copy, params), step
        self.steps.append(step)
        self.losses.append(loss)
        return (step - self.best_step) // self.rule.every >= self.rule.patience

    def _traced_nll(self, params: dict[str, Array], frozen: Any, rows: Batch) -> Array:
        draws = draw_adapters(self.key, self.model, self.guide, self.constrain(params), self.rule.num_samples)
        log_probs = self.model.log_probs_by_draw(frozen, draws, rows)
        mixture = jax.nn.logsumexp(log_probs, axis=0) - jnp.log(self.rule.num_samples)
        return -jnp.take_along_axis(mixture, rows.labels[:, None], axis=1).mean()


@contextmanager
def _bar(console: Console | None, num_steps: int) -> Iterator[Callable[[_Loop], None]]:
    with progress_bar(console, "terms") as bar:
        task = bar.add_task("fit", total=num_steps, terms="compiling")

        def show(loop: _Loop) -> None:
            t, recent = loop.terms[-1], loop.seconds[1:][-20:]
            speed = f"{1 / np.mean(recent):.2f} steps/s" if recent else "compiled"
            text = (
                f"ELBO {t['elbo']:,.0f} = data {t['data']:,.0f} - inducing KL {t['inducing_kl']:,.0f} "
                f"- conditional KL {t['conditional_kl']:,.0f} | {speed}"
            )
            bar.update(task, advance=1, terms=text)

        yield show
