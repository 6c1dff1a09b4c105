r"""Training-free Bayesianization: the most isotropic noise on a fitted update that a criterion allows.

For every layer, with the thin SVD b = U diag(d) V^T of its second factor,

    b' = U diag(d),   a' = V^T a,   q(a'_ij) = N(a'_ij, (sigma / d_i)^2)

so b' a' = b a. The noise of the update is b' (a' - E a') = sigma U Z with Z standard normal: the same size in
every direction of the update. All layers have the same sigma: the largest at which a criterion on anchor rows
gets worse by at most a tolerance.

If b is rank deficient, sigma / d_i is unbounded as d_i goes to zero. The noise of the update, sigma u_i z_i,
then has a limit, but u_i is arbitrary. Such directions (d_i below the rounding error of d_1) are not part of
the fitted update: they get no noise, and their column of b' is zero. A layer with b = 0 keeps the base's
weights.

Reference: Shi et al. (2024), Training-free Bayesianization for low-rank adapters of large language models,
arXiv 2412.05723.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora import metrics
from bnlora._util.checks import check_at_least, check_key, check_option, check_positive
from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.infer.approximate.mode import mode_of
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import predict_with_draws
from bnlora.program.likelihoods import require_softmax
from bnlora.program.protocol import Model

Criterion = Literal["nll", "accuracy"]
_MOST_DOUBLINGS = 40


class Rotated(NamedTuple):
    """An adapter with the same update whose `b` has orthogonal columns.

    Attributes:
        a: `V^T a`, shape (layer, rank, d_in).
        b: `U diag(d)`, shape (layer, d_out, rank).
        widths: `1 / d`, shape (layer, rank); zero if `d` is zero up to rounding.
    """

    a: Float[np.ndarray, "layer rank d_in"]
    b: Float[np.ndarray, "layer d_out rank"]
    widths: Float[np.ndarray, "layer rank"]


def rotated(a: Float[np.ndarray, "layer rank d_in"], b: Float[np.ndarray, "layer d_out rank"]) -> Rotated:
    """Rotate an adapter so that the columns of `b` are orthogonal; `b a` does not change."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d_out, rank = b.shape[1:]
    # The thin SVD of a `b` that is wider than high lacks columns of V; rows of zeros below it add them.
    high = np.pad(b, ((0, 0), (0, max(rank - d_out, 0)), (0, 0)))
    U, d, Vt = np.linalg.svd(high, full_matrices=False)
    smallest = max(high.shape[1:]) * np.finfo(np.float32).eps * d[:, :1]
    present = d > smallest
    widths = np.divide(1.0, d, out=np.zeros_like(d), where=present)
    return Rotated(Vt @ a, (U * (d * present)[:, None, :])[:, :d_out], widths)


@dataclass(frozen=True)
class TrainingFree:
    """Independent normals on the first factors of rotated adapters; a posterior for `predict`.

    Attributes:
        model: The classifier.
        families: The rotated adapter of each family.
        sigma: Standard deviation of the noise of the update.
    """

    model: Model
    families: dict[str, Rotated]
    sigma: float

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws."""
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        draws = {}
        for k, (name, (a, b, widths)) in zip(
            jax.random.split(key, len(self.families)), self.families.items(), strict=True
        ):
            noise = jax.random.normal(k, (num_draws, *a.shape))
            wide = jnp.asarray(self.sigma * widths, jnp.float32)[..., None]
            draws[name] = {
                "a": jnp.asarray(a, jnp.float32) + wide * noise,
                "b": jnp.broadcast_to(jnp.asarray(b, jnp.float32), (num_draws, *b.shape)),
            }
        return draws

    def __repr__(self) -> str:
        widths = np.concatenate([family.widths.ravel() for family in self.families.values()])
        return (
            f"TrainingFree(sigma {self.sigma:.3g}, {np.count_nonzero(widths)} of {len(widths)} directions of "
            "the update with noise)"
        )


def training_free(
    key: Array,
    posterior: Posterior,
    data: Batch,
    *,
    tolerance: float,
    criterion: Criterion = "nll",
    num_draws: int = 10,
    num_bisections: int = 8,
    batch_size: int = 32,
    console: Console | None = None,
) -> TrainingFree:
    """Add to a fitted point the most noise that keeps a criterion within a tolerance.

    Args:
        key: Random key of the draws; the same at every sigma.
        posterior: A fit of a point: with the prior `priors.point()`, or with a guide of deltas.
        data: Rows with labels on which the criterion is measured. Do not report results on these rows.
        tolerance: How much worse than the point the criterion may be: nats of the mean negative
            log-likelihood, or share of the rows classified correctly.
        criterion: `"nll"` or `"accuracy"`.
        num_draws: Number of draws in a prediction.
        num_bisections: Number of bisections of the ratio, at first 2, between a sigma that fails and one
            that passes.
        batch_size: Rows to run at a time.
        console: Where to draw progress bars; the terminal or notebook when omitted.

    Returns:
        The posterior around the fit, as wide as the criterion allows.

    Raises:
        ValueError: If the fit is not of a point or its update is zero, rows have no labels, a number is out
            of its range, or all sigmas pass or all fail.
    """
    key = check_key(key)
    check_option("criterion", criterion, get_args(Criterion))
    check_positive({"tolerance": tolerance})
    check_at_least({"num_draws": num_draws, "num_bisections": num_bisections, "batch_size": batch_size}, 1)
    require_softmax(posterior.model.likelihood, "training-free Bayesianization")
    posterior.model.check_outcomes("anchor", data)
    mode = mode_of(posterior, "training-free Bayesianization")
    families = {name: rotated(np.asarray(pair["a"]), np.asarray(pair["b"])) for name, pair in mode.items()}
    if not any(family.widths.any() for family in families.values()):
        raise ValueError(
            "training-free Bayesianization needs a fitted update; here `b` is zero in every layer"
        )
    still = TrainingFree(posterior.model, families, 0.0)

    def loss(sigma: float, draws: int) -> float:
        adapters = replace(still, sigma=sigma).draw_adapters(key, draws)
        prediction = predict_with_draws(
            posterior.model, adapters, data, batch_size=batch_size, console=console
        )
        labels = np.asarray(data.labels)
        if criterion == "nll":
            return metrics.nll(prediction.log_probs, labels)
        return -metrics.accuracy(prediction.log_probs, labels)

    most = loss(0.0, 1) + tolerance
    return replace(
        still, sigma=largest(lambda sigma: loss(sigma, num_draws) <= most, num_bisections=num_bisections)
    )


def largest(passes: Callable[[float], bool], *, num_bisections: int, start: float = 0.01) -> float:
    """The largest number that passes, up to a factor of `2 ** 2 ** -num_bisections`.

    Doubling or halving from `start` gives a pair of which the lower number passes and the upper fails.
    Bisection then reduces their ratio. If passing is not monotone, the result is the lower end of one such
    pair.

    Raises:
        ValueError: If no number passes, or all do.
    """
    sigma, rising = start, passes(start)
    for _ in range(_MOST_DOUBLINGS):
        following = sigma * 2 if rising else sigma / 2
        if passes(following) != rising:
            break
        sigma = following
    else:
        what = "every sigma up to" if rising else "no sigma down to"
        raise ValueError(
            f"{what} {sigma:.1e} passes the criterion; change its tolerance or use other anchor rows"
        )
    low = sigma if rising else following
    ratio = 2.0
    for _ in range(num_bisections):
        ratio **= 0.5
        low = low * ratio if passes(low * ratio) else low
    return low
