r"""Sequential Monte Carlo through powers of the likelihood, for posteriors with several modes.

    p_t(u)  is proportional to  p(u) p(y | u)^t,      t from 0 (the prior) to 1 (the posterior)

What the prior itself observes or weighs, by `obs=` or `numpyro.factor`, cannot be drawn from and comes in
with the likelihood: p(u) is the law of the sites that are sampled, and the evidence that of both.

Each stage raises t until the effective number of particles falls to about a share of all, resamples, and
moves every particle by HMC under p_t. The product of the mean weights estimates the evidence p(y) without
bias (its logarithm with some). Separate runs give the R-hat of the certificate something to compare: the
particles of one run share ancestors.

References: Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; Chopin and Papaspiliopoulos
(2020), An introduction to sequential Monte Carlo, chapter 17.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import Progress, TaskID

from bnlora.checks import check_at_least, check_key, check_positive
from bnlora.data import Batch
from bnlora.fits import Fit
from bnlora.mcmc.chains import Chains
from bnlora.mcmc.run import record
from bnlora.mcmc.target import FixAt, Target, target
from bnlora.model import Classifier
from bnlora.progress import progress_bar
from bnlora.samplers import Particles, Tuning, temper

MAX_STAGES = 500


def sample_smc(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None = None,
    given: Fit | None = None,
    fix_at: FixAt = "mean",
    num_runs: int = 4,
    num_particles: int = 1000,
    target_ess: float = 0.5,
    num_moves: int = 5,
    integration_steps: int = 8,
    step_size: float = 0.5,
    console: Console | None = None,
) -> Chains:
    """Sample latent sites by tempered sequential Monte Carlo, starting at the prior.

    Args:
        key: Random key; the same key gives the same draws.
        model: As in `sample_nuts`, like the arguments up to `given`.
        train: Rows with labels.
        sites: The sites to sample.
        given: A fit of the same model; particles start at the prior all the same.
        fix_at: Where sites that are not sampled are held.
        num_runs: Independent runs, one after the other; the chains of the result.
        num_particles: Particles of each run; the draws of the result.
        target_ess: Share of the particles that the effective number may fall to in a stage.
        num_moves: HMC transitions of each particle in a stage.
        integration_steps: Leapfrog steps of a transition.
        step_size: Step of the first stage in units of the particles' own spread; each stage then aims at an
            acceptance between 0.65 and 0.9.
        console: Where to draw the progress bar.

    Returns:
        Chains whose record has `log_evidence`, one number a run: the log of the integral of prior times
        likelihood, where the prior has what it weighs itself and the density of sites that are held. The
        reports are those of the stages.

    Raises:
        ValueError: On an option out of its range, an improper law in the prior, or when the posterior is not
            reached in 500 stages.

    Example:
        >>> runs = bl.sample_smc(key, model, rows, num_runs=2, num_particles=20, integration_steps=2)
        >>> runs.num_chains
        2
    """
    key = check_key(key)
    check_at_least({"num_runs": num_runs, "num_moves": num_moves, "integration_steps": integration_steps}, 1)
    check_at_least({"num_particles": num_particles}, 10)
    check_positive({"step_size": step_size})
    if not 0 < target_ess < 1:
        raise ValueError(f"target_ess must lie in (0, 1); got {target_ess}")
    began = time.perf_counter()
    fix_key, run_key = jax.random.split(key)
    made = target(fix_key, model, train, sites=sites, given=given, fix_at=fix_at, console=console)
    options = {"num_moves": num_moves, "integration_steps": integration_steps, "target_ess": target_ess}
    stage = jax.jit(_stage(made, options))
    runs = []
    with progress_bar(console) as bar:
        for index, k in enumerate(jax.random.split(run_key, num_runs)):
            task = bar.add_task(f"SMC run {index + 1} of {num_runs}", total=100)
            told = partial(_advance, bar, task)
            runs.append(_run(k, made, stage, num_particles, step_size, told))
    vectors = np.stack([np.asarray(particles.positions) for particles, _ in runs])
    evidence = [float(particles.log_evidence) for particles, _ in runs]
    stages = [count for _, count in runs]
    plan = {"num_runs": num_runs, "num_particles": num_particles, "stages": stages}
    kept = record(key, "SMC", "none", {**options, "step_size": step_size}, plan)
    kept |= {"log_evidence": evidence, "seconds": time.perf_counter() - began, "stopped": "done"}
    return Chains(made, vectors, _stats(vectors, stages, options), _tuning(num_runs), kept)


def _advance(bar: Progress, task: TaskID, power: float) -> None:
    bar.update(task, completed=int(100 * power))


def _stage(made: Target, options: dict[str, Any]) -> Any:
    def stage(key: Array, particles: Particles, step_size: Array, inputs: Any) -> tuple[Particles, Array]:
        return temper(
            key,
            particles,
            lambda u: made.view.log_prior(u) - made.view.log_observed(u),
            lambda u: made.log_likelihood(u, inputs) + made.view.log_observed(u),
            step_size=step_size,
            **options,
        )

    return stage


def _run(
    key: Array, made: Target, stage: Any, num_particles: int, step_size: float, told: Callable[[float], None]
) -> tuple[Particles, int]:
    """One run from the prior to the posterior, and the number of its stages."""
    start_key, key = jax.random.split(key)
    first = jax.jit(jax.vmap(made.view.draw))(jax.random.split(start_key, num_particles))
    weights = jnp.full(num_particles, 1 / num_particles)
    particles = Particles(first, weights, jnp.zeros(()), jnp.zeros(()))
    step = jnp.asarray(step_size)
    for count in range(1, MAX_STAGES + 1):
        last = float(particles.temperature) >= 1  # what is weighted for power 1 is yet to be moved there
        particles, acceptance = stage(jax.random.fold_in(key, count), particles, step, made.inputs)
        told(float(particles.temperature))
        if last:
            return particles, count
        step = step * (0.8 if acceptance < 0.65 else 1.2 if acceptance > 0.9 else 1.0)
    raise ValueError(
        f"the posterior was not reached in {MAX_STAGES} stages (power {float(particles.temperature):.2g}); "
        "use more particles, or lower target_ess"
    )


def _stats(vectors: np.ndarray, stages: list[int], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reports of particles: no divergence is defined, no energy is kept."""
    shape = vectors.shape[:2]
    cost = options["num_moves"] * options["integration_steps"]
    return {
        "divergent": np.zeros(shape, bool),
        "energy": np.full(shape, np.nan),
        "acceptance": np.full(shape, np.nan),
        "num_gradients": np.broadcast_to(np.array(stages)[:, None] * cost, shape),
    }


def _tuning(num_runs: int) -> Tuning:
    nothing = jnp.zeros(num_runs)
    return Tuning(nothing[:, None], nothing, nothing, nothing, nothing)
