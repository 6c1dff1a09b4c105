"""Fitting by stochastic variational inference: minibatches through one compiled step (`step`), with a record.

Every step reports the terms of the bound. A step whose bound or gradient is not finite is skipped and
counted.
When more steps than the budget are skipped, the fit stops and returns what it has.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import optax
from jax import Array
from rich.console import Console

from bnlora._util.checks import check_at_least, check_batch_size, check_key, check_option, check_parts
from bnlora._util.compilation import keys_from
from bnlora._util.typing import Parameters
from bnlora.data.batch import Batch, check_rows, minibatches
from bnlora.guides.automatic import check_automatic
from bnlora.infer.svi.elbo import TERMS
from bnlora.infer.svi.plateau import Plateau
from bnlora.infer.svi.result import Fit, FitDiverged
from bnlora.infer.svi.step import State, Step, prepared_step, running
from bnlora.infer.svi.validation import EarlyStopping, Validation
from bnlora.infer.svi.watch import Watch, iterate, step_bar
from bnlora.models.execution import Activations, Remat
from bnlora.priors.declared import declared
from bnlora.program.cache import cache_prefix


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
    init_params: Parameters | None = None,
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
        optimizer: optax optimiser; it sees the gradient of the negative bound per row.
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
        init_params: Parameters to start from, constrained, such as the `params` of another fit of this model
            and guide; the start values of guide and prior when omitted.
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
            model or guide own, an automatic guide that cannot be fitted, or `init_params` of other names or
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
    program = running(model, accumulate=accumulate, activations=activations, remat=remat)
    if prefix_cache == "memory":
        train = cache_prefix(model, train, console=console)
        validation = None if validation is None else cache_prefix(model, validation, console=console)
    start_key, data_key, step_key, look_key, draw_key = keys_from(key, 5)
    loop, state = prepared_step(
        start_key,
        program,
        guide,
        train,
        optimizer,
        scale_optimizer=scale_optimizer or optax.adam(1e-2),
        clip_norm=clip_norm,
        num_particles=num_particles,
        num_steps=num_steps,
        init_params=init_params,
    )
    rule = early_stopping or EarlyStopping()
    look = Validation(model, guide, loop.constrain, validation, rule, look_key, num_steps)
    rows = minibatches(data_key, len(train), batch_size)
    with step_bar(console, num_steps) as show:
        watch = Watch(look, plateau, skip_budget, on_step, show)
        state, stopped = iterate(step_key, loop, state, rows, watch, num_steps)
    result = _result(model, loop, state, look, draw_key, stopped)
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


def _result(model: Any, step: Step, state: State, look: Validation, draw_key: Array, stopped: str) -> Fit:
    """The fit, with the parameters of the best look at validation rows where there are any."""
    last = step.constrained(state.params)
    return Fit(
        model=model,
        guide=step.guide,
        params=last if look.best_params is None else step.constrained(look.best_params),
        last_params=last,
        history={n: step.column(n) for n in TERMS},
        validation={"step": np.array(look.steps), "nll": np.array(look.losses)},
        train=step.train,
        best_step=look.best_step or len(step.steps),
        skipped_steps=int(state.skipped),
        num_traces=step.num_traces,
        step_seconds=step.column("seconds"),
        draw_key=draw_key,
        stopped=stopped,
    )
