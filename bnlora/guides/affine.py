r"""An affine map from a standard normal vector to a Gaussian that differs from it in few directions.

    x = centre + keep * z + V (g - 1) V^T z + block z[at]

V has orthonormal columns and is zero at the indices `at`; `keep` is zero at `at` and one elsewhere. For
standard normal z, the covariance of x is the identity, changed along the columns of V, plus the contribution
of the coordinates `at`. No array of the size of the full covariance is formed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from bnlora._util.typing import AnyArray


class Affine(NamedTuple):
    """An affine map from standard normal coordinates to other coordinates.

    Attributes:
        centre: The image of zero, shape (p,).
        keep: 0 at `at`, 1 elsewhere, shape (p,).
        vectors: V, shape (p, r).
        gains: g, standard deviations along the columns of V, shape (r,).
        block: Columns that multiply the coordinates `at`, shape (p, t).
        at: Indices of these coordinates, shape (t,).
    """

    centre: Float[AnyArray, " p"]
    keep: Float[AnyArray, " p"]
    vectors: Float[AnyArray, "p r"]
    gains: Float[AnyArray, " r"]
    block: Float[AnyArray, "p t"]
    at: Int[AnyArray, " t"]

    def apply(self, z: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Map standard coordinates z to x."""
        inner = (z @ self.vectors) * (self.gains - 1)
        return self.centre + self.keep * z + inner @ self.vectors.T + z[..., self.at] @ self.block.T

    def invert(self, x: Float[np.ndarray, "... p"]) -> Float[np.ndarray, "... p"]:
        """Map x back to standard coordinates z, in double precision."""
        centre, _, vectors, gains, block, at = (np.asarray(part, np.float64) for part in self)
        at = at.astype(int)
        moved = np.asarray(x, np.float64) - centre
        # At the indices `at` only `block` contributes, so solve for these coordinates first.
        head = np.linalg.solve(block[at], moved[..., at, None])[..., 0] if len(at) else moved[..., at]
        rest = moved - head @ block.T
        # The inverse of I + V (g - 1) V^T with orthonormal V is I + V (1 / g - 1) V^T.
        z = rest + ((rest @ vectors) * (1 / gains - 1)) @ vectors.T
        z[..., at] = head
        return z

    @property
    def log_determinant(self) -> float:
        """Log-determinant of the map: log of the volume of the image of a unit cube."""
        inner = np.linalg.slogdet(np.asarray(self.block)[np.asarray(self.at)])[1] if len(self.at) else 0.0
        return float(np.log(np.asarray(self.gains)).sum() + inner)

    def within(self, gap: float) -> "Affine":
        """The same map without the directions whose standard deviation is within `gap` of one."""
        far = np.abs(np.asarray(self.gains) - 1) > gap
        return self._replace(vectors=self.vectors[:, far], gains=self.gains[far])

    def cast(self, dtype: DTypeLike) -> "Affine":
        """The same map as JAX arrays of a float type."""
        floats = jax.tree.map(lambda x: jnp.asarray(x, dtype), self)
        return floats._replace(at=jnp.asarray(np.asarray(self.at)))
