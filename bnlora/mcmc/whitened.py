r"""Targets in the coordinates of a Gaussian over the sampled sites, such as `bnlora.laplace` gives.

`whitened` moves all coordinates: `vector = affine(z)`. `InRows` moves those that the data inform alone. Where
the prior of the vector u is standard normal and the logits are linear in it, the likelihood depends on u only
through c = V^T u, V a basis of the row space of the features:

    p(u | y) = p(c | y) N(u - V c; 0, I - V V^T),

so a sampler draws c, and the rest is an exact draw of the prior. Its density costs rows times rows, however
many coordinates there are.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora.affine import Affine
from bnlora.mcmc.target import Target
from bnlora.tangent.linear import Informed

NEAR = 0.03
"""Directions whose spread is this near to the prior's are left as they are: they cost more than they gain."""


@runtime_checkable
class Geometry(Protocol):
    """What gives a sampler coordinates, such as `bnlora.Gaussian`."""

    @property
    def affine(self) -> Affine:
        """The map from standard normal coordinates to the vector of all sampled sites."""
        ...

    @property
    def informed(self) -> Informed | None:
        """The likelihood in the columns of `affine.vectors`, if the prior is standard normal elsewhere."""
        ...


@dataclass(frozen=True)
class InRows(Target):
    """A target whose position has the informed coordinates alone, in units of the Gaussian's spread."""

    gaussian: Affine = field(kw_only=True)
    likelihood: Informed = field(kw_only=True, compare=False)

    @property
    def inputs(self) -> Any:
        """What the density reads beside its position, after what that of the vector reads."""
        return self.model.base.params, self.train, (self.likelihood, self._along)

    @property
    def _along(self) -> tuple[Array, Array]:
        """The centre along V, and the spread."""
        dtype = jnp.result_type(float)
        centre = self.gaussian.centre @ self.gaussian.vectors
        return jnp.asarray(centre, dtype), jnp.asarray(self.gaussian.gains, dtype)

    def log_density(self, position: Float[Array, " r"], inputs: Any) -> Float[Array, ""]:
        """Log prior of the informed coordinates plus log-likelihood, in nats, up to a constant."""
        likelihood, along = inputs[2]
        return likelihood.log_posterior(position, *along)

    def vectors(self, positions: Float[np.ndarray, "... r"]) -> Float[np.ndarray, "... p"]:
        """Whole vectors: the informed part as it is, the rest drawn from the prior, the same each time."""
        V, gains = (np.asarray(x, np.float64) for x in (self.gaussian.vectors, self.gaussian.gains))
        digest = hashlib.sha256(np.ascontiguousarray(positions).tobytes()).digest()
        normal = np.random.default_rng(list(digest)).normal(size=(*positions.shape[:-1], len(V)))
        rest = normal - (normal @ V) @ V.T
        whole = np.asarray(self.gaussian.centre) + (np.asarray(positions, np.float64) * gains) @ V.T + rest
        return whole.astype(positions.dtype)

    def positions(self, vectors: Float[Array, "c p"]) -> Float[Array, "c r"]:
        """The informed coordinates of vectors."""
        V, gains = (np.asarray(x, np.float64) for x in (self.gaussian.vectors, self.gaussian.gains))
        moved = (np.asarray(vectors, np.float64) - self.gaussian.centre) @ V / gains
        return jnp.asarray(moved, vectors.dtype)


def whitened(made: Target, geometry: Geometry) -> Target:
    """The target in the coordinates of a Gaussian over the same sites.

    Raises:
        ValueError: When the Gaussian has another number of coordinates, or knows the likelihood and it is not
            that of this model and these rows.
    """
    size = len(geometry.affine.centre)
    if size != made.view.size:
        raise ValueError(
            f"the Gaussian given as `mass` must be one over the {made.view.size:,} sampled coordinates; it "
            f"has {size:,}: make it by bl.laplace of the same model and rows"
        )
    dtype = jnp.result_type(float)
    if geometry.informed is None:
        return replace(made, affine=geometry.affine.within(NEAR).cast(dtype))
    design, offset, labels = geometry.informed
    _require_same(made, geometry.affine, geometry.informed)
    likelihood = Informed(jnp.asarray(design, dtype), jnp.asarray(offset, dtype), jnp.asarray(labels))
    parts = made.view, made.train, made.rows, made.held, geometry.affine.cast(dtype)
    return InRows(*parts, gaussian=geometry.affine, likelihood=likelihood)


def _require_same(made: Target, affine: Affine, informed: Informed) -> None:
    """Raise `ValueError` unless prior and likelihood of the target are those that the Gaussian was made of.

    Both are compared at two vectors. Contrasts that are linear and agree at a random one agree everywhere.
    """
    normals = np.random.default_rng(0).normal(size=(2, made.view.size))
    vectors = normals.astype(jnp.result_type(float))
    look = jax.jit(lambda u, inputs: jax.lax.map(lambda x: _looked_at(made, x, *inputs), u))
    found = (np.asarray(x, np.float64) for x in look(vectors, made.inputs[:2]))
    log_prior, contrasts = found
    design, offset, labels = informed
    along = (vectors - np.asarray(affine.centre)) @ np.asarray(affine.vectors)
    expected = np.einsum("nkr,sr->snk", design, along) + offset
    beyond = log_prior + 0.5 * (normals**2).sum(1)  # the same constant at every vector under N(0, I)
    is_normal = np.ptp(beyond) < 1e-3 + 1e-5 * made.view.size
    is_same = contrasts.shape == expected.shape and np.array_equal(labels, made.train.labels)
    if not (is_normal and is_same and np.allclose(contrasts, expected, rtol=1e-3, atol=1e-2)):
        raise ValueError(
            "the Gaussian given as `mass` is one of another model or of other rows; make it by bl.laplace of "
            "the same model and rows"
        )


def _looked_at(made: Target, vector: Array, frozen: Any, batch: Any) -> tuple[Array, Array]:
    """Log prior of a vector, and the contrasts of all rows under it."""
    logits = made.model.logits(frozen, made.view.adapters(vector), batch)
    return made.view.log_prior(vector), logits[:, 1:] - logits[:, :1]
