r"""SWAG: a Gaussian fitted to the iterates of stochastic gradient descent at a constant rate.

Descent continues from a fitted point at a constant rate, so that it keeps moving. From the iterates
theta_1, ..., theta_T it computes

    mean = 1/T sum_t theta_t,   Sigma = diag(1/T sum_t (theta_t - mean)^2),   D = last K of (theta_t - mean_t)
    q(theta) = N(mean, (Sigma + D D^T / (K - 1)) / 2),     mean_t the mean of the first t

over the adapter weights. The width depends on the rate and the minibatches: it is a heuristic, not a bound.

Reference: Maddox et al. (2019), A simple baseline for Bayesian uncertainty in deep learning, arXiv
1902.02476.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
import optax
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_at_least, check_key, check_positive
from bnlora._util.typing import Adapters, Parameters
from bnlora.infer.approximate.mode import flattened, mode_of, unflattened
from bnlora.infer.svi.fit import fit as fit_svi
from bnlora.infer.svi.options import Optimisation
from bnlora.infer.svi.result import Fit
from bnlora.program.draws import draw_adapters
from bnlora.program.protocol import Model


@dataclass(frozen=True)
class Moments:
    """Statistics of a stream of iterates.

    Attributes:
        count: Number of iterates.
        mean: Their mean, shape (p,).
        squares: Sum of squared distances to the mean, shape (p,).
        deviations: The last iterates, each minus the mean of the iterates up to it, shape (k, p).
    """

    count: int
    mean: Float[np.ndarray, " p"]
    squares: Float[np.ndarray, " p"]
    deviations: Float[np.ndarray, "k p"]

    @property
    def variance(self) -> Float[np.ndarray, " p"]:
        """Variance of each coordinate over the iterates."""
        return self.squares / self.count


def no_moments(size: int) -> Moments:
    """Moments of no iterate of `size` coordinates."""
    return Moments(0, np.zeros(size), np.zeros(size), np.zeros((0, size)))


def updated(moments: Moments, iterate: Float[np.ndarray, " p"], rank: int) -> Moments:
    """The moments with one more iterate, keeping the last `rank` deviations (Welford's recursion)."""
    count = moments.count + 1
    before = iterate - moments.mean
    mean = moments.mean + before / count
    deviations = np.concatenate([moments.deviations, (iterate - mean)[None]])[-rank:]
    # Old times new deviation: adds up squared distances to the final mean without cancellation.
    return Moments(count, mean, moments.squares + before * (iterate - mean), deviations)


@dataclass(frozen=True)
class Swag:
    """The Gaussian of SWAG; a posterior for `predict`.

    Attributes:
        model: The classifier.
        mode: The adapters that descent started from.
        moments: Moments of the iterates, coordinates in the order of the flattened adapters.
        stopped: Why descent ended: "steps" (all done) or "interrupted".
    """

    model: Model
    mode: Adapters
    moments: Moments
    stopped: str = "steps"

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws."""
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        k_diagonal, k_low = jax.random.split(key)
        D = self.moments.deviations
        wide = np.asarray(jax.random.normal(k_diagonal, (num_draws, D.shape[1])), np.float64)
        low = np.asarray(jax.random.normal(k_low, (num_draws, len(D))), np.float64)
        # Covariance Sigma + D D^T / (k - 1); the division by sqrt(2) below halves it.
        spread = wide * np.sqrt(self.moments.variance) + low @ D / np.sqrt(len(D) - 1)
        return unflattened(self.moments.mean + spread / np.sqrt(2), self.mode)

    def __repr__(self) -> str:
        D = self.moments.deviations
        early = "" if self.stopped == "steps" else f", {self.stopped} before the last step"
        return (
            f"Swag({self.moments.count} iterates of {D.shape[1]:,} weights, {len(D)} deviations kept{early})"
        )


def swag(
    key: Array,
    fit: Fit,
    *,
    learning_rate: float,
    num_steps: int,
    batch_size: int,
    every: int = 1,
    rank: int = 20,
    momentum: float = 0.0,
    clip_norm: float = 10.0,
    prefix_cache: Literal["memory", "off"] = "memory",
    console: Console | None = None,
) -> Swag:
    """Continue descent from a fitted point at a constant rate, and fit a Gaussian to the iterates.

    Args:
        key: Random key of the minibatches.
        fit: A fit of a point: of the prior `priors.point()`, or of a guide of deltas.
        learning_rate: The constant rate, for the gradient of the negative objective per row.
        num_steps: Steps of descent.
        batch_size: Rows in a minibatch.
        every: Steps from one iterate that is collected to the next.
        rank: Number K of deviations kept.
        momentum: Momentum of the descent.
        clip_norm: The gradient is clipped to this norm.
        prefix_cache: As in `fit`.
        console: As in `fit`.

    Returns:
        The Gaussian. An interrupt (Ctrl-C, or the stop button of a notebook) ends descent early. If there are
        enough iterates, the Gaussian of these is returned, and the repr reports the interrupt.

    Raises:
        ValueError: If the fit is not of a point, a size is out of its range, or there are fewer than `rank`
            iterates, also after an interrupt. `rank` must be at least two.
        FitDiverged: If numbers of the descent are not finite.
    """
    key = check_key(key)
    check_positive({"learning_rate": learning_rate})
    check_at_least({"num_steps": num_steps, "every": every}, 1)
    check_at_least({"rank": rank}, 2)
    if num_steps // every < rank:
        raise ValueError(
            f"{num_steps} steps give {num_steps // every} iterates, fewer than rank={rank}; take at least "
            f"num_steps={rank * every}"
        )
    mode = mode_of(fit, "SWAG")
    moments = no_moments(sum(x.size for x in jax.tree.leaves(mode)))
    one_draw = jax.jit(lambda params: draw_adapters(fit.draw_key, fit.model, fit.guide, params, 1))

    def collect(step: int, params: Parameters) -> None:
        nonlocal moments
        if step % every == 0:
            moments = updated(moments, flattened(one_draw(params))[0], rank)

    descent = optax.sgd(learning_rate, momentum or None)
    descended = fit_svi(
        key,
        fit.model,
        fit.guide,
        fit.train,
        descent,
        optimisation=Optimisation(scale_optimizer=descent, clip_norm=clip_norm),
        init_params=fit.params,
        on_step=collect,
        num_steps=num_steps,
        batch_size=batch_size,
        prefix_cache=prefix_cache,
        console=console,
    )
    if moments.count < rank:
        raise ValueError(
            f"interrupted with {moments.count} iterates; expected at least rank={rank} of them, after "
            f"num_steps={rank * every}"
        )
    return Swag(fit.model, mode, moments, descended.stopped)
