"""The positions of scales and cores in the unconstrained vector of a core prior."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import listed
from bnlora._util.compilation import options
from bnlora._util.typing import AnyArray
from bnlora.priors.carried import carried_of
from bnlora.program.density import Density


@dataclass(frozen=True, eq=False)
class Where:
    """Positions of the two parts of the vector.

    Attributes:
        view: The unconstrained view of a tangent model.
        scales: Indices of the scales, shape (t,); empty if the scales are fixed.
        cores: Indices of the cores in the order of the frames, shape (p,).
    """

    view: Density
    scales: Int[np.ndarray, " t"]
    cores: Int[np.ndarray, " p"]

    @classmethod
    def of(cls, view: Density) -> "Where":
        """The positions in a view.

        Raises:
            ValueError: If the prior has sites that are neither cores nor their scales.
        """
        at = view.places
        cores = [f"{family}.U" for family in view.model.sites]
        others = [name for name in at if name not in cores]
        wrong = [name for name in others if not name.endswith(".scale")] + [c for c in cores if c not in at]
        if wrong:
            raise ValueError(
                f"Laplace's Gaussian needs the sites of priors.core, {listed(cores)} and their scales; this "
                f"prior has {listed(tuple(at))}"
            )
        scales = np.concatenate([at[name] for name in others]) if others else np.zeros(0, int)
        return cls(view, scales, np.concatenate([at[name] for name in cores]))

    def vector(self, t: Float[AnyArray, " t"], cores: Float[Array, " p"] | float) -> Float[Array, " v"]:
        """The vector with these unconstrained scales and cores; a number fills every core."""
        return jnp.zeros(self.view.size).at[self.scales].set(t).at[self.cores].set(cores)

    def log_scales(self, t: Float[AnyArray, " t"]) -> Float[Array, " g"]:
        """Log scale of every family and layer, read from the update that a core of ones gives.

        A carried prior has one group of coordinates, whose scales are in its columns already
        (`bnlora.infer.core.gaussian`).
        """
        if carried_of(self.view.model.prior) is not None:
            return jnp.zeros(1)
        frames = [self.view.model.frames[name] for name in self.view.model.sites]
        units = np.concatenate([np.full(frame.size[0], frame.unit) for frame in frames])
        sizes = [frame.size for frame in frames]
        ends = np.cumsum([m_o * m_i for depth, m_o, m_i in sizes for _ in range(depth)])
        adapters = self.view.adapters(self.vector(t, 1.0))
        # All entries of a layer have the same scale / unit: take the first entry of each layer.
        return jnp.log(self.view.model.coordinates(adapters)[np.concatenate([[0], ends[:-1]])] * units)

    def log_prior(self, t: Float[AnyArray, " t"]) -> Float[Array, ""]:
        """Log-density of the unconstrained scales, in nats."""
        # Remove the density of standard normal cores at zero, -log(2 pi) / 2 for each coordinate.
        return self.view.log_prior(self.vector(t, 0.0)) + 0.5 * len(self.cores) * jnp.log(2 * jnp.pi)

    def require_normal(self, t: Float[AnyArray, " t"]) -> None:
        """Raise `ValueError` unless the cores are standard normal at some unconstrained scales."""
        if not is_standard_normal(self.view, self.vector(t, 0.0), self.cores, 1e-6):
            raise ValueError(
                "Laplace's Gaussian needs standard normal cores, as priors.core has them; the cores of this "
                "prior have another law"
            )


def is_standard_normal(
    view: Density, zero: Float[Array, " v"], at: Int[np.ndarray, " p"], tolerance: float
) -> bool:
    """Whether the prior of some coordinates is standard normal, tested at one random point.

    Args:
        view: The unconstrained view of a model.
        zero: A vector that is zero at these coordinates.
        at: Indices of the coordinates.
        tolerance: Allowed error of the log-density for each coordinate, in nats, because of rounding.
    """
    u = np.random.default_rng(0).normal(size=len(at))
    both = np.stack([np.asarray(zero)] * 2)
    both[0, at] = u
    moved, still = jax.jit(lambda x: jax.lax.map(view.log_prior, x), compiler_options=options())(both)
    return bool(abs(float(moved) - float(still) + 0.5 * (u @ u)) <= tolerance * len(u))
