r"""Training-free Bayesianization: as much isotropic noise on a fitted update as accuracy allows.

For every layer, with the thin SVD b = U diag(d) V^T of its second factor,

    b' = U diag(d),   a' = V^T a,   q(a'_ij) = N(a'_ij, (sigma / d_i)^2)

so b' a' = b a, and the update's noise b' (a' - E a') = sigma U Z has Z standard normal: the same size in
every direction that the update can take. One sigma serves all layers: the largest at which a criterion on
anchor rows drops by no more than a tolerance.

Where b is rank deficient, sigma / d_i has no limit while the noise of the update does, sigma u_i z_i, with
a u_i that is arbitrary. Such directions (d_i below the rounding error of d_1) are no part of the fitted
update: they get no noise, and their column of b' is zero. A layer with b = 0 stays as the base has it.

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
from bnlora.data.batch import Batch, check_labels
from bnlora.infer.approximate.mode import mode_of
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import predict_with_draws
from bnlora.program.protocol import Model

Criterion = Literal["nll", "accuracy"]
_MOST_DOUBLINGS = 40


class Rotated(NamedTuple):
    """An adapter of equal update whose `b` has orthogonal columns.

    Attributes:
        a: `V^T a`, shape (layer, rank, d_in).
        b: `U diag(d)`, shape (layer, d_out, rank).
        widths: `1 / d`, shape (layer, rank); zero where `d` is zero up to rounding.
    """

    a: Float[np.ndarray, "layer rank d_in"]
    b: Float[np.ndarray, "layer d_out rank"]
    widths: Float[np.ndarray, "layer rank"]


def rotated(a: Float[np.ndarray, "layer rank d_in"], b: Float[np.ndarray, "layer d_out rank"]) -> Rotated:
    """Turn an adapter so that the columns of `b` are orthogonal, leaving `b a` as it is."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d_out, rank = b.shape[1:]
    # With rows of zeros below, a `b` that is wider than high has all of V in its thin SVD too.
    high = np.pad(b, ((0, 0), (0, max(rank - d_out, 0)), (0, 0)))
    U, d, Vt = np.linalg.svd(high, full_matrices=False)
    smallest = max(high.shape[1:]) * np.finfo(np.float32).eps * d[:, :1]
    present = d > smallest
    widths = np.divide(1.0, d, out=np.zeros_like(d), where=present)
    return Rotated(Vt @ a, (U * (d * present)[:, None, :])[:, :d_out], widths)


@dataclass(frozen=True)
class TrainingFree:
    """Independent normals on the first factors of turned adapters; a posterior for `predict`.

    Attributes:
        model: The classifier.
        families: The turned adapter of each family.
        sigma: Size of the noise of the update.
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
    """Give a fitted point the most noise that leaves the criterion within a tolerance.

    Args:
        key: Random key of the draws, the same at every sigma that is tried.
        posterior: A fit of a point: of the prior `priors.point()`, or of a guide of deltas.
        data: Rows with labels on which the criterion is measured; not rows that are reported.
        tolerance: How much worse than the point it may become: nats of the mean negative log-likelihood, or
            the fraction of rows that are rightly classified.
        criterion: `"nll"` or `"accuracy"`.
        num_draws: Draws of a prediction.
        num_bisections: Halvings of the ratio between a sigma that passes and one that fails, at first 2.
        batch_size: Rows to run at a time.
        console: Where to draw progress bars; the terminal or notebook when omitted.

    Returns:
        The posterior around the fit, as wide as the criterion allows.

    Raises:
        ValueError: When the fit is not of a point or its update is zero, rows lack labels, a number is out
            of its range, or no sigma passes or fails.
    """
    key = check_key(key)
    check_option("criterion", criterion, get_args(Criterion))
    check_positive({"tolerance": tolerance})
    check_at_least({"num_draws": num_draws, "num_bisections": num_bisections, "batch_size": batch_size}, 1)
    check_labels("anchor", data, len(posterior.model.label_ids))
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

    From `start` by doubling or halving to a pair of which the lower passes and the upper fails, then by
    bisection of the ratio. Where passing is not monotone, it is the lower end of some such pair.

    Raises:
        ValueError: When none of the numbers tried passes, or all do.
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
            f"{what} {sigma:.1e} passes the criterion; change its tolerance or take other anchor rows"
        )
    low = sigma if rising else following
    ratio = 2.0
    for _ in range(num_bisections):
        ratio **= 0.5
        low = low * ratio if passes(low * ratio) else low
    return low
