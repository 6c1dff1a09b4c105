r"""BlackJAX's kernels as pairs of pure functions; no other file imports BlackJAX.

A `Sampler` starts from an unconstrained vector u and moves it:

    state = init(key, position),      state, report = step(key, state)

and every report has the same four numbers for all kernels. The state of stochastic-gradient kernels is only
the vector, and they have no report.

References: Hoffman and Gelman (2014), The No-U-Turn sampler; Neal (2011), MCMC using Hamiltonian dynamics;
Murray, Adams and MacKay (2010), Elliptical slice sampling; Robnik et al. (2023), Microcanonical Hamiltonian
Monte Carlo, arXiv 2212.08549; Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; Zhang et
al. (2022), Pathfinder, arXiv 2108.03782; Carpenter et al. (2017), Stan (the warm-up in windows).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

LogDensity = Callable[[Array], Array]
"""From a vector to its log-density, up to a constant."""

Kernel = Callable[[Array, Array, Any], Array]
"""From a key, a vector and a minibatch to the next vector."""

Mass = Literal["diagonal", "dense"]


class Report(NamedTuple):
    """Diagnostics of one transition; scalars.

    Attributes:
        divergent: Whether the transition diverged (energy error above the threshold).
        energy: Hamiltonian at the start of the transition, after the momentum was drawn; NaN without one.
        acceptance: Mean acceptance probability; 1 for kernels that never reject.
        num_gradients: Number of gradients of the log-density; of evaluations for slice sampling.
    """

    divergent: Array
    energy: Array
    acceptance: Array
    num_gradients: Array


class Sampler(NamedTuple):
    """A Markov kernel as two pure functions; its state has an attribute `position`."""

    init: Callable[[Array, Array], Any]
    step: Callable[[Array, Any], tuple[Any, Report]]


class Tuning(NamedTuple):
    """Results of a warm-up.

    Attributes:
        position: Last vector, shape (p,).
        step_size: Step of the integrator.
        inverse_mass: Inverse mass matrix, shape (p,) if diagonal and (p, p) if dense.
        length: Distance between refreshments of the momentum for MCLMC; 0 elsewhere.
        num_gradients: Number of gradients in the warm-up.
    """

    position: Float[Array, " p"]
    step_size: Float[Array, ""]
    inverse_mass: Array
    length: Array
    num_gradients: Array


@dataclass(frozen=True)
class Nuts:
    """The No-U-Turn sampler.

    Attributes:
        max_doublings: Largest number of doublings of a trajectory; 10 allow 1,023 gradients.
    """

    max_doublings: int = 10

    def options(self) -> dict[str, int]:
        """Arguments of BlackJAX's kernel."""
        return {"max_num_doublings": self.max_doublings}


@dataclass(frozen=True)
class Hmc:
    """Hamiltonian Monte Carlo with trajectories of a fixed number of steps.

    Attributes:
        num_integration_steps: Leapfrog steps of a trajectory.
    """

    num_integration_steps: int = 32

    def options(self) -> dict[str, int]:
        """Arguments of BlackJAX's kernel."""
        return {"num_integration_steps": self.num_integration_steps}


def warm_up(
    key: Array,
    method: Nuts | Hmc,
    log_density: LogDensity,
    position: Float[Array, " p"],
    *,
    num_steps: int,
    target_acceptance: float,
    mass: Mass,
    initial_step_size: float,
) -> Tuning:
    """Adapt step and mass matrix of one chain in Stan's windows."""
    blackjax = _blackjax()

    def kept(state: Any, info: Any, adaptation: Any) -> Any:
        # Keeping all of `info` would keep every trajectory of the warm-up in memory.
        return info.num_integration_steps

    warming = blackjax.window_adaptation(
        _algorithm(method),
        log_density,
        is_mass_matrix_diagonal=mass == "diagonal",
        initial_step_size=initial_step_size,
        target_acceptance_rate=target_acceptance,
        adaptation_info_fn=kept,
        **method.options(),
    )
    (state, tuned), steps = warming.run(key, position, num_steps)
    step_size, inverse_mass = jnp.asarray(tuned["step_size"]), tuned["inverse_mass_matrix"]
    return Tuning(state.position, step_size, inverse_mass, jnp.zeros(()), jnp.sum(steps))


def hamiltonian(method: Nuts | Hmc, log_density: LogDensity, tuning: Tuning) -> Sampler:
    """NUTS or HMC with a tuned step and mass matrix."""
    algorithm = _algorithm(method)(log_density, tuning.step_size, tuning.inverse_mass, **method.options())

    def step(key: Array, state: Any) -> tuple[Any, Report]:
        state, info = algorithm.step(key, state)
        return state, Report(info.is_divergent, info.energy, info.acceptance_rate, info.num_integration_steps)

    return Sampler(lambda key, position: algorithm.init(position), step)


def _algorithm(method: Nuts | Hmc) -> Any:
    return _blackjax().nuts if isinstance(method, Nuts) else _blackjax().hmc


def _blackjax() -> Any:
    # Imported late because the import starts a device; outside any trace because the import computes arrays.
    with jax.ensure_compile_time_eval():
        import blackjax

    return blackjax


def tune_mclmc(
    key: Array, log_density: LogDensity, position: Float[Array, " p"], *, num_steps: int
) -> Tuning:
    """Find the step, the length and the diagonal preconditioner of microcanonical Langevin dynamics."""
    blackjax = _blackjax()
    start_key, tune_key = jax.random.split(key)
    state = blackjax.mcmc.mclmc.init(position, log_density, start_key)
    state, tuned, used = blackjax.mclmc_find_L_and_step_size(
        blackjax.mcmc.mclmc.build_kernel(), num_steps, state, tune_key, logdensity_fn=log_density
    )
    # Two gradients a step, as in `mclmc`.
    return Tuning(state.position, tuned.step_size, tuned.inverse_mass_matrix, tuned.L, jnp.asarray(2 * used))


def mclmc(log_density: LogDensity, tuning: Tuning, steps_per_draw: int) -> Sampler:
    """Microcanonical Langevin dynamics without an accept step, so the draws have a bias of the step size."""
    blackjax = _blackjax()
    algorithm = blackjax.mclmc(
        log_density, tuning.length, tuning.step_size, inverse_mass_matrix=tuning.inverse_mass
    )

    def step(key: Array, state: Any) -> tuple[Any, Report]:
        state, info = _steps(algorithm, key, state, steps_per_draw)
        # Two gradients a step, because McLachlan's integrator has two stages.
        gradients = jnp.asarray(2 * steps_per_draw)
        # NaN times the log-density has its type, which `lax.scan` requires in 64-bit mode too.
        return state, Report(~info.nonans.all(), jnp.nan * state.logdensity, jnp.ones(()), gradients)

    return Sampler(lambda key, position: algorithm.init(position, key), step)


def _steps(algorithm: Any, key: Array, state: Any, count: int) -> tuple[Any, Any]:
    """The state after some steps, and the reports of all of them."""
    return jax.lax.scan(lambda s, k: algorithm.step(k, s), state, jax.random.split(key, count))


def elliptical(
    log_likelihood: LogDensity, mean: Float[Array, " p"], variance: Float[Array, " p"], steps_per_draw: int
) -> Sampler:
    """Elliptical slice sampling under a normal prior with independent entries; nothing to tune."""
    blackjax = _blackjax()
    algorithm = blackjax.elliptical_slice(log_likelihood, mean=mean, cov=variance)

    def step(key: Array, state: Any) -> tuple[Any, Report]:
        state, info = _steps(algorithm, key, state, steps_per_draw)
        used = jnp.sum(info.subiter)
        return state, Report(jnp.zeros((), bool), jnp.nan * state.logdensity, jnp.ones(()), used)

    return Sampler(lambda key, position: algorithm.init(position), step)


def pathfinder(key: Array, log_density: LogDensity, position: Float[Array, " p"]) -> Float[Array, " p"]:
    """A draw of Pathfinder's normal approximation along an ascent from a position."""
    blackjax = _blackjax()
    climb_key, draw_key = jax.random.split(key)
    state, _ = blackjax.pathfinder.approximate(climb_key, log_density, position)
    draw, _ = blackjax.pathfinder.sample(draw_key, state)
    return draw


class Particles(NamedTuple):
    """Weighted particles between prior and posterior.

    Attributes:
        positions: Vectors, shape (particle, p).
        weights: Weights, which sum to one.
        temperature: Power of the likelihood, from 0 to 1, that the weights target.
        log_evidence: Log of the estimated normalising constant at this power, in nats.
    """

    positions: Float[Array, "n p"]
    weights: Float[Array, " n"]
    temperature: Array
    log_evidence: Array


def temper(
    key: Array,
    particles: Particles,
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    *,
    target_ess: float,
    step_size: Array,
    num_integration_steps: int,
    num_moves: Array,
    summaries: Callable[[Array], Array],
) -> tuple[Particles, Array, Array]:
    """Resample, move by HMC at the current power of the likelihood, and weight for the next power.

    The next power is the highest that keeps the effective number above `target_ess`. After a stage at power 1
    the weights are equal and the particles are draws. The mass matrix is that of the weighted variances.

    Args:
        key: Random key.
        particles: Weighted particles.
        log_prior: Log-density of the prior.
        log_likelihood: Log-likelihood.
        target_ess: Smallest effective number, as a share of the particles.
        step_size: Step in units of the particles' spread.
        num_integration_steps: Leapfrog steps of a transition.
        num_moves: Transitions of each particle; traced, so that it may change without compiling again.
        summaries: From a particle to numbers, shape (k,), that show how far it moved.

    Returns:
        The particles, the mean acceptance probability of the moves, and the largest correlation, over
        summaries, between their values before and after the moves.
    """
    blackjax = _blackjax()
    # BlackJAX's solver needs one dtype, but a 32-bit model may run in 64-bit mode.
    prior, likelihood = (_of_type(f, particles.weights.dtype) for f in (log_prior, log_likelihood))
    mean = particles.weights @ particles.positions
    # The small number keeps the mass matrix finite if all particles share an ancestor.
    variance = particles.weights @ (particles.positions - mean) ** 2 + 1e-10
    hmc = blackjax.hmc
    algorithm = blackjax.adaptive_tempered_smc(
        prior,
        likelihood,
        _repeated(hmc.build_kernel()),
        hmc.init,
        {
            "step_size": step_size[None],
            "inverse_mass_matrix": variance[None],
            "num_integration_steps": jnp.asarray([num_integration_steps]),
            "num_moves": num_moves[None],
        },
        blackjax.smc.resampling.systematic,
        target_ess,
        num_mcmc_steps=1,
    )
    state = algorithm.init(particles.positions)
    state = state._replace(weights=particles.weights, tempering_param=particles.temperature)
    state, info = algorithm.step(key, state)
    grown = particles.log_evidence + info.log_likelihood_increment
    moved = Particles(state.particles, state.weights, state.tempering_param, grown)
    before, after = (
        jax.lax.map(summaries, x) for x in (particles.positions[info.ancestors], moved.positions)
    )
    return moved, jnp.mean(info.update_info), jnp.max(_correlation(before, after))


SHORTEST = 1 / 16
"""Ratio of the shortest to the longest step of SMC; log step is uniform between them."""


def _of_type(function: LogDensity, dtype: Any) -> LogDensity:
    return lambda vector: jnp.asarray(function(vector), dtype)


def _repeated(kernel: Callable) -> Callable:
    """A kernel that makes a traced number of moves and reports the mean acceptance probability."""

    def moved(
        key: Array, state: Any, log_density: LogDensity, num_moves: Array, step_size: Array, **options: Any
    ) -> tuple:
        def once(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            step_key, move_key = jax.random.split(jax.random.fold_in(key, i))
            # Steps that suit most particles are rejected where the target is narrow, so some are shorter.
            step = step_size * SHORTEST ** jax.random.uniform(step_key, dtype=step_size.dtype)
            state, info = kernel(move_key, carry[0], log_density, step_size=step, **options)
            return state, carry[1] + info.acceptance_rate

        start = state, jnp.zeros((), state.logdensity.dtype)
        state, total = jax.lax.fori_loop(0, num_moves, once, start)
        return state, total / num_moves

    return moved


def _correlation(x: Float[Array, "n k"], y: Float[Array, "n k"]) -> Float[Array, " k"]:
    """Correlation of each column; zero if a column does not vary."""
    x, y = x - x.mean(0), y - y.mean(0)
    scale = jnp.sqrt((x**2).sum(0) * (y**2).sum(0))
    return jnp.where(scale > 0, (x * y).sum(0) / jnp.where(scale > 0, scale, 1.0), 0.0)


def langevin(gradient: Callable[[Array, Any], Array], step_size: float) -> Kernel:
    """Stochastic-gradient Langevin dynamics with a constant step."""
    step = _blackjax().sgld(gradient).step
    return lambda key, vector, batch: step(key, vector, batch, step_size)


def stochastic_hamiltonian(
    gradient: Callable[[Array, Any], Array], step_size: float, num_integration_steps: int, friction: float
) -> Kernel:
    """Stochastic-gradient Hamiltonian Monte Carlo with friction."""
    step = _blackjax().sghmc(gradient, num_integration_steps, friction).step
    return lambda key, vector, batch: step(key, vector, batch, step_size)
