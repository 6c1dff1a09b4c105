r"""Targets in the coordinates of a Gaussian over the sampled sites, such as that of `bnlora.laplace`.

With `Target.affine`, the sampler moves all coordinates: `vector = affine(z)`. With `InRows`, it moves only
those that the data inform. If the prior of the vector u is standard normal and the logits are linear in u,
the likelihood depends on u only through c = V^T u, with V an orthonormal basis of the row space of the
features:

    p(u | y) = p(c | y) N(u - V c; 0, I - V V^T),

so a sampler draws c, and the rest is an exact draw of the prior. The cost of the density is of the order of
rows times rows, for any number of coordinates. `WithScales` does the same if scales are sites: the sampler
moves the scales and c, in coordinates that depend on the scales (`bnlora.program.tangent.moving`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.typing import AnyArray
from bnlora.guides.affine import Affine
from bnlora.infer.mcmc.target import Target
from bnlora.program.model import kind_of
from bnlora.program.tangent.linear import Informed
from bnlora.program.tangent.moving import LEFT_OUT, Moving
from bnlora.program.tangent.where import Where

NEAR = 0.03
"""Directions whose spread is this close to the prior's are not scaled: the cost exceeds the gain."""


@runtime_checkable
class Geometry(Protocol):
    """An object that has coordinates for a sampler, such as `bnlora.Gaussian`."""

    @property
    def affine(self) -> Affine:
        """The map from standard normal coordinates to the vector of all sampled sites."""
        ...

    @property
    def informed(self) -> Informed | Moving:
        """The likelihood along the columns of `affine.vectors`, or coordinates that depend on the scales."""
        ...


@dataclass(frozen=True)
class InRows(Target):
    """A target whose position has only the informed coordinates, in units of the Gaussian's spread.

    The position z gives c = V^T centre + gains * z, with V the columns of `gaussian.vectors`.
    """

    gaussian: Affine = field(kw_only=True)
    likelihood: Informed = field(kw_only=True, compare=False)

    @property
    def inputs(self) -> Any:
        """What the density reads beside its position, after what that of the vector reads."""
        return self.model.base.weights, self.train, (self.likelihood, self._along)

    @property
    def _along(self) -> tuple[Array, Array]:
        """The centre along V, and the spread of each column; shapes (r,)."""
        dtype = jnp.result_type(float)
        centre = self.gaussian.centre @ self.gaussian.vectors
        return jnp.asarray(centre, dtype), jnp.asarray(self.gaussian.gains, dtype)

    def log_density(self, position: Float[Array, " r"], inputs: Any) -> Float[Array, ""]:
        """Log prior of the informed coordinates plus log-likelihood, in nats, up to a constant."""
        likelihood, along = inputs[2]
        return likelihood.log_posterior(position, *along)

    @property
    def log_constant(self) -> float:
        """Log-determinant of z -> c, and the constant of the standard normal prior, in nats."""
        gains = np.asarray(self.gaussian.gains, np.float64)
        return float(np.log(gains).sum() - 0.5 * len(gains) * np.log(2 * np.pi))

    def vectors(self, positions: Float[np.ndarray, "... r"]) -> Float[np.ndarray, "... p"]:
        """Whole vectors: the informed part of each position, plus a draw of the prior for the rest.

        The same position always gives the same draw.
        """
        V, gains = (np.asarray(x, np.float64) for x in (self.gaussian.vectors, self.gaussian.gains))
        normal = _prior_draws(positions, len(V))
        rest = normal - (normal @ V) @ V.T  # a draw of N(0, I - V V^T), without the p x p matrix
        whole = np.asarray(self.gaussian.centre) + (np.asarray(positions, np.float64) * gains) @ V.T + rest
        return whole.astype(positions.dtype)

    def positions(self, vectors: Float[Array, "c p"]) -> Float[Array, "c r"]:
        """The informed coordinates of vectors."""
        V, gains = (np.asarray(x, np.float64) for x in (self.gaussian.vectors, self.gaussian.gains))
        moved = (np.asarray(vectors, np.float64) - self.gaussian.centre) @ V / gains
        return jnp.asarray(moved, vectors.dtype)


@dataclass(frozen=True)
class WithScales(Target):
    """A target whose position has the scales and the coordinates e of `Moving`.

    The first entries z give the unconstrained scales, t = centre + spread z; the others are e.
    """

    where: Where = field(kw_only=True)
    moving: Moving = field(kw_only=True, compare=False)
    centre: Float[Array, " t"] = field(kw_only=True, compare=False)
    spread: Float[Array, "t t"] = field(kw_only=True, compare=False)

    @property
    def inputs(self) -> Any:
        """What the density reads beside its position, after what that of the vector reads."""
        return self.model.base.weights, self.train, (self.moving, self.centre, self.spread)

    def log_density(self, position: Float[Array, " q"], inputs: Any) -> Float[Array, ""]:
        """Log-density of the position and the labels, in nats."""
        moving, _, spread = inputs[2]
        t, e = self._parts(position, inputs)
        # `spread` is triangular, so the sum is its log-determinant.
        log_scales = self.where.log_prior(t) + jnp.log(jnp.diag(spread)).sum()
        return log_scales + moving.log_joint(self.where.log_scales(t), e)

    @property
    def log_constant(self) -> float:
        """Zero: `log_density` has every constant."""
        return 0.0

    def vectors(self, positions: Float[np.ndarray, "... q"]) -> Float[np.ndarray, "... p"]:
        """Whole vectors: scales and c of each position, plus a draw of the prior for the rest.

        The same position always gives the same draw.
        """
        cores, flat = self.where.cores, positions.reshape(-1, positions.shape[-1])
        normals = _prior_draws(positions, len(cores)).reshape(len(flat), -1).astype(positions.dtype)
        whole = _mapped(self._vector, self.inputs)(jnp.asarray(flat), jnp.asarray(normals))
        return np.asarray(whole).reshape(*positions.shape[:-1], -1)

    def positions(self, vectors: Float[Array, "c p"]) -> Float[Array, "c q"]:
        """The positions of vectors."""
        return jnp.asarray(_mapped(self._position, self.inputs)(jnp.asarray(vectors)))

    def _parts(self, position: Array, inputs: Any) -> tuple[Array, Array]:
        _, centre, spread = inputs[2]
        return centre + spread @ position[: len(spread)], position[len(spread) :]

    def _vector(self, inputs: Any, position: Array, normal: Array) -> Array:
        t, e = self._parts(position, inputs)
        return self.where.vector(t, inputs[2][0].cores(self.where.log_scales(t), e, normal))

    def _position(self, inputs: Any, vector: Array) -> Array:
        moving, centre, spread = inputs[2]
        t = vector[self.where.scales]
        moved = jax.scipy.linalg.solve_triangular(spread, t - centre, lower=True)
        return jnp.concatenate([moved, moving.standard(self.where.log_scales(t), vector[self.where.cores])])


def _prior_draws(positions: np.ndarray, size: int) -> Float[np.ndarray, "... p"]:
    """Standard normal numbers with a checksum of the positions as seed: equal positions, equal numbers."""
    digest = hashlib.sha256(np.ascontiguousarray(positions).tobytes()).digest()
    return np.random.default_rng(list(digest)).normal(size=(*positions.shape[:-1], size))


def _mapped(function: Callable, inputs: Any) -> Callable:
    """The function, mapped over the rows of its other arguments one after the other in one program."""
    run = jax.jit(lambda inputs, *rows: jax.lax.map(lambda row: function(inputs, *row), rows))
    return partial(run, inputs)


def whitened(target: Target, geometry: Geometry) -> Target:
    """The target in the coordinates of a Gaussian over the same sites.

    Raises:
        ValueError: If the Gaussian has another number of coordinates, or contains a likelihood that is not
            that of this model and these rows.
    """
    size = len(geometry.affine.centre)
    if size != target.view.size:
        raise ValueError(
            f"the Gaussian in `mass` must be one over the {target.view.size:,} sampled coordinates; it has "
            f"{size:,}; compute it with bl.laplace for the same model and rows"
        )
    dtype, informed = jnp.result_type(float), geometry.informed
    parts = target.view, target.train, target.rows, target.held
    if isinstance(informed, Informed):
        _require_same(target, _fixed_scales(geometry.affine, informed), informed.labels)
        likelihood = Informed(*_cast(informed, dtype))
        return InRows(*parts, geometry.affine.cast(dtype), gaussian=geometry.affine, likelihood=likelihood)
    if kind_of(target.model) != "tangent":
        return replace(target, affine=geometry.affine.within(NEAR).cast(dtype))
    where, scales = Where.of(target.view), geometry.affine.at
    _require_same(target, _random_scales(where, informed), informed.labels, LEFT_OUT**0.5)
    affine, moving = geometry.affine.cast(dtype), Moving(*_cast(informed, dtype))
    centre, spread = jnp.asarray(affine.centre)[scales], jnp.asarray(affine.block)[scales]
    return WithScales(*parts, affine, where=where, moving=moving, centre=centre, spread=spread)


def _cast(arrays: tuple[AnyArray, ...], dtype: Any) -> list[Array]:
    """The arrays with floats in another type and integers unchanged."""
    return [jnp.asarray(x, dtype if np.asarray(x).dtype.kind == "f" else None) for x in arrays]


Contrasts = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From vectors (s, p) to their log prior up to a constant, shape (s,), and all rows' contrasts (s, n, k)."""


def _fixed_scales(affine: Affine, informed: Informed) -> Contrasts:
    """Log prior and contrasts of vectors as the Gaussian has them, for fixed scales."""

    def contrasts_at(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        along = (vectors - np.asarray(affine.centre)) @ np.asarray(affine.vectors)
        contrasts = np.einsum("nkr,sr->snk", informed.design, along) + informed.offset
        return -0.5 * (vectors**2).sum(1), contrasts

    return contrasts_at


def _random_scales(where: Where, moving: Moving) -> Contrasts:
    """Log prior and contrasts of vectors as the coordinates that depend on the scales have them."""

    def contrasts_at(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t, u = vectors[:, where.scales], vectors[:, where.cores]
        log_scales, log_prior = (jax.jit(jax.vmap(f))(t) for f in (where.log_scales, where.log_prior))
        c = (u * np.exp(log_scales)[:, moving.group]) @ np.asarray(moving.columns).T
        contrasts = np.einsum("nkr,sr->snk", moving.basis, c) + moving.offset
        return np.asarray(log_prior) - 0.5 * (u**2).sum(1), contrasts

    return contrasts_at


def _require_same(target: Target, expected: Contrasts, labels: AnyArray, left_out: float = 0.0) -> None:
    """Raise `ValueError` unless the Gaussian was computed from the prior and the likelihood of the target.

    Both are compared at two random vectors. Linear contrasts that agree at a random vector agree everywhere.

    Args:
        target: The target.
        expected: Log prior and contrasts as the Gaussian has them.
        labels: The labels that the Gaussian was computed from.
        left_out: Standard deviation, in nats, of the part of the contrasts that the Gaussian leaves out.
    """
    vectors = np.random.default_rng(0).normal(size=(2, target.view.size)).astype(jnp.result_type(float))
    both = jax.jit(lambda u, inputs: jax.lax.map(lambda x: _prior_and_contrasts(target, x, *inputs), u))
    log_prior, contrasts = (np.asarray(x, np.float64) for x in both(vectors, target.inputs[:2]))
    known_prior, known = (np.asarray(x, np.float64) for x in expected(vectors))
    # Rounding of float32 logits, plus six standard deviations of what was left out.
    gap = 1e-2 + 1e-3 * np.abs(known).max() + 6 * left_out
    # Log priors are known up to a constant, so only their difference between the two vectors counts.
    is_normal = np.ptp(log_prior - known_prior) < 1e-3 + 1e-5 * target.view.size
    is_same = contrasts.shape == known.shape and np.array_equal(labels, target.train.labels)
    if not (is_normal and is_same and np.abs(contrasts - known).max() < gap):
        raise ValueError(
            "the Gaussian in `mass` is that of another model or of other rows; compute it with bl.laplace "
            "for the same model and rows"
        )


def _prior_and_contrasts(target: Target, vector: Array, weights: Any, batch: Any) -> tuple[Array, Array]:
    """Log prior of a vector, and the contrasts of all rows under it."""
    logits = target.model.logits(weights, target.view.adapters(vector), batch)
    return target.view.log_prior(vector), logits[:, 1:] - logits[:, :1]
