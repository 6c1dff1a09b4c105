r"""Stochastic-gradient Markov chain Monte Carlo over the latent sites of a prior.

With u the unconstrained vector of `bnlora.program.density`, g an unbiased estimate of the gradient of log
p(u, y) from a minibatch (its likelihood scaled by N / B), eps the step and xi standard normal:

    SGLD     u <- u + eps g + sqrt(2 eps) xi
    SGHMC    v ~ N(0, I), then L times
             (u, v) <- (u + eps v, (1 - alpha eps) v + eps g + sqrt(2 alpha eps) xi)

Neither has an accept step, so the step biases what they converge to. Where the posterior is normal with
precision h along an axis and every row is in the batch, SGLD's variance is 1 / (h (1 - eps h / 2)) and not
1 / h; it is stable for eps h < 2. SGHMC's step takes the gradient before the move, as BlackJAX has it. Its
linear map has the determinant 1 - alpha eps + eps^2 h: it is stable for eps h < alpha, and inflates the
variance by an amount of order eps. The noise of a minibatch's gradient adds a variance of order eps.

Rows come in the order of `fit`: shuffled epochs joined end to end.

References: Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; Chen et al.
(2014), Stochastic gradient Hamiltonian Monte Carlo, arXiv 1402.4102. The kernels are BlackJAX's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from bnlora._util.typing import Adapters, Parameters
from bnlora.data.batch import Batch, check_rows, minibatches
from bnlora.infer.mcmc.samplers import Kernel, langevin, stochastic_hamiltonian
from bnlora.program.cache import cache_prefix
from bnlora.program.density import Density, density, require_inside


@dataclass(frozen=True)
class Chain:
    """The stored draws of one chain; a posterior for `predict`.

    Attributes:
        density: The unconstrained view of the model's prior.
        vectors: Stored draws in the order of the chain, shape (draw, p).
    """

    density: Density
    vectors: Float[np.ndarray, "s p"]

    @property
    def model(self) -> Any:
        """The classifier."""
        return self.density.model

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Adapters of `num_draws` different stored draws, chosen at random, with a leading draw axis.

        Raises:
            ValueError: When fewer draws are stored.
        """
        key = check_key(key)
        if num_draws > len(self.vectors):
            raise ValueError(
                f"the chain has {len(self.vectors)} stored draws; num_draws must be at most that many, got "
                f"{num_draws}"
            )
        chosen = jax.random.choice(key, len(self.vectors), (num_draws,), replace=False)
        return jax.jit(lambda rows: jax.lax.map(self.density.adapters, rows))(
            self.vectors[np.asarray(chosen)]
        )

    def sites(self) -> dict[str, Array]:
        """Every stored draw of every latent site, in the order of the chain."""
        return jax.jit(lambda rows: jax.lax.map(self.density.sites, rows))(self.vectors)

    def __repr__(self) -> str:
        return f"Chain({len(self.vectors)} draws of {self.density.size:,} coordinates)"


class ChainDiverged(ValueError):
    """The chain left the finite numbers. `chain` has the draws that it stored before."""

    def __init__(self, chain: Chain, num_draws: int, remedy: str):
        super().__init__(
            f"only {len(chain.vectors)} of {num_draws} draws are finite; {remedy} (the finite ones are in "
            "this error's `chain`)"
        )
        self.chain = chain

    def __reduce__(self) -> tuple[Any, ...]:
        return error_parts(self)


@dataclass(frozen=True)
class Schedule:
    """How long a chain runs: `num_warmup + num_draws * thinning` steps.

    Attributes:
        num_draws: Draws to store.
        num_warmup: Steps before the first one counts.
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
        """Steps in all."""
        return self.num_warmup + self.num_draws * self.thinning


class _Setup(NamedTuple):
    key: Array
    view: Density
    train: Batch
    vector: Array
    schedule: Schedule


def sgld(
    key: Array,
    model: Any,
    train: Batch,
    schedule: Schedule,
    *,
    step_size: float,
    params: Parameters | None = None,
    init_values: Mapping[str, Array] | None = None,
    prefix_cache: Literal["memory", "off"] = "memory",
    console: Console | None = None,
) -> Chain:
    """Sample by stochastic-gradient Langevin dynamics with a constant step.

    Args:
        key: Random key of start, minibatches and noise.
        model: A `Classifier` whose prior has latent sites.
        train: Rows to fit.
        schedule: How long to run and what to store.
        step_size: `eps`, for the gradient summed over the data set; below 2 over the largest curvature.
        params: Values of the prior's NumPyro parameters, where it has any.
        init_values: Constrained value of every latent site to start from; where fits start when omitted.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        console: Where to draw the progress bar of that cache.

    Returns:
        The draws, as a posterior.

    Raises:
        ValueError: When a number is out of its range, a minibatch has more rows than there are, rows lack
            labels, or the prior has no latent site or a parameter without a value.
        ChainDiverged: When the chain leaves the finite numbers.
    """
    key = check_key(key)
    check_positive({"step_size": step_size})
    setup = _prepared(key, model, train, schedule, params, init_values, prefix_cache, console)

    def kernel(gradient: Callable) -> Kernel:
        return langevin(gradient, step_size)

    remedy = "lower `step_size`, which must stay below 2 over the largest curvature of the log-density"
    return _run(setup, kernel, remedy)


def sghmc(
    key: Array,
    model: Any,
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
) -> Chain:
    """Sample by stochastic-gradient Hamiltonian Monte Carlo with friction.

    Args:
        key: Random key of start, minibatches and noise.
        model: A `Classifier` whose prior has latent sites.
        train: Rows to fit.
        schedule: How long to run and what to store; a step is `num_integration_steps` updates with one
            minibatch.
        step_size: `eps`, below `friction` over the largest curvature; its square plays the part of SGLD's
            step.
        friction: `alpha`, so that `alpha * step_size` of the velocity is lost in an update; at most 1.
        num_integration_steps: Updates `L` from one fresh velocity to the next.
        params: As in `sgld`, like the arguments after it.
        init_values: Where to start.
        prefix_cache: Where activations below the adapters are kept, or `"off"`.
        console: Where to draw the progress bar of that cache.

    Returns:
        The draws, as a posterior.

    Raises:
        ValueError: As `sgld`, and when `friction * step_size` exceeds 1.
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

    def kernel(gradient: Callable) -> Kernel:
        return stochastic_hamiltonian(gradient, step_size, num_integration_steps, friction)

    remedy = (
        "lower `step_size`, which must stay below `friction` over the largest curvature of the log-density, "
        "or raise `friction`"
    )
    return _run(setup, kernel, remedy)


def _prepared(
    key: Array,
    model: Any,
    train: Batch,
    schedule: Schedule,
    params: Parameters | None,
    init_values: Mapping[str, Array] | None,
    prefix_cache: str,
    console: Console | None,
) -> _Setup:
    """Checked input, cached activations and the vector to start from."""
    check_option("prefix_cache", prefix_cache, ("memory", "off"))
    check_rows("training", train, model)
    check_batch_size(schedule.batch_size, len(train))
    view = density(model, params or {})
    start_key, chain_key = jax.random.split(key)
    if init_values is None:  # in one program: run as it is, a prior compiles each of its operations
        vector = require_inside(jax.jit(view.start, compiler_options=options(0))(start_key))
    else:
        vector = view.vector(init_values)
    if prefix_cache == "memory":
        train = cache_prefix(model, train, console=console)
    return _Setup(chain_key, view, train, vector, schedule)


def _run(setup: _Setup, kernel: Callable[[Callable], Kernel], remedy: str) -> Chain:
    """Run the chain as one compiled scan over stored draws; `remedy` says what to do where it diverges."""
    view, schedule, n_total = setup.view, setup.schedule, len(setup.train)
    data_key, noise_key = jax.random.split(setup.key)
    stream = minibatches(data_key, n_total, schedule.batch_size)
    rows = jnp.asarray(np.stack(list(islice(stream, schedule.num_steps))))
    last = schedule.num_warmup + schedule.thinning * np.arange(1, schedule.num_draws + 1)
    first = np.concatenate([[0], last[:-1]])

    @jax.jit
    def chain(weights: Any, train: Batch, rows: Array, vector: Array, spans: tuple) -> Array:
        def gradient(u: Array, batch: Batch) -> Array:
            return jax.grad(view.log_joint)(u, weights, batch, n_total)

        advance = kernel(gradient)

        def step(t: Array, u: Array) -> Array:
            return advance(jax.random.fold_in(noise_key, t), u, train[rows[t]])

        # The burn-in is part of the first span, so that the step is compiled once.
        def draw(u: Array, span: tuple) -> tuple[Array, Array]:
            begin, end = span
            u = jax.lax.fori_loop(begin, end, step, u)
            return u, u

        return jax.lax.scan(draw, vector, spans)[1]

    spans = jnp.asarray(first), jnp.asarray(last)
    vectors = np.asarray(chain(view.model.base.weights, setup.train, rows, setup.vector, spans))
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        remedy = broken_weights(view.model.base.weights) or remedy
        raise ChainDiverged(Chain(view, vectors[: int(finite.argmin())]), len(vectors), remedy)
    return Chain(view, vectors)
