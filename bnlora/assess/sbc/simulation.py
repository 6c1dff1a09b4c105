r"""Simulation-based calibration: is the posterior right on average over data drawn from the prior?

    adapters_0 ~ prior,    y ~ likelihood(adapters_0),    adapters_1, ..., adapters_L ~ inference(y)

If the inference is exact, adapters_0 and the L draws are exchangeable given y, so for any function f of
adapters and data the rank of f(adapters_0) among the f(adapters_l) is uniform on {0, ..., L} (Talts et al.
2018). The factors `a` and `b` of an adapter are not identifiable ((a, b) and (R a, R^-1 b) are one
update), so the functions are: margins of the logits at probe rows, the Frobenius norm of each family's
update, and the log-likelihood of the data, which detects errors that functions of the parameters cannot
(Modrak et al. 2023).

A variational posterior is rarely exact. Yao et al. (2018) test a weaker property: the probability
p = Pr_q(f < f(adapters_0)) is symmetric about one half, that is, unbiased on average. The same simulations
serve both tests. Uniform ranks are necessary, not sufficient: draws of the prior pass for every function that
reads no data.

An average over the prior may be uninformative about one observed data set. `run_posterior` tests near it:

    adapters_0 ~ posterior(y),   y' ~ likelihood(adapters_0),   adapters_1, ..., adapters_L ~ inference(y, y')

Given y and y', adapters_0 is a draw of the posterior given both, so its ranks are again uniform (Saeilynoja
et al. 2025).

References: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788; Yao, Vehtari, Simpson
and Gelman (2018), arXiv 1802.02538; Modrak et al. (2023), arXiv 2211.02383; Saeilynoja, Schmitt, Buerkner and
Vehtari (2025), Posterior SBC, arXiv 2502.03279; `bnlora.metrics.ranks` for the tests.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bnlora._util.checks import check_at_least, check_key, listed
from bnlora._util.typing import Adapters, Parameters
from bnlora.assess.prior_draws import draw_prior, prior_parameters
from bnlora.assess.sbc.calibration import Calibration
from bnlora.assess.sbc.ranking import ranked
from bnlora.data.batch import Batch
from bnlora.guides.automatic import prepare
from bnlora.infer.svi.elbo import initial_parameters
from bnlora.infer.svi.maximise import maximise
from bnlora.prediction.functions import Functions, log_likelihood
from bnlora.priors.declared import declared
from bnlora.program.adapter_prior import parameters_of
from bnlora.program.density import check_parameters
from bnlora.program.draws import draw_adapters
from bnlora.program.model import Classifier


class Inference(Protocol):
    """Function that returns posterior draws for a batch with labels; pure, so that it can be compiled.

    The frozen weights are an argument; a closure would copy them into the compiled program as constants.
    """

    def __call__(self, key: Array, weights: Any, batch: Batch) -> Adapters:
        """Adapters with a leading draw axis."""
        ...


Start = Callable[[Array, Any, Batch], Parameters]
"""Function from key, frozen weights and rows to constrained values of all parameters; pure."""


class Simulation(NamedTuple):
    """Adapters from the prior, and rows with labels drawn under them."""

    adapters: Adapters
    batch: Batch


def simulate(key: Array, model: Classifier, weights: Any, data: Batch, params: Parameters) -> Simulation:
    """Draw adapters from the prior and labels from the likelihood at them.

    Args:
        key: Random key.
        model: A `Classifier`.
        weights: The frozen weights, `model.base.weights`.
        data: Rows; their labels are replaced.
        params: Parameters of the prior, all of them.

    Returns:
        Adapters of the prior, and the rows with labels drawn under them.

    Raises:
        ValueError: If a parameter of the prior is missing.
    """
    key = check_key(key)
    prior_key, label_key = jax.random.split(key)
    adapters = jax.tree.map(lambda x: x[0], draw_prior(prior_key, model, params, 1))
    return Simulation(adapters, _observed(label_key, model, weights, adapters, data))


def _observed(key: Array, model: Classifier, weights: Any, adapters: Adapters, rows: Batch) -> Batch:
    """The rows with outcomes drawn from the likelihood."""
    logits = model.logits(weights, adapters, rows)
    return model.likelihood.simulate(key, logits, parameters_of(adapters), rows)


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
    """Inference that fits a guide to all rows for a fixed number of steps and draws from it.

    Parameters of the prior (such as frames) are fitted with those of the guide. A fit with values that are
    not finite is not repeated; `run` counts it as failed.

    Args:
        key: Random key for the start of a NumPyro autoguide, which is drawn once, at its first call.
        model: A `Classifier`.
        guide: A guide of `model.prior`.
        optimizer: optax optimiser of all parameters; it gets the gradient of the negative bound per row.
        num_steps: Number of steps.
        num_draws: Draws of the fitted guide, L.
        num_particles: Guide draws averaged in a step.
        init_params: Function from key, frozen weights and rows to the start values of the parameters, as
            `start` of `bnlora.fit`; the start values of guide and prior by default.

    Returns:
        An inference for `run`.

    Raises:
        ValueError: If a number is below one, the prior has a discrete latent site or a reserved name, or the
            guide cannot be fitted. The inference raises it if `init_params` lacks a parameter or returns one
            of another shape.
    """
    key = check_key(key)
    check_at_least({"num_steps": num_steps, "num_draws": num_draws, "num_particles": num_particles}, 1)
    declared(model.prior).check()
    prepare(key, guide)

    def infer(key: Array, weights: Any, batch: Batch) -> Adapters:
        start_key, step_key, draw_key = jax.random.split(key, 3)
        arguments = (weights, batch, len(batch))
        start = None if init_params is None else init_params(start_key, weights, batch)
        params = maximise(
            step_key,
            *initial_parameters(start_key, model, guide, *arguments, init_params=start),
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
    """Inference by importance resampling from the prior; exact as the number of particles grows.

    It suits small problems, in which many particles fit the data. Resampling repeats particles if their
    effective number is not well above `num_draws`, and the ranks are then not uniform.

    Args:
        model: A `Classifier`.
        num_particles: Prior draws for each data set.
        num_draws: Draws with replacement from them, L.
        num_together: Particles computed at a time. Use more than one only for priors that factorise no
            matrix of random numbers.
        params: Parameters of the prior; use the same as in `run`. By default, start values drawn from the
            key.

    Returns:
        An inference for `run`, exact up to its finite number of particles.

    Raises:
        ValueError: If a number is below one, a parameter of the prior is missing, or there are fewer
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
        values = prior_parameters(params_key, model) if params is None else params
        pool = draw_prior(prior_key, model, values, num_particles, num_together=num_together)

        def log_weight(adapters: Adapters) -> Array:
            return log_likelihood(model, weights, adapters, batch)

        log_weights = jax.lax.map(log_weight, pool, batch_size=num_together)
        # `categorical` takes unnormalised log-probabilities and draws with replacement.
        indices = jax.random.categorical(pick_key, log_weights, shape=(num_draws,))
        return jax.tree.map(lambda x: x[indices], pool)

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
        model: A `Classifier`; the truths are drawn from its prior.
        inference: The inference to test, from `svi_inference` or your own.
        data: Rows of each simulated data set; labels are not read.
        num_simulations: Number of simulations.
        functions: Functions to rank; `identifiable(model, rows[:3])` by default.
        params: All parameters of the prior of the truths; start values drawn from the key by default. If the
            prior's law depends on them, an inference that learns them uses another prior than the truths.
        level: Level of the tests.

    Returns:
        Ranks of the truth among the draws, with their tests.

    Raises:
        ValueError: If there are fewer than two simulations or no rows, the level is not in (0, 1), a
            parameter of the prior has no value, draws have other shapes than the adapters, a function is not
            a scalar, a truth is not finite, or every simulation failed.
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

    New labels of the same rows are drawn under each truth. The inference gets every row twice: with the
    observed label and with the drawn one. Functions that read the data also get both.

    Args:
        key: Random key.
        model: A `Classifier`.
        inference: The inference to test.
        observed: Rows with labels.
        truths: Draws of the posterior given `observed`, one for each simulation. They should come from an
            exact inference. They may come from the tested one; the ranks then test its self-consistency.
            They must be independent of each other, so thin the draws of chains.
        functions: Functions to rank; `identifiable(model, observed[:3])` by default.
        level: Level of the tests.

    Returns:
        Ranks of the truths among the draws, with their tests.

    Raises:
        ValueError: If rows have no labels, there are fewer than two truths, the truths are not adapters of
            the model, the level is not in (0, 1), or draws or functions are invalid as in `run`.
    """
    key = check_key(key)
    model.check_outcomes("observed", observed)
    count = _count(model, truths)
    _check_sizes(f"{count} truths", count, observed, level)

    def make(key: Array, truth: Adapters, weights: Any, rows: Batch, shared: None) -> Simulation:
        again = _observed(key, model, weights, truth, rows)
        return Simulation(truth, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rows, again))

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
    """Raise `ValueError` unless there are two simulations and a row, and the level is in (0, 1)."""
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
            "truths need a leading axis of simulations with the same length in all factors; got lengths "
            f"{listed(lengths)}"
        )
    model.sites.check(jax.tree.map(lambda x: x[0], truths))
    return int(counts.pop()[0])
