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
Uniform ranks are necessary, not sufficient: an inference that ignores the data and returns prior
draws passes for every function that does not read them.

References: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788; Yao, Vehtari, Simpson
and Gelman (2018), arXiv 1802.02538; Modrak et al. (2023), arXiv 2211.02383; `bnlora.ranks` for the tests.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnlora.calibration import Calibration
from bnlora.checks import broken_weights, check_at_least, check_key
from bnlora.data import Batch
from bnlora.density import check_parameters
from bnlora.elbo import initial_parameters
from bnlora.functions import Functions, identifiable, log_likelihood, scalars
from bnlora.guides.automatic import prepare
from bnlora.maximise import maximise
from bnlora.model import Classifier
from bnlora.posterior import draw_adapters
from bnlora.prior_draws import draw_prior, prior_parameters
from bnlora.program import declared
from bnlora.ranks import rank
from bnlora.typing import Adapters, Parameters


class Inference(Protocol):
    """Posterior draws for a batch with labels; pure, so that it can be compiled.

    The frozen weights are an argument, as in every compiled program here, and never a closure.
    """

    def __call__(self, key: Array, frozen: Any, batch: Batch) -> Adapters:
        """Adapters with a leading draw axis."""
        ...


class Simulation(NamedTuple):
    """Adapters from the prior and rows whose labels they made."""

    adapters: Adapters
    batch: Batch


def simulate(key: Array, model: Classifier, frozen: Any, rows: Batch, params: Parameters) -> Simulation:
    """Draw adapters from the prior and labels from the likelihood at them.

    Args:
        key: Random key.
        model: A `Classifier`.
        frozen: The frozen weights, `model.base.params`.
        rows: Rows; their own labels are replaced.
        params: Parameters of the prior, all of them.

    Returns:
        Adapters of the prior, and the rows with labels drawn under them.

    Raises:
        ValueError: When a parameter of the prior is missing.
    """
    key = check_key(key)
    prior_key, label_key = jax.random.split(key)
    adapters = jax.tree.map(lambda x: x[0], draw_prior(prior_key, model, params, 1))
    labels = jax.random.categorical(label_key, model.logits(frozen, adapters, rows))
    return Simulation(adapters, replace(rows, labels=labels.astype(rows.labels.dtype)))


def svi_inference(
    key: Array,
    model: Classifier,
    guide: Callable,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    num_draws: int,
    num_particles: int = 1,
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

    Returns:
        An inference for `run`.

    Raises:
        ValueError: When a number is below one, the prior has a discrete latent site or a name that is not
            free, or the guide cannot be fitted.
    """
    key = check_key(key)
    check_at_least({"num_steps": num_steps, "num_draws": num_draws, "num_particles": num_particles}, 1)
    declared(model.prior).check()
    prepare(key, guide)

    def infer(key: Array, frozen: Any, batch: Batch) -> Adapters:
        start_key, step_key, draw_key = jax.random.split(key, 3)
        arguments = (frozen, batch, len(batch))
        params = maximise(
            step_key,
            *initial_parameters(start_key, model, guide, *arguments),
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

    def infer(key: Array, frozen: Any, batch: Batch) -> Adapters:
        params_key, prior_key, pick_key = jax.random.split(key, 3)
        held = prior_parameters(params_key, model) if params is None else params
        pool = draw_prior(prior_key, model, held, num_particles, num_together=num_together)

        def weigh(adapters: Adapters) -> Array:
            return log_likelihood(model, frozen, adapters, batch)

        weights = jax.lax.map(weigh, pool, batch_size=num_together)
        picked = jax.random.categorical(pick_key, weights, shape=(num_draws,))
        return jax.tree.map(lambda x: x[picked], pool)

    return infer


def run(
    key: Array,
    model: Classifier,
    inference: Inference,
    rows: Batch,
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
        rows: Rows of each simulated data set; labels are not read.
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
    if num_simulations < 2 or len(rows) < 1 or not 0 < level < 1:
        raise ValueError(
            "calibration needs at least two simulations, one row and a level in (0, 1); got "
            f"num_simulations={num_simulations}, {len(rows)} rows, level={level}"
        )
    params_key, run_key = jax.random.split(key)
    params = prior_parameters(params_key, model) if params is None else params
    functions = identifiable(model, rows[:3]) if functions is None else functions
    one = _simulation(model, inference, functions)
    program = jax.jit(lambda keys, *shared: jax.lax.map(lambda k: one(k, *shared), keys))
    keys = jax.random.split(run_key, num_simulations)
    found = program(keys, model.base.params, model.prepare(rows), params)
    found = jax.tree.map(np.asarray, found)
    broken = [name for name, ok in found.truth_finite.items() if not ok.all()]
    if broken:
        remedy = broken_weights(model.base.params) or "lower the prior's scale, or rank other functions"
        raise ValueError(
            f"the functions must be finite at draws of the prior; not so: {', '.join(broken)}; {remedy}"
        )
    finite = np.all(list(found.draws_finite.values()), axis=0)
    if not finite.any():
        raise ValueError(
            f"all {num_simulations} simulations gave draws that are not finite, so nothing can be ranked; "
            "run the inference by itself on rows of `simulate`, and lower its learning rate or its step"
        )
    ranks = np.stack(list(found.ranks.values()), axis=1)[finite]
    return Calibration(tuple(found.ranks), ranks, int(found.num_draws[0]), ~finite, level)


class _Found(NamedTuple):
    """What one simulation gives; mappings by name of the function."""

    ranks: dict[str, Array]
    draws_finite: dict[str, Array]
    truth_finite: dict[str, Array]
    num_draws: Array


def _simulation(model: Classifier, inference: Inference, functions: Functions) -> Callable[..., _Found]:
    def one(key: Array, frozen: Any, rows: Batch, params: Parameters) -> _Found:
        truth_key, fit_key, rank_key = jax.random.split(key, 3)
        adapters, batch = simulate(truth_key, model, frozen, rows, params)
        draws = inference(fit_key, frozen, batch)
        model.sites.check(jax.tree.map(lambda x: x[0], draws))
        truth = scalars(functions(frozen, adapters, batch))
        values = jax.lax.map(lambda drawn: dict(functions(frozen, drawn, batch)), draws)
        names = sorted(truth)
        inner, outer = jnp.stack([values[n] for n in names], 1), jnp.stack([truth[n] for n in names])

        def by_name(x: Array) -> dict[str, Array]:
            return dict(zip(names, x, strict=True))

        return _Found(
            by_name(rank(rank_key, inner, outer)),
            by_name(jnp.isfinite(inner).all(0)),
            by_name(jnp.isfinite(outer)),
            jnp.asarray(len(inner)),
        )

    return one
