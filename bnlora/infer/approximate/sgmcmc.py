r"""Stochastic-gradient Markov chain Monte Carlo over the latent sites of a prior.

With u the unconstrained vector of `bnlora.program.density`, g an unbiased estimate of the gradient of log
p(u, y) from a minibatch (its likelihood scaled by N / B), eps the step and xi standard normal:

    SGLD     u <- u + eps g + sqrt(2 eps) xi
    SGHMC    v ~ N(0, I), then L times
             (u, v) <- (u + eps v, (1 - alpha eps) v + eps g + sqrt(2 alpha eps) xi)

Neither has an accept step, so the draws have a bias that depends on the step. If the posterior is normal with
precision h along an axis and every row is in the batch, SGLD's variance is 1 / (h (1 - eps h / 2)) instead of
1 / h; it is stable for eps h < 2. SGHMC's step computes the gradient before the move, as in BlackJAX. Its
linear map has the determinant 1 - alpha eps + eps^2 h: it is stable for eps h < alpha, and increases the
variance by an amount of order eps. The noise of a minibatch's gradient adds a variance of order eps.

Minibatches are in the order of `fit`: shuffled epochs joined end to end.

References: Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; Chen et al.
(2014), Stochastic gradient Hamiltonian Monte Carlo, arXiv 1402.4102. The kernels are BlackJAX's.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import (
    broken_weights,
    check_at_least,
    check_batch_size,
    check_key,
    check_option,
    check_positive,
)
from bnlora._util.compilation import options
from bnlora._util.copying import error_parts
from bnlora._util.typing import Parameters
from bnlora.data.batch import Batch, check_rows, minibatches
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.run import record
from bnlora.infer.mcmc.samplers import Kernel, Tuning, langevin, stochastic_hamiltonian
from bnlora.infer.mcmc.target import Target
from bnlora.program.cache import cache_prefix
from bnlora.program.density import density, require_inside
from bnlora.program.protocol import Model


class ChainDiverged(ValueError):
    """Numbers of the chain were not finite any more. `chains` has the draws before that."""

    def __init__(self, chains: Chains, num_draws: int, remedy: str):
        super().__init__(
            f"only {chains.num_draws} of {num_draws} draws are finite; {remedy} (the finite ones are in this "
            "error's `chains`)"
        )
        self.chains = chains

    def __reduce__(self) -> tuple[Any, ...]:
        return error_parts(self)


@dataclass(frozen=True)
class Schedule:
    """How long a chain runs: `num_warmup + num_draws * thinning` steps.

    Attributes:
        num_draws: Number of draws to store.
        num_warmup: Steps before the first draw.
        thinning: Steps from one stored draw to the next.
        batch_size: Rows in a minibatch.
    """

    num_draws: int
    num_warmup: int
    batch_size: int
    thinning: int = 1

    def __post_init__(self):
        positive = {name: getattr(self, name) for name in ("num_draws", "batch_size", "thinning")}
        check_at_least(positive, 1)
        check_at_least({"num_warmup": self.num_warmup}, 0)

    @property
    def num_steps(self) -> int:
        """Total number of steps."""
        return self.num_warmup + self.num_draws * self.thinning


class _Setup(NamedTuple):
    key: Array
    target: Target
    cached: Batch
    vector: Array
    schedule: Schedule


class _Method(NamedTuple):
    """A sampler: its name and options for the record, its kernel, and the remedy if it diverges."""

    name: str
    options: dict[str, Any]
    kernel: Callable[[Callable], Kernel]
    remedy: str
    updates: int = 1


def sgld(
    key: Array,
    model: Model,
    train: Batch,
    schedule: Schedule,
    *,
    step_size: float,
    params: Parameters | None = None,
    init_values: Mapping[str, Array] | None = None,
    prefix_cache: Literal["memory", "off"] = "memory",
    console: Console | None = None,
) -> Chains:
    """Sample by stochastic-gradient Langevin dynamics with a constant step.

    Args:
        key: Random key of start, minibatches and noise.
        model: A `Classifier` whose prior has latent sites.
        train: Rows to fit.
        schedule: Number of steps and of draws to store.
        step_size: `eps`, for the gradient summed over all rows; must be below 2 over the largest curvature.
        params: Values of the prior's NumPyro parameters, if it has any.
        init_values: Constrained start value of every latent site; the start of fits when omitted.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        console: Where to draw the progress bar of that cache.

    Returns:
        The draws: one chain. It cannot be certified, because there is no accept step.

    Raises:
        ValueError: If a number is out of its range, a minibatch has more rows than there are, rows have no
            labels, or the prior has no latent site or a parameter without a value.
        ChainDiverged: If numbers of the chain are not finite.
    """
    key = check_key(key)
    check_positive({"step_size": step_size})
    setup = _prepared(key, model, train, schedule, params, init_values, prefix_cache, console)

    remedy = "lower `step_size`, which must stay below 2 over the largest curvature of the log-density"
    method = _Method("SGLD", {"step_size": step_size}, partial(langevin, step_size=step_size), remedy)
    return _run(key, setup, method)


def sghmc(
    key: Array,
    model: Model,
    train: Batch,
    schedule: Schedule,
    *,
    step_size: float,
    friction: float,
    num_integration_steps: int = 10,
    params: Parameters | None = None,
    init_values: Mapping[str, Array] | None = None,
    prefix_cache: Literal["memory", "off"] = "memory",
    console: Console | None = None,
) -> Chains:
    """Sample by stochastic-gradient Hamiltonian Monte Carlo with friction.

    Args:
        key: Random key of start, minibatches and noise.
        model: A `Classifier` whose prior has latent sites.
        train: Rows to fit.
        schedule: Number of steps and of draws to store; a step is `num_integration_steps` updates with one
            minibatch.
        step_size: `eps`, must be below `friction` over the largest curvature; its square corresponds to
            SGLD's step.
        friction: `alpha`: each update reduces the velocity by the share `alpha * step_size`, at most 1.
        num_integration_steps: Updates `L` from one fresh velocity to the next.
        params: As in `sgld`, like the arguments after it.
        init_values: Start values.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        console: Where to draw the progress bar of that cache.

    Returns:
        The draws: one chain. It cannot be certified, because there is no accept step.

    Raises:
        ValueError: As `sgld`, and if `friction * step_size` exceeds 1.
        ChainDiverged: As `sgld`.
    """
    key = check_key(key)
    check_positive({"step_size": step_size, "friction": friction})
    check_at_least({"num_integration_steps": num_integration_steps}, 1)
    if friction * step_size > 1:
        raise ValueError(
            f"friction * step_size must be at most 1; got {friction * step_size:g}, lower friction to at "
            f"most {1 / step_size:g}"
        )
    setup = _prepared(key, model, train, schedule, params, init_values, prefix_cache, console)

    options: dict[str, Any] = {
        "step_size": step_size,
        "num_integration_steps": num_integration_steps,
        "friction": friction,
    }
    remedy = (
        "lower `step_size`, which must stay below `friction` over the largest curvature of the log-density, "
        "or raise `friction`"
    )
    method = _Method(
        "SGHMC", options, partial(stochastic_hamiltonian, **options), remedy, num_integration_steps
    )
    return _run(key, setup, method)


def _prepared(
    key: Array,
    model: Model,
    train: Batch,
    schedule: Schedule,
    params: Parameters | None,
    init_values: Mapping[str, Array] | None,
    prefix_cache: str,
    console: Console | None,
) -> _Setup:
    """Checked input, cached activations and the start vector."""
    check_option("prefix_cache", prefix_cache, ("memory", "off"))
    check_rows("training", train, model)
    check_batch_size(schedule.batch_size, len(train))
    view = density(model, params or {})
    start_key, chain_key = jax.random.split(key)
    if init_values is None:  # in one program; otherwise JAX compiles each operation by itself
        vector = require_inside(jax.jit(view.start, compiler_options=options())(start_key))
    else:
        vector = view.vector(init_values)
    cached = cache_prefix(model, train, console=console) if prefix_cache == "memory" else train
    # The result keeps the rows without the cache, so that the cache can be freed.
    return _Setup(chain_key, Target(view, train, train), cached, vector, schedule)


def _run(key: Array, setup: _Setup, method: _Method) -> Chains:
    """Run the chain as one compiled scan over stored draws."""
    began = time.perf_counter()
    view, schedule, n_total = setup.target.view, setup.schedule, len(setup.cached)
    data_key, noise_key = jax.random.split(setup.key)
    stream = minibatches(data_key, n_total, schedule.batch_size)
    rows = jnp.asarray(np.stack(list(islice(stream, schedule.num_steps))))
    last = schedule.num_warmup + schedule.thinning * np.arange(1, schedule.num_draws + 1)
    first = np.concatenate([[0], last[:-1]])

    @jax.jit
    def chain(weights: Any, train: Batch, rows: Array, vector: Array, spans: tuple) -> Array:
        def gradient(u: Array, batch: Batch) -> Array:
            return jax.grad(view.log_joint)(u, weights, batch, n_total)

        advance = method.kernel(gradient)

        def step(t: Array, u: Array) -> Array:
            return advance(jax.random.fold_in(noise_key, t), u, train[rows[t]])

        # The warm-up is part of the first span, so that the step is compiled once.
        def draw(u: Array, span: tuple) -> tuple[Array, Array]:
            begin, end = span
            u = jax.lax.fori_loop(begin, end, step, u)
            return u, u

        return jax.lax.scan(draw, vector, spans)[1]

    # Draw i runs the steps first[i] <= t < last[i], each with the key `fold_in(noise_key, t)`.
    spans = jnp.asarray(first), jnp.asarray(last)
    vectors = np.asarray(chain(view.model.base.weights, setup.cached, rows, setup.vector, spans))
    finite = np.isfinite(vectors).all(1)
    kept = len(vectors) if finite.all() else int(finite.argmin())
    about = record(key, method.name, "step", method.options, asdict(schedule) | {"num_chains": 1})
    about |= {"seconds": time.perf_counter() - began, "stopped": "done" if finite.all() else "diverged"}
    chains = _chains(setup, method, vectors[:kept], about)
    if not finite.all():
        raise ChainDiverged(chains, len(vectors), broken_weights(view.model.base.weights) or method.remedy)
    return chains


def _chains(
    setup: _Setup, method: _Method, vectors: Float[np.ndarray, "s p"], about: Mapping[str, Any]
) -> Chains:
    """The draws of one chain; its kernel has no energy and accepts every move."""
    schedule = setup.schedule
    shape = 1, len(vectors) * schedule.thinning
    stats = {
        "divergent": np.zeros(shape, bool),
        "energy": np.full(shape, np.nan),
        "acceptance": np.ones(shape),
        "num_gradients": np.full(shape, method.updates),
    }
    numbers = setup.vector, method.options["step_size"], jnp.ones(setup.target.view.size), 0.0
    one_chain = (jnp.asarray(x)[None] for x in (*numbers, schedule.num_warmup * method.updates))
    tuning = Tuning(*one_chain)
    return Chains(setup.target, vectors[None], stats, tuning, about, schedule.thinning)
