r"""A Gaussian in the coordinates of another Gaussian: a guide that starts at Laplace's approximation.

    x = affine(z),      V^T z ~ N(loc, diag(scale)^2),      z otherwise standard normal

where `affine` is the map of a Gaussian (`bnlora.guides.affine`) and the columns of V are the directions that
the data inform. At loc = 0, scale = 1 the guide is that Gaussian. A fit changes two numbers for each informed
direction. In all other directions the guide stays at the prior, which is exact on a tangent model.
"""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from bnlora.guides.affine import Affine
from bnlora.guides.family import Family
from bnlora.guides.vector import vector_family


@runtime_checkable
class Geometry(Protocol):
    """An object with an affine map, such as `bnlora.Gaussian`."""

    @property
    def affine(self) -> Affine:
        """The map from standard normal coordinates to the vector of all sites."""
        ...


def around(gaussian: Geometry) -> Family:
    """A Gaussian over all sites, in the coordinates of another Gaussian.

    Args:
        gaussian: A Gaussian with an `affine` map over all latent sites of the prior, in their order, such as
            the result of `bl.laplace`.

    Returns:
        A family for `Guide`, for all sites together.

    Raises:
        ValueError: Raised by the guide if the number of coordinates of its sites differs.

    Example:
        >>> bl.guides.Guide(tangent.prior, bl.guides.around(bl.laplace(tangent, rows)))
        Guide(8 parameters)
          lm_head.U: Gaussian around another one over all of them, 8
    """
    known = gaussian.affine

    def law(prefix: str, batch: tuple[int, ...], size: int, start: Any) -> dist.Distribution:
        if size != len(known.centre):
            raise ValueError(
                f"the Gaussian has {len(known.centre):,} coordinates, the sites of the guide {size:,}; use "
                "bl.laplace of the same model, and assign all sites to this family"
            )
        count = known.vectors.shape[1] + len(known.at)
        # Other families call the parameters of the vector itself `loc` and `scale`.
        loc = numpyro.param(f"{prefix}.q.along_loc", jnp.zeros(count))
        ones = jnp.ones(count)
        scale = numpyro.param(f"{prefix}.q.along_scale", ones, constraint=constraints.softplus_positive)
        unit = dist.Normal(jnp.zeros(size), 1.0).to_event(1)
        affine = known.cast(jnp.result_type(float))
        return dist.TransformedDistribution(unit, Informed(affine, loc, scale, known.log_determinant))

    family = vector_family("Gaussian around another one", law, count=lambda size: 2 * size, over="all")
    return replace(family, constants=known)


class Informed(Transform):
    """The map `affine` after a shift and a scale along its directions and its coordinates `at`."""

    domain = codomain = constraints.real_vector

    def __init__(self, affine: Affine, loc: Array, scale: Array, log_determinant: float):
        self.affine, self.loc, self.scale, self.constant = affine, loc, scale, log_determinant

    def __call__(self, x: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """Map standard normal numbers to the vector."""
        V, at = self.affine.vectors, self.affine.at
        along = jnp.concatenate([x @ V, x[..., at]], axis=-1)  # (..., r + t), the informed coordinates
        shift = self.loc + (self.scale - 1) * along
        rank = V.shape[1]
        moved = (x + shift[..., :rank] @ V.T).at[..., at].add(shift[..., rank:])
        return jnp.asarray(self.affine.apply(moved))

    def _inverse(self, y: Float[Array, "... p"]) -> Float[Array, "... p"]:
        centre, keep, V, gains, block, at = self.affine
        moved = y - centre
        # First undo `affine`, as `Affine.invert` does; then undo shift and scale along its directions.
        head = jnp.linalg.solve(block[at], moved[..., at, None])[..., 0] if len(at) else moved[..., at]
        rest = keep * (moved - head @ block.T)
        z = rest + ((rest @ V) * (1 / gains - 1)) @ V.T
        along = jnp.concatenate([z @ V, head], axis=-1)
        shift = (along - self.loc) / self.scale - along
        rank = V.shape[1]
        return jnp.asarray(z + shift[..., :rank] @ V.T).at[..., at].set(head + shift[..., rank:])

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Log-determinant; it does not depend on x."""
        return jnp.broadcast_to(jnp.log(self.scale).sum() + self.constant, x.shape[:-1])

    def tree_flatten(self) -> tuple[Any, Any]:
        """Children and static parts for JAX."""
        names = "affine", "loc", "scale", "constant"
        return tuple(getattr(self, name) for name in names), (names, {})

    def __eq__(self, other: object) -> bool:
        """Equality by identity: arrays have no single truth value."""
        return self is other

    __hash__ = object.__hash__
