r"""Sequential Monte Carlo through powers of the likelihood, for posteriors with several modes.

    p_t(u)  is proportional to  p(u) p(y | u)^t,      t from 0 (the prior) to 1 (the posterior)

Factors and observed sites of the prior (`numpyro.factor`, `obs=`) cannot be sampled, so they are tempered
with the likelihood: p(u) is the distribution of the sampled sites, and the evidence includes these factors.

Each stage raises t until the effective number of particles falls to about a given share of all, resamples,
and moves every particle by HMC under p_t. The product of the mean weights is an unbiased estimate of the
evidence p(y); its logarithm is biased. The R-hat of the certificate compares separate runs, because the
particles of one run share ancestors.

If the moves leave particles near their ancestors, only resampling decides where the particles are. All
runs are then wrong in the same direction, which R-hat cannot show. With y = tau (b_1 - b_0) H a + e,
tau ~ HalfNormal(5), 200 rows and 16 inputs, E tau is 3.43 by quadrature and 3.45 by NUTS (with divergences).
Five moves of one step size gave 2.0 in every run, and 400 gave 2.7: a step that suits most particles is
rejected where tau is large and b small. With steps between this one and a sixteenth of it, 30 moves gave
3.3 and 100 gave 3.5. So the step size varies. Each stage measures the correlation, between before and after
its moves, of the size of each site, of the prior and of the likelihood. The next stage makes as many moves as
this correlation needs, and the certificate refuses runs whose last moves left too much of it.

References: Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; Chopin and Papaspiliopoulos
(2020), An introduction to sequential Monte Carlo, chapter 17.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import Progress, TaskID

from bnlora._util.checks import check_at_least, check_key, check_positive
from bnlora._util.progress import progress_bar
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.pieces import Pieces
from bnlora.infer.mcmc.run import record
from bnlora.infer.mcmc.samplers import Particles, Tuning, temper
from bnlora.infer.mcmc.target import FixAt, Target, target
from bnlora.infer.svi.result import Fit
from bnlora.program.model import Classifier

MAX_STAGES = 500
LEFT = 0.5
"""Correlation of a particle with its start that the moves of a stage aim at."""


def sample_smc(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None = None,
    given: Fit | None = None,
    fix_at: FixAt = "mean",
    num_runs: int = 4,
    num_draws: int = 1000,
    target_ess: float = 0.5,
    num_moves: int = 5,
    max_moves: int = 100,
    num_integration_steps: int = 8,
    step_size: float = 0.5,
    folder: Path | str | None = None,
    console: Console | None = None,
) -> Chains:
    """Sample latent sites by tempered sequential Monte Carlo, starting at the prior.

    Args:
        key: Random key; the same key gives the same draws.
        model: As in `sample_nuts`, like the arguments up to `given`.
        train: Rows with labels.
        sites: The sites to sample.
        given: A fit of the same model; the particles still start at the prior.
        fix_at: Value of the sites that are not sampled.
        num_runs: Independent runs, one after the other; the chains of the result.
        num_draws: Particles of each run; the draws of the result.
        target_ess: Smallest effective number of particles in a stage, as a share of all.
        num_moves: Smallest number of HMC transitions of each particle in a stage.
        max_moves: Largest number. Between both, each stage makes as many moves as needed for a correlation of
            0.5 with the start of the stage.
        num_integration_steps: Leapfrog steps of a transition.
        step_size: Longest step of the first stage, in units of the particles' spread; the shortest is a
            sixteenth of it. Later stages adapt it to an acceptance between 0.65 and 0.9.
        folder: Where finished runs are stored. The same call reads them and goes on with the next run.
        console: Where to draw the progress bar.

    Returns:
        Chains whose record has `log_evidence` and `correlation`, one number for each run. `log_evidence` is
        the log of the integral of prior times likelihood, in nats; the prior includes its own factors and the
        density of fixed sites. `correlation` is that between particles and their ancestors after the moves of
        the last stage.

    Raises:
        ValueError: If an option is out of its range, the prior has an improper distribution, the posterior is
            not reached in 500 stages, or the folder has other runs.

    Example:
        >>> runs = bl.sample_smc(key, model, rows, num_runs=2, num_draws=20, num_integration_steps=2)
        >>> runs.num_chains
        2
    """
    key = check_key(key)
    check_at_least(
        {"num_runs": num_runs, "num_moves": num_moves, "num_integration_steps": num_integration_steps}, 1
    )
    check_at_least({"num_draws": num_draws}, 10)
    check_positive({"step_size": step_size})
    check_at_least({"max_moves": max_moves}, num_moves)
    if not 0 < target_ess < 1:
        raise ValueError(f"target_ess must lie in (0, 1); got {target_ess}")
    began = time.perf_counter()
    fix_key, run_key = jax.random.split(key)
    density = target(fix_key, model, train, sites=sites, given=given, fix_at=fix_at, console=console)
    options = {"num_integration_steps": num_integration_steps, "target_ess": target_ess}
    stage = jax.jit(_stage(density, options))
    settings = {**options, "num_moves": num_moves, "max_moves": max_moves, "step_size": step_size}
    plan = {"num_runs": num_runs, "num_draws": num_draws}
    limits, like = (num_moves, max_moves), jax.eval_shape(partial(_start, density, num_draws), run_key)
    stored = _opened(folder, record(key, "SMC", "none", settings, plan), density)
    runs: list[_Run] = []
    with progress_bar(console) as bar:
        for index, k in enumerate(jax.random.split(run_key, num_runs)):
            task = bar.add_task(f"SMC run {index + 1} of {num_runs}", total=100)
            report = partial(_advance, bar, task)
            compute = partial(_run, k, density, stage, num_draws, step_size, limits, report)
            runs.append(_Run.unpacked(*stored.draws(index, partial(_packed, compute), _packed_like(like))))
            report(1.0)
    vectors = np.stack([np.asarray(run.particles.positions) for run in runs])
    moves = [list(run.moves) for run in runs]
    about = record(key, "SMC", "none", settings, plan | {"stages": [len(m) for m in moves]})
    about |= {
        "log_evidence": [float(run.particles.log_evidence) for run in runs],
        "correlation": [run.correlation for run in runs],
        "moves": moves,
        "seconds": time.perf_counter() - began,
        "stopped": "done",
    }
    cost = [sum(m) * num_integration_steps for m in moves]
    return Chains(density, vectors, _stats(vectors, cost), _tuning(num_runs), about)


def _advance(bar: Progress, task: TaskID, power: float) -> None:
    bar.update(task, completed=int(100 * power))


def _stage(density: Target, options: dict[str, Any]) -> Any:
    def stage(
        key: Array, particles: Particles, step_size: Array, num_moves: Array, inputs: Any
    ) -> tuple[Particles, Array, Array]:
        # Particles start at draws of the sampled sites, without the prior's factors, so these are tempered.
        def prior(u: Array) -> Array:
            return density.view.log_prior(u) - density.view.log_observed(u)

        def likelihood(u: Array) -> Array:
            return density.log_likelihood(u, inputs) + density.view.log_observed(u)

        def summaries(u: Array) -> Array:
            # Sizes are invariant under sign flips of adapters, so a particle that never flips is not seen as
            # slow.
            sizes = [jnp.sqrt(jnp.mean(x**2)) for x in density.view.split(u).values()]
            return jnp.stack([*sizes, prior(u), likelihood(u)])

        return temper(
            key,
            particles,
            prior,
            likelihood,
            step_size=step_size,
            num_moves=num_moves,
            summaries=summaries,
            **options,
        )

    return stage


class _Run(NamedTuple):
    """Particles at the posterior, the moves of every stage, and the correlation after the last ones."""

    particles: Particles
    moves: tuple[int, ...]
    correlation: float

    @property
    def packed(self) -> tuple[Particles, np.ndarray, np.ndarray]:
        """The run as arrays whose shapes do not depend on the number of stages."""
        moves = np.zeros(MAX_STAGES, np.int32)
        moves[: len(self.moves)] = self.moves
        return self.particles, moves, np.asarray(self.correlation, np.float32)

    @classmethod
    def unpacked(cls, particles: Particles, moves: Any, correlation: Any) -> "_Run":
        """The run of `packed`; every stage has one move at least."""
        return cls(particles, tuple(int(m) for m in np.asarray(moves) if m), float(correlation))


def _packed(compute: Callable[[], _Run]) -> tuple[Particles, np.ndarray, np.ndarray]:
    return compute().packed


def _packed_like(particles: Any) -> Any:
    shapes = {"moves": ((MAX_STAGES,), np.int32), "correlation": ((), np.float32)}
    return (particles, *(jax.ShapeDtypeStruct(*shape) for shape in shapes.values()))


def _opened(folder: Path | str | None, about: dict[str, Any], density: Target) -> Pieces:
    """The folder of finished runs; the log-density at zero tells models apart."""
    if folder is None:
        return Pieces(None)
    zero = jnp.zeros_like(density.view.draw(jax.random.key(0)))
    value = float(jax.jit(density.log_density)(zero, density.inputs))
    known = {"log_density": [value] if np.isfinite(value) else []}
    return Pieces.open(Path(folder), about | known, density, zero[None])


def _start(density: Target, num_draws: int, key: Array) -> Particles:
    """Particles of the prior."""
    first = jax.vmap(density.view.draw)(jax.random.split(key, num_draws))
    weights = jnp.full(num_draws, 1 / num_draws)
    return Particles(first, weights, jnp.zeros(()), jnp.zeros(()))


def _run(
    key: Array,
    density: Target,
    stage: Any,
    num_draws: int,
    step_size: float,
    limits: tuple[int, int],
    report: Callable[[float], None],
) -> _Run:
    """One run from the prior to the posterior."""
    start_key, key = jax.random.split(key)
    particles = jax.jit(partial(_start, density, num_draws))(start_key)
    step, moves = jnp.asarray(step_size), [limits[0]]
    for count in range(1, MAX_STAGES + 1):
        last = float(particles.temperature) >= 1  # weighted for power 1, but not moved at this power yet
        num_moves = jnp.asarray(moves[-1])
        particles, acceptance, left = stage(
            jax.random.fold_in(key, count), particles, step, num_moves, density.inputs
        )
        report(float(particles.temperature))
        if last:
            return _Run(particles, tuple(moves), float(left))
        moves.append(_needed(moves[-1], float(left), limits))
        step = step * (0.8 if acceptance < 0.65 else 1.2 if acceptance > 0.9 else 1.0)
    raise ValueError(
        f"the posterior was not reached in {MAX_STAGES} stages (power {float(particles.temperature):.2g}); "
        "use more particles, or lower target_ess"
    )


def _needed(moves: int, left: float, limits: tuple[int, int]) -> int:
    """Moves that reduce the correlation to `LEFT`: it decays geometrically, to `left` after `moves` moves."""
    if not left > 0:
        return limits[0]
    needed = moves * np.log(LEFT) / np.log(min(left, 0.9999))  # below 1, so that its logarithm is not zero
    return int(np.clip(np.ceil(needed), *limits))


def _stats(vectors: np.ndarray, cost: list[int]) -> dict[str, np.ndarray]:
    """Reports of particles, which have no divergences, energies or acceptance probabilities."""
    shape = vectors.shape[:2]
    return {
        "divergent": np.zeros(shape, bool),
        "energy": np.full(shape, np.nan),
        "acceptance": np.full(shape, np.nan),
        "num_gradients": np.broadcast_to(np.array(cost)[:, None], shape),
    }


def _tuning(num_runs: int) -> Tuning:
    unused = jnp.zeros(num_runs)
    return Tuning(unused[:, None], unused, unused, unused, unused)
