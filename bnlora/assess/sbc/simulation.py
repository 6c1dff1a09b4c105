r"""Simulation-based calibration: is the posterior right on average over data that the prior itself made?

    adapters_0 ~ prior,    y ~ likelihood(adapters_0),    adapters_1, ..., adapters_L ~ inference(y)

If the inference is exact, adapters_0 and the L draws are exchangeable given y, so for any function f of
adapters and data the rank of f(adapters_0) among the f(adapters_l) is uniform on {0, ..., L} (Talts et al.
2018). The factors `a` and `b` of an adapter are not identifiable ((a, b) and (R a, R^-1 b) are one
update), so the functions are: margins of the logits at probe rows, the Frobenius norm of each family's
update, and the log-likelihood of the data, which notices what functions of the parameters alone cannot
(Modrak et al. 2023).

A variational posterior is hardly ever exact. Yao et al. (2018) ask less of it: that the probability
p = Pr_q(f < f(adapters_0)) is symmetric about one half, that is, unbiased on average. Both questions are put
to the same simulations.
Uniform ranks are necessary, not sufficient: draws of the prior pass where a function reads no data.

An average over the prior may say little about the one data set at hand. `run_posterior` asks near that one:

    adapters_0 ~ posterior(y),   y' ~ likelihood(adapters_0),   adapters_1, ..., adapters_L ~ inference(y, y')

Given y and y', adapters_0 is a draw of the posterior of both, so that its ranks are uniform once more
(Saeilynoja et al. 2025).

References: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788; Yao, Vehtari, Simpson
and Gelman (2018), arXiv 1802.02538; Modrak et al. (2023), arXiv 2211.02383; Saeilynoja, Schmitt, Buerkner and
Vehtari (2025), Posterior SBC, arXiv 2502.03279; `bnlora.metrics.ranks` for the tests.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnlora._util.checks import check_at_least, check_key, listed
from bnlora._util.typing import Adapters, Parameters
from bnlora.assess.prior_draws import draw_prior, prior_parameters
from bnlora.assess.sbc.calibration import Calibration
from bnlora.assess.sbc.ranking import ranked
from bnlora.data.batch import Batch, check_labels
from bnlora.guides.automatic import prepare
from bnlora.infer.svi.elbo import initial_parameters
from bnlora.infer.svi.maximise import maximise
from bnlora.prediction.functions import Functions, log_likelihood
from bnlora.priors.declared import declared
from bnlora.program.density import check_parameters
from bnlora.program.draws import draw_adapters
from bnlora.program.model import Classifier


class Inference(Protocol):
    """Posterior draws for a batch with labels; pure, so that it can be compiled.

    The frozen weights are an argument, as in every compiled program here, and never a closure.
    """

    def __call__(self, key: Array, weights: Any, batch: Batch) -> Adapters:
        """Adapters with a leading draw axis."""
        ...


Start = Callable[[Array, Any, Batch], Parameters]
"""From key, frozen weights and rows to constrained values of all parameters; pure, like an `Inference`."""


class Simulation(NamedTuple):
    """Adapters from the prior and rows whose labels they made."""

    adapters: Adapters
    batch: Batch


def simulate(key: Array, model: Classifier, weights: Any, data: Batch, params: Parameters) -> Simulation:
    """Draw adapters from the prior and labels from the likelihood at them.

    Args:
        key: Random key.
        model: A `Classifier`.
        weights: The frozen weights, `model.base.weights`.
        data: Rows; their own labels are replaced.
        params: Parameters of the prior, all of them.

    Returns:
        Adapters of the prior, and the rows with labels drawn under them.

    Raises:
        ValueError: When a parameter of the prior is missing.
    """
    key = check_key(key)
    prior_key, label_key = jax.random.split(key)
    adapters = jax.tree.map(lambda x: x[0], draw_prior(prior_key, model, params, 1))
    return Simulation(adapters, replace(data, labels=_labels(label_key, model, weights, adapters, data)))


def _labels(key: Array, model: Classifier, weights: Any, adapters: Adapters, rows: Batch) -> Array:
    """Labels of the rows, drawn from the likelihood."""
    return jax.random.categorical(key, model.logits(weights, adapters, rows)).astype(rows.labels.dtype)


def svi_inference(
    key: Array,
    model: Classifier,
    guide: Callable,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    num_draws: int,
    num_particles: int = 1,
    init_params: Start | None = None,
) -> Inference:
    """Fit a guide to all rows at once for a fixed number of steps, then draw from it.

    Whatever parameters the prior has (such as frames) are fitted with those of the guide. A fit that
    leaves the finite numbers is not rescued; `run` counts it.

    Args:
        key: Random key of what a NumPyro autoguide draws once, at its first call: its start.
        model: A `Classifier`.
        guide: A guide of `model.prior`.
        optimizer: optax optimiser of all parameters; it sees the gradient of the negative bound per row.
        num_steps: Number of steps.
        num_draws: Draws of the fitted guide, L.
        num_particles: Guide draws averaged in a step.
        init_params: From key, frozen weights and rows to the values at which the parameters start, as `start`
            of `bnlora.fit`; those of guide and prior when omitted.

    Returns:
        An inference for `run`.

    Raises:
        ValueError: When a number is below one, the prior has a discrete latent site or a name that is not
            free, or the guide cannot be fitted. The inference raises it where `init_params` lacks a parameter
            or gives one another shape.
    """
    key = check_key(key)
    check_at_least({"num_steps": num_steps, "num_draws": num_draws, "num_particles": num_particles}, 1)
    declared(model.prior).check()
    prepare(key, guide)

    def infer(key: Array, weights: Any, batch: Batch) -> Adapters:
        start_key, step_key, draw_key = jax.random.split(key, 3)
        arguments = (weights, batch, len(batch))
        begin = None if init_params is None else init_params(start_key, weights, batch)
        params = maximise(
            step_key,
            *initial_parameters(start_key, model, guide, *arguments, init_params=begin),
            model,
            guide,
            *arguments,
            optimizer=optimizer,
            num_steps=num_steps,
            num_particles=num_particles,
            num_rows=len(batch),
        )
        return draw_adapters(draw_key, model, guide, params, num_draws)

    return infer


def importance_inference(
    model: Classifier,
    *,
    num_particles: int,
    num_draws: int,
    num_together: int = 1,
    params: Parameters | None = None,
) -> Inference:
    """Draw from the prior, weigh by the likelihood, resample: exact as the number of particles grows.

    For problems so small that many of the particles fit the data; resampling repeats particles when their
    effective number is not well above `num_draws`, and the ranks then show it.

    Args:
        model: A `Classifier`.
        num_particles: Prior draws for each data set.
        num_draws: Draws with replacement from them, L.
        num_together: Particles computed at a time; more than one only for priors that factorise no matrix
            of random numbers.
        params: Parameters of the prior, the same as those of `run` where they are given; a start drawn from
            the key when omitted.

    Returns:
        An inference for `run`, exact but for its finite number of particles.

    Raises:
        ValueError: When a number is below one, a parameter of the prior is missing, or there are fewer
            particles than draws.
    """
    sizes = {"num_particles": num_particles, "num_draws": num_draws, "num_together": num_together}
    check_at_least(sizes, 1)
    if num_particles < num_draws:
        raise ValueError(f"num_particles must be at least num_draws={num_draws}; got {num_particles}")

    if params is not None:
        check_parameters(model.prior, params)

    def infer(key: Array, weights: Any, batch: Batch) -> Adapters:
        params_key, prior_key, pick_key = jax.random.split(key, 3)
        held = prior_parameters(params_key, model) if params is None else params
        pool = draw_prior(prior_key, model, held, num_particles, num_together=num_together)

        def weigh(adapters: Adapters) -> Array:
            return log_likelihood(model, weights, adapters, batch)

        weights = jax.lax.map(weigh, pool, batch_size=num_together)
        picked = jax.random.categorical(pick_key, weights, shape=(num_draws,))
        return jax.tree.map(lambda x: x[picked], pool)

    return infer


def run(
    key: Array,
    model: Classifier,
    inference: Inference,
    data: Batch,
    *,
    num_simulations: int = 200,
    functions: Functions | None = None,
    params: Parameters | None = None,
    level: float = 0.05,
) -> Calibration:
    """Simulate, infer and rank, all simulations in one compiled program.

    Args:
        key: Random key.
        model: A `Classifier` whose prior makes the truths.
        inference: What is to be judged, from `svi_inference` or your own.
        data: Rows of each simulated data set; labels are not read.
        num_simulations: Number of simulations.
        functions: What is ranked; `identifiable(model, rows[:3])` when omitted.
        params: Parameters of the prior that makes the truths, all of them; one start drawn from the key when
            omitted. Where the prior's law depends on them, an inference that learns them answers another
            question.
        level: Level of the verdicts.

    Returns:
        Ranks of the truth among the draws, with their tests.

    Raises:
        ValueError: On fewer than two simulations, no rows, a level outside (0, 1), a parameter of the prior
            without a value, draws of other shapes than the adapters', a function that is no scalar, a truth
            that is not finite, or when every simulation failed.
    """
    key = check_key(key)
    _check_sizes(f"num_simulations={num_simulations}", num_simulations, data, level)
    params_key, run_key = jax.random.split(key)
    params = prior_parameters(params_key, model) if params is None else params

    def make(key: Array, own: None, weights: Any, data: Batch, params: Parameters) -> Simulation:
        return simulate(key, model, weights, data, params)

    return ranked(
        run_key,
        model,
        inference,
        functions,
        make,
        None,
        data,
        params,
        num_simulations=num_simulations,
        level=level,
        origin="draws of the prior",
        remedy="lower the prior's scale, or rank other functions",
    )


def run_posterior(
    key: Array,
    model: Classifier,
    inference: Inference,
    observed: Batch,
    truths: Adapters,
    *,
    functions: Functions | None = None,
    level: float = 0.05,
) -> Calibration:
    """Simulate from the posterior of observed rows, infer from both data sets together, and rank.

    Each truth draws new labels of the same rows. The inference then gets the rows twice: with the labels that
    were observed, and with those that were drawn. Functions that read the data get both, too.

    Args:
        key: Random key.
        model: A `Classifier`.
        inference: What is to be judged.
        observed: Rows with labels.
        truths: Draws of the posterior given `observed`, one for each simulation. They should come from
            another inference, one that is exact, or from the same one: then ranks tell whether it agrees
            with itself. They must be independent of each other, so thin the draws of chains.
        functions: What is ranked; `identifiable(model, observed[:3])` when omitted.
        level: Level of the verdicts.

    Returns:
        Ranks of the truths among the draws, with their tests.

    Raises:
        ValueError: On rows without labels, fewer than two truths, truths that are no adapters of the model, a
            level outside (0, 1), and where `run` would raise it because of draws or functions.
    """
    key = check_key(key)
    check_labels("observed", observed, len(model.label_ids))
    count = _count(model, truths)
    _check_sizes(f"{count} truths", count, observed, level)

    def make(key: Array, truth: Adapters, weights: Any, rows: Batch, shared: None) -> Simulation:
        twice, drawn = rows[np.tile(np.arange(len(rows)), 2)], _labels(key, model, weights, truth, rows)
        return Simulation(truth, replace(twice, labels=jnp.concatenate([rows.labels, drawn])))

    return ranked(
        key,
        model,
        inference,
        functions,
        make,
        jax.tree.map(jnp.asarray, truths),
        observed,
        None,
        num_simulations=count,
        level=level,
        origin="the truths",
        remedy="give other truths, or rank other functions",
    )


def _check_sizes(simulations: str, count: int, rows: Batch, level: float) -> None:
    """Raise `ValueError` unless there are simulations and rows, and the level is one."""
    if count < 2 or len(rows) < 1 or not 0 < level < 1:
        raise ValueError(
            "calibration needs at least two simulations, one row and a level in (0, 1); got "
            f"{simulations}, {len(rows)} rows, level={level}"
        )


def _count(model: Classifier, truths: Adapters) -> int:
    """Number of truths; `ValueError` unless all of them are adapters of the model."""
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(truths)}
    if len(counts) != 1 or counts == {()}:
        lengths = [str(shape[0]) if shape else "none" for shape in sorted(counts)]
        raise ValueError(
            "truths need a leading axis for the simulations, of one length in all factors; got "
            f"{listed(lengths)}"
        )
    model.sites.check(jax.tree.map(lambda x: x[0], truths))
    return int(counts.pop()[0])
