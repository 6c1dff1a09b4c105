"""Fitting by stochastic variational inference: minibatches through one compiled step (`step`), with a record.

Every step records the terms of the bound. A step whose bound or gradient is not finite is skipped and
counted. If more steps than the budget are skipped, the fit stops with an error that has the fit so far.
"""

from collections.abc import Callable
from functools import partial
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
from bnlora.infer.svi.exhausted import smaller_step
from bnlora.infer.svi.options import Memory, Optimisation
from bnlora.infer.svi.plateau import Plateau
from bnlora.infer.svi.result import Fit, FitDiverged, FitOutOfMemory
from bnlora.infer.svi.resume import Checkpoints, Kept, call_of, mark_of, require_same_call
from bnlora.infer.svi.step import State, Step, prepared_step, running
from bnlora.infer.svi.validation import EarlyStopping, Validation
from bnlora.infer.svi.watch import Watch, iterate, step_bar
from bnlora.models.hosts import guarded, leads
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
    num_particles: int = 1,
    optimisation: Optimisation = Optimisation(),  # noqa: B008 (frozen)
    memory: Memory = Memory(),  # noqa: B008
    validation: Batch | None = None,
    early_stopping: EarlyStopping | None = None,
    plateau: Plateau | None = None,
    init_params: Parameters | None = None,
    on_step: Callable[[int, Parameters], None] | None = None,
    prefix_cache: Literal["memory", "off"] = "memory",
    checkpoints: Checkpoints | None = None,
    console: Console | None = None,
) -> Fit:
    """Maximise the bound over the parameters of guide and prior.

    Args:
        key: Random key of start values, minibatches and guide draws.
        model: A `Classifier`.
        guide: A NumPyro guide of `model.prior`.
        train: Rows to fit.
        optimizer: optax optimiser of the negative bound per row. An optimiser that treats all numbers alike,
            such as Adam, gets the parameters as a few vectors, which compiles faster; any other one gets them
            by name.
        num_steps: Number of steps.
        batch_size: Rows in a minibatch. Batches are taken from a stream of shuffled epochs and may span two
            of them, so that each has this size and the scale N / B is unbiased.
        num_particles: Guide draws averaged in a step.
        optimisation: Optimiser of the scales, clipping, and how many steps may be skipped.
        memory: What a step keeps in memory: parts, type of the activations, rematerialisation.
        validation: Rows whose negative log-likelihood chooses the best step.
        early_stopping: How often to evaluate them, and when to stop.
        plateau: When to stop because the bound does not grow any more; never when omitted.
        init_params: Parameters to start from, constrained, such as the `params` of another fit of this model
            and guide; the start values of guide and prior when omitted.
        on_step: Called after each step with the number of steps done and the constrained parameters; a
            skipped step leaves these unchanged.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        checkpoints: Where to keep the state of the fit. The same call goes on from the last checkpoint, bit
            for bit.
        console: Where to draw the progress bar; the terminal or notebook when omitted. Use
            `rich.console.Console(quiet=True)` for no bar.

    Returns:
        The fit. With `validation`, its parameters are those of the best evaluation. An interrupt (Ctrl-C, or
        the stop button of a notebook) ends the fit early and returns the parameters so far.

    Raises:
        ValueError: If a size is below one, a minibatch has more rows than there are, `memory.accumulate` does
            not divide it, an option is unknown, rows have no labels or labels outside the model's classes,
            there is an early-stopping rule but no validation rows, the checkpoints are those of another fit,
            the prior has a discrete latent site or a name that model or guide own, an automatic guide cannot
            be fitted, or `init_params` differ from the parameters of guide and prior in names or shapes, or
            are outside their constraints.
        FitDiverged: If more than `optimisation.skip_budget` steps were not finite.
        FitOutOfMemory: If the device has not enough memory for a step or an evaluation.
        HostLost: If the base is on devices of several processes, and one of them ended or does not answer.

    Example:
        >>> short = bl.fit(key, model, guide, rows, optax.adam(0.01), num_steps=4, batch_size=4)
        >>> short.stopped, len(short.history["elbo"])
        ('steps', 4)
    """
    key = check_key(key)
    check_at_least({"num_steps": num_steps, "num_particles": num_particles}, 1)
    check_batch_size(batch_size, len(train))
    check_parts("accumulate", memory.accumulate, batch_size)
    check_option("prefix_cache", prefix_cache, ("memory", "off"))
    _check_rows(model, train, validation, early_stopping)
    declared(model.prior).check()  # before the cache, which takes long
    check_automatic(guide)
    program, over = running(model, memory), model.base.mesh
    console = console if leads(over) else Console(quiet=True)
    rule = early_stopping or EarlyStopping()
    rules = {"memory": memory, "early_stopping": rule, "plateau": plateau, "batch_size": batch_size}
    rules |= {"skip_budget": optimisation.skip_budget}
    rows = {"training": train, "validation": validation}
    with guarded(over):
        steps = {"num_steps": num_steps, "num_particles": num_particles, "checkpoints": bool(checkpoints)}
        require_same_call(over, partial(call_of, key, model, rows, **rules, **steps))
        if prefix_cache == "memory":
            train = cache_prefix(model, train, console=console)
            validation = validation and cache_prefix(model, validation, console=console)
    start_key, data_key, step_key, look_key, draw_key = keys_from(key, 5)
    step, state = prepared_step(
        start_key, program, guide, train, optimizer, optimisation,
        num_particles=num_particles, num_steps=num_steps, init_params=init_params,
    )  # fmt: skip
    look = Validation(model, guide, step.constrain, validation, rule, look_key, num_steps)
    stream = minibatches(data_key, len(train), batch_size)
    mark = partial(mark_of, key, step, state, rows, **rules)
    remedy = partial(smaller_step, model, guide, train, optimizer, memory, (batch_size, num_particles))
    with step_bar(console, num_steps) as show, guarded(over), Kept(checkpoints, mark, over) as kept:
        watch = Watch(look, plateau, optimisation.skip_budget, on_step, show, kept, remedy)
        ended = iterate(step_key, step, state, stream, watch, num_steps)
    result = _result(model, step, ended.state, look, draw_key, ended.stopped)
    if ended.exhausted is not None:
        raise FitOutOfMemory(result, str(ended.exhausted)) from ended.exhausted
    if ended.stopped == "diverged":
        raise FitDiverged(result, optimisation.skip_budget)
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
    """The fit, with the parameters of the best evaluation on validation rows if there are any."""
    last = step.constrained(state.params)
    return Fit(
        model=model,
        guide=step.guide,
        params=last if look.best_params is None else step.constrained(look.best_params),
        last_params=last,
        history={n: step.steps.column(n) for n in TERMS},
        validation={"step": np.array(look.steps), "nll": np.array(look.losses)},
        train=step.train,
        best_step=look.best_step or len(step.steps),
        skipped_steps=int(state.skipped),
        num_traces=step.num_traces,
        step_seconds=step.steps.column("seconds"),
        draw_key=draw_key,
        stopped=stopped,
    )
