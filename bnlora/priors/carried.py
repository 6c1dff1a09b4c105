r"""The core prior after earlier rows: their posterior, as a Gaussian over the cores, is the new prior.

    u ~ N(m, P^-1),      P = I + V diag(e) V^T,      u: the cores of all families, flattened

The columns of V are the directions that the earlier rows informed, and e is the precision that they added to
that of the core prior, which is one. As a program, u = m + P^(-1/2) w with standard normal w, so the sample
sites are those of `core`: one matrix of standard normals for each layer of a family.

*Forgetting* multiplies what the earlier rows added, both to the precision and to the precision times the
mean, by a number `keep` between 0 and 1: 1 keeps all, 0 gives the core prior back. This is the power prior of
Ibrahim and Chen (2000), Statistical Science 15, with a Gaussian in place of the earlier likelihood.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import listed
from bnlora._util.typing import WEIGHT, Adapters, AnyArray
from bnlora.adapters.frames import Frame, Frames
from bnlora.adapters.sites import Site, Sites
from bnlora.priors.base import Prior, layers
from bnlora.priors.core import filled
from bnlora.priors.hyper import require_positive


@dataclass(frozen=True, eq=False)
class Earlier:
    """A Gaussian over the cores: what earlier rows have taught.

    Attributes:
        mean: m, shape (d,), in the order of the frames.
        vectors: V, orthonormal columns, shape (d, r).
        excess: e, the precision that the rows added along each column, shape (r,).

    Example:
        >>> earlier = Earlier(np.zeros(3), np.eye(3)[:, :1], np.array([3.0]))
        >>> earlier.sd.tolist()  # along the column; one in all other directions
        [0.5]
    """

    mean: Float[AnyArray, " d"]
    vectors: Float[AnyArray, "d r"]
    excess: Float[AnyArray, " r"]

    @property
    def sd(self) -> Float[np.ndarray, " r"]:
        """Standard deviation along each column of V."""
        standard_deviation: np.ndarray = (1 + np.asarray(self.excess, np.float64)) ** -0.5
        return standard_deviation

    def forgotten(self, keep: float) -> "Earlier":
        """The same with only a part of what the rows taught.

        Args:
            keep: The part, from 0 (nothing, the core prior) to 1 (all).

        Raises:
            ValueError: If `keep` is outside this range.

        Example:
            >>> Earlier(np.array([2.0]), np.eye(1), np.array([3.0])).forgotten(0.5).mean.tolist()
            [1.6]
        """
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must be a number from 0 (forget all) to 1 (keep all); got {keep!r}")
        excess = keep * np.asarray(self.excess, np.float64)
        # The precision times the mean is multiplied by `keep`; then the new precision divides it.
        pull = keep * self._precision_times(np.asarray(self.mean, np.float64))
        along = self.vectors.T @ pull
        return Earlier(pull + self.vectors @ (along / (1 + excess) - along), self.vectors, excess)

    def _precision_times(self, u: np.ndarray) -> np.ndarray:
        return u + self.vectors @ (self.excess * (self.vectors.T @ u))

    def cores(self, w: Float[AnyArray, "... d"]) -> Float[AnyArray, "... d"]:
        """The cores of standard normal numbers, of NumPy or JAX as they are."""
        return _like(w, self.mean) + self.spread(w)

    def spread(self, w: Float[AnyArray, "... d"]) -> Float[AnyArray, "... d"]:
        """`cores` less their mean: P^(-1/2) w."""
        vectors = _like(w, self.vectors)
        return w + ((w @ vectors) * _like(w, self.sd - 1)) @ vectors.T


def _like(w: AnyArray, x: AnyArray) -> AnyArray:
    """The array `x` in the library and the precision of `w`."""
    return (jnp if isinstance(w, Array) else np).asarray(x, w.dtype)


@dataclass(frozen=True, eq=False)
class _Carried:
    """The program; a class, because others read its parts."""

    frames: Frames
    scale: Mapping[str, float | np.ndarray]
    earlier: Earlier

    def __call__(self, sites: Sites) -> Adapters:
        self.frames.check(sites)
        if set(sites) != set(self.frames):
            raise ValueError(
                f"what was learned is about {listed(tuple(self.frames))} together; these sites are "
                f"{listed(tuple(sites))}"
            )
        normals = [_normals(sites[name], self.frames[name]) for name in self.frames]
        cores = self.earlier.cores(jnp.concatenate([x.ravel() for x in normals]))
        ends = np.cumsum([x.size for x in normals])
        parts = zip(self.frames.items(), jnp.split(cores, ends[:-1]), strict=True)
        return {
            name: filled(frame, sites[name], self.scale[name], part.reshape(frame.size))
            for (name, frame), part in parts
        }

    @property
    def log_scales(self) -> Float[np.ndarray, " d"]:
        """Log scale of every core, in the order of the frames."""
        each = [
            np.broadcast_to(np.log(self.scale[name]), frame.size[0]).repeat(frame.size[1] * frame.size[2])
            for name, frame in self.frames.items()
        ]
        return np.concatenate(each)


def _normals(site: Site, frame: Frame) -> Float[Array, "l m_o m_i"]:
    with layers(site):
        law = dist.Normal(jnp.zeros(frame.size), 1.0).to_event(2)
        U: Array = numpyro.sample(f"{site.name}.U", law, infer={"init": "zero", WEIGHT: True})
        return U


def carried(frames: Frames, *, scale: Mapping[str, float | np.ndarray], earlier: Earlier) -> Prior:
    """The core prior after earlier rows, whose posterior is `earlier`. `bnlora.refit` makes it for you.

    Args:
        frames: The frames of the earlier fit.
        scale: Its scales by family: a number, or one for each layer.
        earlier: Its posterior over the cores, such as `bnlora.infer.core.refit.earlier_of(core_fit)`.

    Returns:
        A prior with the sample sites of `core`, each a standard normal: `<family>.U` of shape
        (layer, m_o, m_i).

    Raises:
        ValueError: If a scale is missing or not a positive number, or `earlier` has another number of
            coordinates. The prior itself raises it if the sites are not those of the frames.

    Example:
        >>> earlier = Earlier(np.ones(4), np.eye(4)[:, :2], np.array([3.0, 8.0]))
        >>> prior = bl.priors.carried(frames, scale={"lm_head": 1.0}, earlier=earlier)
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(prior, key)).get_trace(
        ...     frames.sites.with_head_rows(2)
        ... )
        >>> [name for name, site in trace.items() if site["type"] == "sample"]
        ['lm_head.U']
    """
    if set(scale) != set(frames):
        raise ValueError(
            f"scale must have each family of {listed(tuple(frames))}; got {listed(tuple(scale))}"
        )
    for name, value in scale.items():
        require_positive(f"scale of {name!r}", value)
    if len(earlier.mean) != frames.num_coordinates:
        raise ValueError(
            f"the frames have {frames.num_coordinates:,} coordinates; what was learned has "
            f"{len(earlier.mean):,}: use the frames of the same fit"
        )
    return _Carried(frames, dict(scale), earlier)


def carried_of(prior: object) -> _Carried | None:
    """The carried prior inside a prior of a model, or None."""
    while prior is not None and not isinstance(prior, _Carried):
        prior = getattr(prior, "program", None)
    return prior
