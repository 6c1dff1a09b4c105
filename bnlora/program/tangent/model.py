r"""The tangent model: a classifier whose logits are linear in the update of the adapters.

    logit_c(x) = z_c(x) + phi_c(x)^T u,      u_(f, l) = L^T dW_(f, l) R,      phi = L^T J R

where z are the logits of the untouched base and J is their derivative there. Prior, likelihood, plate and
minibatch scaling are those of the network. A `Tangent` is a `Classifier`: fits, samplers, predictions and
diagnostics accept it. Each row costs one backward pass per contrast, once; after that the transformer is not
run again.

The posterior of its adapters belongs to the linear model. In the network, its draws would give predictions
that are far too uncertain, so functions that need adapters of the network refuse a tangent posterior.

Reference: Immer et al. (2021), Improving predictions of Bayesian neural nets via local linearization, arXiv
2008.08400.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpyro import handlers

from bnlora._util.compilation import kept
from bnlora._util.display import Showable, facts
from bnlora._util.fingerprint import fingerprint, is_same
from bnlora._util.typing import Adapters
from bnlora.adapters.frames import Frames
from bnlora.data.batch import Batch, Features
from bnlora.models.sharding import along
from bnlora.priors import Prior
from bnlora.priors.core import core_name, frames_of
from bnlora.priors.declared import runnable
from bnlora.program.model import Classifier
from bnlora.program.tangent.gradients import features, shared_features

OUTSIDE = 1e-3
"""Largest share of an update's norm outside the frames, to allow for rounding."""


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Tangent(Classifier):
    """The first-order expansion of a classifier at its base.

    Args:
        network: A classifier whose prior has all updates inside frames, such as `priors.core(frames)`.

    Attributes:
        base: The network's base.
        sites: The network's sites.
        prior: The network's prior, bound to the sites.
        likelihood: How the logits of the classes are read.
        trunk: The network's trunk.
        frames: Frames of the prior.

    Raises:
        ValueError: If the prior has no frames or has updates outside them, or the frames belong to another
            base or other label tokens.

    Example:
        >>> tangent = bl.Tangent(bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=(3, 5)))
        >>> bl.cache_prefix(tangent, rows)
        Batch(8 rows of 8 positions, 4 tangent features cached)
    """

    network: Classifier
    frames: Frames

    def __init__(self, network: Classifier):
        frames = frames_of(network.prior.program)
        if frames is None:
            raise ValueError(
                "a tangent model needs a prior with frames for every family, such as priors.core(frames); "
                f"got {getattr(network.prior.program, '__qualname__', network.prior.program)}"
            )
        super().__init__(network.base, network.sites, network.prior.program, likelihood=network.likelihood)
        if self.likelihood.outcome == "text":
            raise ValueError(
                "a tangent model of texts would be linear in their log-likelihood, which has no curvature; "
                "fit the network: bl.fit with the Classifier"
            )
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "frames", frames)
        self._check()

    def _check(self) -> None:
        if not is_same(self.frames.base, fingerprint(self.base.weights)):
            raise ValueError("the frames belong to another base; compute frames from this one")
        if self.frames.likelihood != self.likelihood:
            raise ValueError(f"the frames belong to {self.frames.likelihood}; got {self.likelihood}")
        self.frames.check(self.sites)
        adapters = handlers.seed(runnable(self.prior), jax.random.key(0))()
        for name in self.sites:
            pair = adapters[name]
            frame = self.frames[name]
            L, R = frame.left.astype(np.float64), frame.right.astype(np.float64)
            update = np.asarray(pair["b"], np.float64) @ np.asarray(pair["a"], np.float64)
            inside = (
                L @ (np.swapaxes(L, 1, 2) @ update @ R) @ np.swapaxes(R, 1, 2)
            )  # projection to the frames
            if np.linalg.norm(update - inside) > OUTSIDE * max(float(np.linalg.norm(update)), 1e-30):
                raise ValueError(
                    f"the prior's updates of {name!r} are not inside the frames, so the tangent model would "
                    "ignore a part of them; use priors.core with these frames"
                )

    @property
    def kind(self) -> Literal["network", "tangent"]:
        """The kind of model that maps adapters to logits."""
        return "tangent"

    @property
    def checksum(self) -> str:
        """Checksum of the features, compared with `Batch.frames`."""
        return kept(self, lambda tangent: tangent.frames.checksum)

    def with_prior(self, prior: Prior) -> "Tangent":
        """The tangent model with the same frames and another prior, such as a conditional one."""
        prior_with_frames = _WithFrames(prior, self.frames)
        network = Classifier(self.base, self.sites, prior_with_frames, likelihood=self.likelihood)
        return Tangent(network)

    def is_prepared(self, batch: Batch) -> bool:
        """Whether the features of this model are cached."""
        return batch.features is not None and batch.frames == self.checksum

    def cache_bytes(self, batch: Batch) -> int:
        """Memory of the features of a batch (float32)."""
        classes = self.likelihood.num_logits
        return 4 * len(batch) * (classes + (classes - 1) * self.frames.num_coordinates)

    def prepared(self, weights: Any, batch: Batch) -> Batch:
        """The batch with its features."""
        if self.is_prepared(batch):
            return batch
        computed = self.features(weights, batch)
        return replace(batch, features=computed, frames=self.checksum, cached=None)

    def features(self, weights: Any, batch: Batch) -> Features:
        """The features of the rows: cached ones if they belong to this model, else computed here."""
        if batch.features is not None and self.is_prepared(batch):
            return batch.features
        return Features(*features(self.network, weights, self._arrays, batch))

    @property
    def _arrays(self) -> dict[str, tuple[Array, Array]]:
        """L and R of every family, in the order of the sites."""
        frames = ((name, self.frames[name]) for name in self.sites)
        return {name: (jnp.asarray(frame.left), jnp.asarray(frame.right)) for name, frame in frames}

    def prepare(self, batch: Batch) -> Batch:
        """Like `prepared` with the model's weights, by one compiled program for all callers."""
        self.check_tokens(batch)
        if self.is_prepared(batch):
            return batch
        computed = Features(*shared_features(self.network, self._arrays, batch))
        return replace(batch, features=computed, frames=self.checksum)

    def coordinates(self, adapters: Adapters) -> Float[Array, " d"]:
        """The updates in the frames, flattened: u, over families, layers, rows and columns."""
        return jnp.concatenate([self._core(name, adapters[name]).ravel() for name in self.sites])

    def _core(self, name: str, pair: Mapping[str, Array]) -> Float[Array, "l m_o m_i"]:
        frame = self.frames[name]
        left, right = jnp.asarray(frame.left), jnp.asarray(frame.right)
        # L^T (s b) times (a R): the full update dW of shape (d_out, d_in) is never formed.
        outer = jnp.einsum("lor,lom->lmr", pair["b"], left) * self.sites[name].scale
        return outer @ (pair["a"] @ right)

    def __call__(self, weights: Any, batch: Batch, n_total: int | None = None) -> None:
        """Sample cores and observe labels, as `Classifier` does, but without computing adapters."""
        with handlers.trace() as trace:
            adapters = self.prior()
        cores = [trace.get(core_name(name)) for name in self.sites]
        if any(core is None for core in cores):
            coordinates = self.coordinates(adapters)
        else:  # `adapters` is then unused, and the compiler removes its computation
            coordinates = jnp.concatenate([core["value"].ravel() for core in cores])
        self._observe(self._logits(weights, coordinates, batch), adapters, batch, n_total)

    def logits(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n c"]:
        """Logits of the label tokens, linear in the update."""
        return self._logits(weights, self.coordinates(adapters), batch)

    def _logits(self, weights: Any, coordinates: Float[Array, " d"], batch: Batch) -> Float[Array, "n c"]:
        cached = along(self.base.mesh, "data", self.features(weights, batch))
        contrasts = cached.phi @ coordinates  # (n, c - 1), each class against class 0
        return cached.offset + jnp.pad(contrasts, ((0, 0), (1, 0)))

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Approximate size of the largest array of a program for rows of this shape."""
        coordinates = self.frames.num_coordinates
        return max(shape[0] * coordinates if shape else 0, self.sites.num_parameters)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The overview of the network and of the frames."""
        about = {"coordinates": f"{self.frames.num_coordinates:,}", "frames": self.frames.source}
        return (facts("Tangent model at the base", about), *super().overview, *self.frames.overview)

    def __repr__(self) -> str:
        return f"Tangent of {super().__repr__()}"


class _WithFrames:
    """A prior program with frames attached."""

    def __init__(self, program: Prior, frames: Frames):
        self.program, self.frames = program, frames
        self.__qualname__ = getattr(program, "__qualname__", type(program).__name__)  # for reports

    def __call__(self, sites: Any) -> Adapters:
        return self.program(sites)
