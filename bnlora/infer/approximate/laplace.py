r"""Laplace's approximation around a fitted point.

    q(W) = N(W; mode, (G + Lambda)^{-1}),      G = sum_i J_i^T (diag(p_i) - p_i p_i^T) J_i

with J_i the Jacobian of row i's logits in the adapter weights at the mode, p_i its class probabilities and
Lambda the prior's precision. G is the generalised Gauss-Newton matrix: the Hessian of the negative
log-likelihood without the curvature of the logits, so it is positive semidefinite. It can be kept exactly or
in a structure (`bnlora.infer.approximate.curvature`).

`predict` runs the draws through the network, like those of any posterior. `linearised` runs them through its
linearisation at the mode, `logits(mode) + J (W - mode)`, whose Laplace approximation this is if G is exact.

References: MacKay (1992); Immer et al. (2021), Improving predictions of Bayesian neural nets via local
linearization, arXiv 2008.08400; Daxberger et al. (2021), Laplace redux, arXiv 2106.14806; Yang et al. (2024),
Bayesian low-rank adaptation for large language models, arXiv 2308.13111, for adapters.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy  # imports its submodules when they are first used
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from numpyro import handlers
from rich.console import Console

from bnlora import metrics
from bnlora._util.checks import check_at_least, check_key, check_option, check_positive
from bnlora._util.typing import FACTORS, Adapters
from bnlora.data.batch import Batch, check_rows
from bnlora.infer.approximate import curvature as algebra
from bnlora.infer.approximate.mode import flattened, mode_of, unflattened
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import Prediction
from bnlora.program.cache import tracked_parts
from bnlora.program.likelihoods import require_softmax
from bnlora.program.protocol import Model

Structure = Literal["diagonal", "kronecker", "low-rank", "full"]
Precision = float | Mapping[str, float] | Literal["model", "evidence"]

_LOG_PRECISIONS = (-12.0, 24.0)  # range of the search for the largest evidence: 6e-6 to 3e10


@dataclass(frozen=True)
class Laplace:
    """A Gaussian around a mode; a posterior for `predict`.

    Attributes:
        model: The classifier.
        mode: The adapters at its centre.
        structure: Structure of the curvature.
        curvature: The data's curvature in the coordinates `profile^{1/2} W`.
        profile: Relative prior precision of each weight, shape (p,).
        precision: Factor of `profile` in the prior precision.
        log_evidence: Laplace's approximation of `log p(y)`, in nats.
    """

    model: Model
    mode: Adapters
    structure: Structure
    curvature: algebra.Curvature
    profile: Float[np.ndarray, " p"]
    precision: float
    log_evidence: float

    def deviations(self, key: Array, num_draws: int) -> Adapters:
        """Draws of `W - mode`, with a leading draw axis."""
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        normals = np.asarray(jax.random.normal(key, (num_draws, self.curvature.size)), np.float64)
        return unflattened(self.curvature.spread(normals, self.precision) / np.sqrt(self.profile), self.mode)

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws."""
        deviations = self.deviations(key, num_draws)
        return jax.tree.map(jnp.add, self.mode, deviations)

    def __repr__(self) -> str:
        return (
            f"Laplace({self.structure} curvature of {self.curvature.size:,} weights, prior precision "
            f"{self.precision:.3g} times {self.profile.min():.3g} to {self.profile.max():.3g}, "
            f"log evidence {self.log_evidence:,.1f} nats)"
        )


def laplace(
    posterior: Posterior,
    train: Batch,
    *,
    structure: Structure = "kronecker",
    precision: Precision = "model",
    rank: int | None = None,
    batch_size: int = 16,
    memory_limit: int = 2**30,
    console: Console | None = None,
) -> Laplace:
    """Put a Gaussian around a fitted point.

    Args:
        posterior: A fit of a point: with the prior `priors.point()`, or with a guide of deltas.
        train: The training rows, `fit.train`.
        structure: `"full"` keeps the exact curvature by its eigenpairs, at most rows x classes of them;
            `"low-rank"` keeps the `rank` leading ones; `"kronecker"` the nearest Kronecker product of each
            weight matrix's block; `"diagonal"` only the diagonal, and does not keep the Jacobian.
        precision: Prior precision of a weight. `"model"` is that of the model's prior, with which the mode of
            a guide of deltas was fitted. Otherwise a number, one number each for the factors `"a"` and `"b"`,
            or `"evidence"`, the number that maximises Laplace's log-evidence with the mode fixed.
        rank: Number of eigenpairs, only with `"low-rank"`.
        batch_size: Rows to differentiate at a time.
        memory_limit: Largest size in bytes of the Jacobian, which all structures except `"diagonal"` keep.
        console: Where to draw the progress bar; the terminal or notebook when omitted.

    Returns:
        The posterior, with its log-evidence.

    Raises:
        ValueError: If the fit is not of a point, rows have no labels, an option is unknown or contradicts
            another, the Jacobian exceeds `memory_limit`, the model's prior is not one of independent centred
            normals, or the log-evidence has no maximum.
    """
    check_option("structure", structure, get_args(Structure))
    check_at_least({"batch_size": batch_size}, 1)
    if (rank is not None) != (structure == "low-rank"):
        raise ValueError(f"structure='low-rank' and a `rank` go together; got {structure!r} and rank={rank}")
    model = posterior.model
    require_softmax(model.likelihood, "Laplace's approximation")
    check_rows("training", train, model)
    mode = mode_of(posterior, "Laplace's approximation")
    profile, factor = _profile(model, mode, precision)
    local = _Local(model, mode, train, np.sqrt(profile), batch_size, console)
    if structure != "diagonal":
        local.check_memory(memory_limit)
    curvature, log_likelihood = _curvature(local, structure, rank)
    centre = flattened(jax.tree.map(lambda x: x[None], mode))[0]
    evidence = partial(
        algebra.log_evidence,
        curvature,
        log_likelihood=log_likelihood,
        squared_norm=float(np.sum(profile * centre**2)),
    )
    tau = _maximiser(evidence) if factor is None else factor
    return Laplace(model, mode, structure, curvature, profile, tau, evidence(tau))


def linearised(
    key: Array,
    laplace: Laplace,
    data: Batch,
    *,
    num_draws: int = 32,
    batch_size: int = 32,
    console: Console | None = None,
) -> Prediction:
    """Predict with the network linearised at the mode: `softmax(logits(mode) + J (W - mode))` by draw.

    Args:
        key: Random key of the draws; the draws equal those of `laplace.draw_adapters` with this key.
        laplace: The approximation.
        data: Rows to predict; labels are not read.
        num_draws: Number of draws.
        batch_size: Rows to run at a time.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        Log-probabilities of the rows under each draw.

    Raises:
        ValueError: If there are no rows, or `num_draws` or `batch_size` is below 1.

    Reference: Immer et al. (2021), arXiv 2008.08400.
    """
    key = check_key(key)
    check_at_least({"rows": len(data), "num_draws": num_draws, "batch_size": batch_size}, 1)
    laplace.model.check_tokens(data)
    deviations = laplace.deviations(key, num_draws)

    @jax.jit
    def log_probs(weights: Any, batch: Batch) -> Array:
        centre, push = jax.linearize(lambda one: laplace.model.logits(weights, one, batch), laplace.mode)
        return jax.lax.map(lambda one: jax.nn.log_softmax(centre + push(one)), deviations)

    by_draw = np.empty((num_draws, len(data), laplace.model.num_classes), np.float64)
    for part in tracked_parts(data, batch_size, "predict", console):
        computed = np.asarray(log_probs(laplace.model.base.weights, part.batch))
        by_draw[:, part.rows] = computed[:, : len(part.rows)]
    return Prediction(by_draw)


class _Piece(NamedTuple):
    """Logits of some rows, and their Jacobians in the coordinates in which the prior is isotropic."""

    rows: np.ndarray
    logits: Float[np.ndarray, "n c"]
    jacobian: Float[np.ndarray, "n c p"]


@dataclass(frozen=True)
class _Local:
    """The network near the mode, a few rows at a time."""

    model: Model
    mode: Adapters
    train: Batch
    root: Float[np.ndarray, " p"]
    batch_size: int
    console: Console | None

    @property
    def classes(self) -> int:
        return self.model.num_classes

    def pieces(self) -> Iterator[_Piece]:
        vector, unravel = ravel_pytree(self.mode)

        @jax.jit
        def of_rows(weights: Any, batch: Batch) -> tuple[Array, Array]:
            def of_row(row: Batch) -> tuple[Array, Array]:
                single = jax.tree.map(lambda x: x[None], row)

                def logits(v: Array) -> tuple[Array, Array]:
                    value = self.model.logits(weights, unravel(v), single)[0]
                    return value, value

                jacobian, value = jax.jacrev(logits, has_aux=True)(vector)
                return value, jacobian

            return jax.vmap(of_row)(batch)

        for part in tracked_parts(self.train, self.batch_size, "curvature", self.console):
            logits, jacobian = of_rows(self.model.base.weights, part.batch)
            kept = slice(len(part.rows))  # the others only pad the last part
            whitened = np.asarray(jacobian[kept], np.float64) / self.root
            yield _Piece(part.rows, np.asarray(logits[kept], np.float64), whitened)

    def check_memory(self, limit: int) -> None:
        rows, weights = len(self.train), len(self.root)
        size = rows * self.classes * weights * 8
        if size > limit:
            raise ValueError(
                f"the Jacobian of {rows} rows, {self.classes} classes and {weights:,} weights takes "
                f"{size / 2**20:,.1f} MiB, more than the limit of {limit / 2**20:,.1f} MiB; raise "
                "`memory_limit` or use structure='diagonal', which does not keep it"
            )


def _curvature(local: _Local, structure: Structure, rank: int | None) -> tuple[algebra.Curvature, float]:
    """The curvature in its structure, and the log-likelihood of the rows at the mode."""
    log_probs = np.empty((len(local.train), local.classes))
    rooted, total = [], np.zeros(len(local.root))
    for rows, logits, jacobian in local.pieces():
        log_probs[rows] = scipy.special.log_softmax(logits, axis=1)
        R = algebra.rooted_jacobian(jacobian, algebra.softmax_hessians(np.exp(log_probs[rows])))
        if structure == "diagonal":
            total += algebra.diagonal(R).values
        else:
            rooted.append(R)
    labels = np.asarray(local.train.labels)
    log_likelihood = -metrics.nll(log_probs, labels) * len(labels)
    if structure == "diagonal":
        return algebra.Diagonal(total), log_likelihood
    R = np.concatenate(rooted)
    if structure == "kronecker":
        shapes = [x.shape[1:] for x in jax.tree.leaves(local.mode) for _ in range(len(x))]
        return algebra.kronecker(R, shapes), log_likelihood
    return algebra.low_rank(R, rank), log_likelihood


def _profile(model: Model, mode: Adapters, precision: Precision) -> tuple[np.ndarray, float | None]:
    """Relative prior precision of every weight, and its factor; None if the evidence chooses the factor."""
    if isinstance(precision, str):
        check_option("precision", precision, ("model", "evidence"))
        if precision == "model":
            return _flat(_prior_precision(model)), 1.0
        return _flat(jax.tree.map(jnp.ones_like, mode)), None
    if isinstance(precision, Mapping):
        if set(precision) != set(FACTORS):
            raise ValueError(
                f"precision must be one number, or one each for 'a' and 'b'; got {dict(precision)}"
            )
        check_positive({f"precision of {name!r}": value for name, value in precision.items()})
        each = {n: {f: jnp.full(x.shape, precision[f]) for f, x in pair.items()} for n, pair in mode.items()}
        return _flat(each), 1.0
    check_positive({"precision": precision})
    return _flat(jax.tree.map(jnp.ones_like, mode)), float(precision)


def _prior_precision(model: Model) -> Adapters:
    """Precision of every adapter weight under the model's prior of independent centred normals."""
    program = handlers.trace(handlers.seed(model.prior, jax.random.key(0)))
    adapters, sites = program(), program.trace
    weights = {f"{name}.{factor}": x for name, pair in adapters.items() for factor, x in pair.items()}
    random = {n for n, s in sites.items() if s["type"] in ("sample", "param")}
    plain = random == set(weights) and all(
        _is_centred_normal(sites[n]) and np.array_equal(sites[n]["value"], x) for n, x in weights.items()
    )
    if not plain:
        raise ValueError(
            "precision='model' needs a prior of independent centred normals on the adapter weights, such as "
            "priors.normal(); pass a number, one each for 'a' and 'b', or 'evidence'"
        )
    return {
        name: {f: 1 / sites[f"{name}.{f}"]["fn"].variance for f in pair} for name, pair in adapters.items()
    }


def _is_centred_normal(site: Mapping[str, Any]) -> bool:
    fn = site["fn"]
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return site["type"] == "sample" and isinstance(fn, dist.Normal) and not np.any(fn.mean)


def _flat(adapters: Adapters) -> Float[np.ndarray, " p"]:
    return flattened(jax.tree.map(lambda x: x[None], adapters))[0]


def _maximiser(evidence: Callable[[float], float]) -> float:
    """The precision of the highest log-evidence."""
    low, high = _LOG_PRECISIONS
    log_precision = scipy.optimize.minimize_scalar(
        lambda t: -evidence(np.exp(t)), bounds=(low, high), method="bounded"
    ).x
    if min(log_precision - low, high - log_precision) < 1e-2:  # the search ended at an edge
        raise ValueError(
            f"the log-evidence has no maximum between the precisions {np.exp(low):.0e} and "
            f"{np.exp(high):.0e}; pass `precision` as a number"
        )
    return float(np.exp(log_precision))
