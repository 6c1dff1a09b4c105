r"""Laplace's Gaussian over every latent site of a core prior on a tangent model.

    U | scales, y  ~  N(U*, Sigma),      log scales | y  ~  N(t*, H^{-1})

U* and Sigma are the mode and the inverse Hessian at the scales (`bnlora.program.tangent.linear`). If scales
are sites, t* is the mode of their marginal posterior: Laplace's evidence times their prior. The joint mode of
(scales, U) is no alternative: a larger scale with a smaller U is the same function at a higher density. U*
depends on the scales; its derivative at t* gives the joint Gaussian.

Use the Gaussian as a posterior for `predict`, as the start of a guide (`bnlora.infer.core.start`), or as
coordinates that suit a sampler (`sample_nuts(..., mass=gaussian)`).

References: Rue, Martino and Chopin (2009), integrated nested Laplace approximations; MacKay (1992).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_at_least, check_key
from bnlora._util.compilation import program
from bnlora._util.display import Showable, Shown, facts
from bnlora._util.typing import Adapters, Parameters
from bnlora.data.batch import Batch, check_rows
from bnlora.guides.affine import Affine
from bnlora.infer.core.scales import Evidence, check_classes, linear_of
from bnlora.priors.carried import carried_of
from bnlora.program.cache import cache_prefix
from bnlora.program.density import Density, density, require_inside
from bnlora.program.likelihoods import require_softmax
from bnlora.program.tangent.linear import Informed, Linear, Mode, posterior
from bnlora.program.tangent.model import Tangent
from bnlora.program.tangent.moving import Moving, moving
from bnlora.program.tangent.where import Where

MOST = 20_000
"""Largest number of rows or of coordinates, whichever are fewer: matrices of 3 GiB."""

NULL = 1e-6
"""A direction counts as uninformed if one prior standard deviation along it changes all contrasts by less.

The unit is squared nats, summed over contrasts. The curvature is no criterion: it is nearly zero for rows on
which the base is confident."""

STEP = 1e-3
"""Step of the finite differences for curvature and slope in the log scales."""


@dataclass(frozen=True, repr=False, eq=False)
class Gaussian(Shown):
    """A Gaussian over the unconstrained vector of all latent sites; a posterior for `predict`.

    Attributes:
        view: The unconstrained view of the model (`bnlora.program.density`). It defines the order of
            coordinates.
        affine: The map from standard normal coordinates to the vector.
        informed: Coordinates for a sampler: the likelihood along the columns of `affine.vectors`, with
            contrasts at the mean, or coordinates that follow the scales if these are sites.
        log_evidence: Laplace's approximation of log p(y), in nats. If scales are sites, it integrates over
            the scales too.

    Example:
        >>> gaussian = bl.laplace(tangent, rows)
        >>> gaussian.draw_adapters(key, 5)["lm_head"]["b"].shape
        (5, 1, 2, 4)
    """

    view: Density
    affine: Affine
    informed: Informed | Moving
    log_evidence: float

    @property
    def model(self) -> Tangent:
        """The tangent model."""
        return self.view.model

    @property
    def loc(self) -> Float[np.ndarray, " p"]:
        """Mean of the vector."""
        return np.asarray(self.affine.centre)

    def covariance(self) -> Float[np.ndarray, "p p"]:
        """The full covariance of the vector, p^2 numbers."""
        root = np.asarray(self.affine.apply(np.eye(len(self.loc)))) - self.loc
        return root.T @ root

    def draw_vectors(self, key: Array, num_draws: int) -> Float[np.ndarray, "s p"]:
        """Draws of the unconstrained vector."""
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        normals = np.asarray(jax.random.normal(key, (num_draws, len(self.loc))), np.float64)
        return np.asarray(self.affine.apply(normals)).astype(np.float32)

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Draw adapters, with a leading draw axis. The same key gives the same draws."""
        return program(self, _adapters_at)(self.draw_vectors(key, num_draws))

    def log_density(self, vectors: Float[np.ndarray, "s p"]) -> Float[np.ndarray, " s"]:
        """Log-density of unconstrained vectors, in nats."""
        # Change of variables: log N(z; 0, I) minus the log-determinant of the affine map.
        white = self.affine.invert(vectors)
        constant = self.affine.log_determinant + 0.5 * len(self.loc) * np.log(2 * np.pi)
        return -0.5 * (white**2).sum(-1) - constant

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Number of coordinates, evidence and kind of model."""
        about = {
            "coordinates": f"{len(self.loc):,}",
            "log evidence": f"{self.log_evidence:,.1f} nats, Laplace",
            "model": "tangent",
        }
        return (facts("Gaussian at the posterior mode", about),)

    def __repr__(self) -> str:
        return f"Gaussian({len(self.loc):,} coordinates, tangent, log evidence {self.log_evidence:,.1f} nats)"


def laplace(
    tangent: Tangent,
    train: Batch,
    *,
    params: Parameters | None = None,
    console: Console | None = None,
) -> Gaussian:
    """Laplace's approximation of the posterior of a tangent model under a core prior.

    Args:
        tangent: A tangent model whose prior is `priors.core`, or a composition of such priors.
        train: Rows with labels.
        params: Values of the prior's NumPyro parameters (learned scales), such as the `params` of a fit.
        console: Where to draw the progress bar of the features.

    Returns:
        The Gaussian.

    Raises:
        ValueError: If rows have no labels or only one class, the prior has sites that are neither a core nor
            its scale, cores have another law, or both rows and coordinates are too many for memory.

    Example:
        >>> bl.laplace(tangent, rows)
        Gaussian(4 coordinates, tangent, log evidence -5.4 nats)
    """
    require_softmax(tangent.likelihood, "bl.laplace")
    check_rows("training", train, tangent)
    check_classes(train)
    view = density(tangent, params or {})
    _require_memory(len(train) * (tangent.num_classes - 1), view.size)
    model = _linear(tangent, cache_prefix(tangent, train, console=console))
    where = Where.of(view)
    with jax.enable_x64(new_val=True):
        laws = _Posterior(where, model)
        where.require_normal(laws.start())
        t = laws.mode()
        evidence, mean, vectors, values = laws.at(t)
        centre, keep = np.zeros(view.size), np.ones(view.size)
        centre[where.cores], centre[where.scales], keep[where.scales] = mean, t, 0.0
        block = np.zeros((view.size, len(t)))
        if len(t):
            covariance = laws.covariance(t)
            informed: Informed | Moving = laws.moving(t, mean, covariance)
            spread = np.linalg.cholesky(covariance)
            block[where.scales], block[where.cores] = spread, laws.slope(t) @ spread
            # Laplace over the scales: log p(t*) + (len(t) / 2) log 2 pi + log|covariance| / 2.
            evidence += float(laws.log_prior(jnp.asarray(t))) + 0.5 * len(t) * np.log(2 * np.pi)
            evidence += np.log(np.diag(spread)).sum()
        else:
            informed = laws.informed(vectors, mean)
    whole = np.zeros((view.size, vectors.shape[1]))
    whole[where.cores] = vectors
    # Copy: JAX caches the 64-bit version of an array that was used in double precision.
    affine = Affine(centre, keep, whole, (1 + values) ** -0.5, block, where.scales.copy())
    return Gaussian(view, affine, informed, evidence)


def _linear(tangent: Tangent, batch: Batch) -> Linear:
    """The linear model of the standard normals of the prior: one group for each layer, or one in all."""
    model, _ = linear_of(tangent, batch, by="layer")
    carried = carried_of(tangent.prior)
    if carried is None:
        return model
    # eta = z + Phi D (m + S w) = (z + Phi D m) + (Phi D S) w, with the scales D and u = m + S w.
    design = np.concatenate(model.groups, axis=2) * np.exp(carried.log_scales)
    offset = model.offset + design @ np.asarray(carried.earlier.mean, np.float64)
    return model._replace(offset=offset, groups=[carried.earlier.spread(design)])


def _require_memory(rows: int, coordinates: int) -> None:
    """Raise `ValueError` if the smaller of both is too large for square matrices of that size."""
    least = min(rows, coordinates)
    if least > MOST:
        raise ValueError(
            f"Laplace's Gaussian needs square matrices of the smaller of {rows:,} rows times contrasts and "
            f"{coordinates:,} coordinates, {8 * least**2 / 2**30:,.1f} GiB each; use at most {MOST:,} rows "
            "or coordinates, or fit a guide with bl.fit"
        )


class _Posterior:
    """The posterior of scales and cores; every method runs in double precision."""

    def __init__(self, where: Where, model: Linear):
        self.where, self.model = where, model
        self.evidence = Evidence.of(model)
        self.value = jax.jit(jax.value_and_grad(self._value))
        self.log_scales, self.log_prior = jax.jit(where.log_scales), jax.jit(where.log_prior)

    def start(self) -> np.ndarray:
        """Start values of the unconstrained scales."""
        if not len(self.where.scales):
            return np.zeros(0)
        view = self.where.view
        start = require_inside(jax.jit(view.start)(jax.random.key(0)))
        return np.asarray(start, np.float64)[self.where.scales]

    def _value(self, t: Array, data: Linear) -> Array:
        evidence = self.evidence._replace(model=data)
        return evidence.mode(self.where.log_scales(t)).log_evidence + self.where.log_prior(t)

    def moments(self, t: np.ndarray) -> tuple[Mode, Array, Array]:
        """The mode of the cores at some scales, the design there, and the mode in coordinates."""
        log_scales, evidence = self.log_scales(jnp.asarray(t)), self.evidence
        return _moments(log_scales, evidence.model, self.model.groups, in_rows=evidence.in_rows)

    def mode(self) -> np.ndarray:
        """Mode of the marginal posterior of the unconstrained scales."""
        if not len(self.where.scales):
            return np.zeros(0)

        def negative(t: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self.value(jnp.asarray(t), self.evidence.model)
            return -float(value), -np.asarray(slope)

        return scipy.optimize.minimize(negative, self.start(), jac=True, method="L-BFGS-B").x

    def at(self, t: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Evidence, mode, and those eigenvectors and eigenvalues of Phi^T W Phi that change a contrast."""
        mode, design, _ = self.moments(t)
        moments = posterior(design, mode, in_rows=self.evidence.in_rows)
        mean, vectors, values = (np.asarray(x) for x in moments)
        moves = ((np.asarray(design) @ vectors) ** 2).sum(0) > NULL
        return float(mode.log_evidence), mean, vectors[:, moves], values[moves]

    def informed(self, vectors: np.ndarray, mean: np.ndarray) -> Informed:
        """The likelihood along some directions: derivatives, contrasts at the mean, labels; fixed scales."""
        log_scales = np.asarray(self.log_scales(jnp.zeros(0)), np.float64)
        scaled = [np.exp(s) * group for s, group in zip(log_scales, self.model.groups, strict=True)]
        design = np.concatenate(scaled, axis=2)
        return Informed(design @ vectors, self.model.offset + design @ mean, np.asarray(self.model.labels))

    def moving(self, t: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> Moving:
        """Coordinates that follow the scales, from mode and covariance of the unconstrained scales."""
        slope = np.asarray(jax.jit(jax.jacfwd(self.where.log_scales))(jnp.asarray(t)))
        spread = np.sqrt(np.einsum("gi,ij,gj->g", slope, covariance, slope))
        return moving(self.model, np.asarray(self.log_scales(jnp.asarray(t))), spread, mean)

    def mean(self, t: np.ndarray) -> np.ndarray:
        """The mode of the cores at some scales."""
        return np.asarray(self.moments(t)[2])

    def covariance(self, t: np.ndarray) -> np.ndarray:
        """Covariance of the unconstrained scales, with a variance of at most 10 in every direction."""
        slopes = _differences(lambda x: np.asarray(self.value(jnp.asarray(x), self.evidence.model)[1]), t)
        values, vectors = np.linalg.eigh(-(slopes + slopes.T) / 2)  # symmetrised negative Hessian
        return (vectors / np.maximum(values, 0.1)) @ vectors.T

    def slope(self, t: np.ndarray) -> np.ndarray:
        """Derivative of the mode of the cores in the unconstrained scales."""
        return _differences(self.mean, t)


@partial(jax.jit, static_argnames="in_rows")  # one program for all priors and rows of these shapes
def _moments(
    log_scales: Array, data: Linear, groups: Sequence[Array], *, in_rows: bool
) -> tuple[Mode, Array, Array]:
    mode = Evidence(data, in_rows).mode(log_scales)
    design = data._replace(groups=groups).design(log_scales)
    return mode, design, design.T @ mode.weights if in_rows else mode.weights


def _differences(function: Callable[[np.ndarray], np.ndarray], t: np.ndarray) -> np.ndarray:
    """Central differences, with one column for each entry of t."""
    shifts = STEP * np.eye(len(t))
    return np.stack([(function(t + d) - function(t - d)) / (2 * STEP) for d in shifts], axis=1)


def _adapters_at(gaussian: Gaussian, vectors: Array) -> Adapters:
    adapters: Mapping[str, Any] = jax.lax.map(gaussian.view.adapters, vectors)
    return adapters
