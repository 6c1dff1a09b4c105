r"""The tangent model: a classifier whose logits are linear in the adapters' update.

    logit_c(x) = z_c(x) + phi_c(x)^T u,      u_(f, l) = L^T dW_(f, l) R,      phi = L^T J R

with z the logits of the untouched base and J their derivative there. Prior, likelihood, plate and scaling of
minibatches are those of the network: a `Tangent` is a `Classifier`, and fits, samplers, predictions and
diagnostics take it like any other. A row costs one backward pass per contrast once, and nothing of the
transformer afterwards.

The posterior of its adapters belongs to the linear model. Draws pushed through the network are far too
uncertain, so whatever needs adapters of the network refuses a tangent posterior.

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
from bnlora.priors import Prior
from bnlora.priors.core import core_name, frames_of
from bnlora.priors.declared import runnable
from bnlora.program.model import Classifier
from bnlora.program.tangent.gradients import features, shared_features

OUTSIDE = 1e-3
"""Share of an update's norm that may lie outside the frames: rounding."""


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Tangent(Classifier):
    """The first-order expansion of a classifier at its base.

    Args:
        network: A classifier whose prior keeps updates inside frames, as `priors.core(frames)` does.

    Attributes:
        base: The network's base.
        sites: The network's sites.
        prior: The network's prior, bound to the sites.
        label_ids: Token id of each class.
        frames: Frames of the prior.

    Raises:
        ValueError: When the prior has no frames or leaves them, or the frames are of another base or of other
            label tokens.

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
        super().__init__(network.base, network.sites, network.prior.program, label_ids=network.label_ids)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "frames", frames)
        self._check()

    def _check(self) -> None:
        if not is_same(self.frames.base, fingerprint(self.base.weights)):
            raise ValueError("the frames were made from another base; compute frames from this one")
        if self.frames.label_ids != self.label_ids:
            raise ValueError(f"the frames are of the label ids {self.frames.label_ids}; got {self.label_ids}")
        self.frames.check(self.sites)
        adapters = handlers.seed(runnable(self.prior), jax.random.key(0))()
        for name, pair in adapters.items():
            inside = self.frames[name]
            L, R = inside.left.astype(np.float64), inside.right.astype(np.float64)
            update = np.asarray(pair["b"], np.float64) @ np.asarray(pair["a"], np.float64)
            kept_part = L @ (np.swapaxes(L, 1, 2) @ update @ R) @ np.swapaxes(R, 1, 2)
            if np.linalg.norm(update - kept_part) > OUTSIDE * max(float(np.linalg.norm(update)), 1e-30):
                raise ValueError(
                    f"the prior's updates of {name!r} leave the frames, so that the tangent model would lose "
                    "a part of them; use priors.core with these frames"
                )

    @property
    def kind(self) -> Literal["network", "tangent"]:
        """What a draw of the adapters goes through."""
        return "tangent"

    @property
    def checksum(self) -> str:
        """Identifies the features, as in `Batch.frames`."""
        return kept(self, lambda tangent: tangent.frames.checksum)

    def with_prior(self, prior: Prior) -> "Tangent":
        """The tangent model of the same frames under another prior, such as a conditional one."""
        prior_with_frames = _WithFrames(prior, self.frames)
        network = Classifier(self.base, self.sites, prior_with_frames, label_ids=self.label_ids)
        return Tangent(network)

    def is_prepared(self, batch: Batch) -> bool:
        """Whether the features of this model are cached."""
        return batch.features is not None and batch.frames == self.checksum

    def cache_bytes(self, batch: Batch) -> int:
        """Memory of the features of a batch (float32)."""
        classes = len(self.label_ids)
        return 4 * len(batch) * (classes + (classes - 1) * self.frames.num_coordinates)

    def prepared(self, weights: Any, batch: Batch) -> Batch:
        """The batch with its features."""
        if self.is_prepared(batch):
            return batch
        found = self.features(weights, batch)
        return replace(batch, features=found, frames=self.checksum, hidden=None, depth=0, trunk="")

    def features(self, weights: Any, batch: Batch) -> Features:
        """The features of the rows: the batch's if they are those of this model, or computed here."""
        if batch.features is not None and self.is_prepared(batch):
            return batch.features
        return Features(*features(self.network, weights, self._arrays, batch))

    @property
    def _arrays(self) -> dict[str, tuple[Array, Array]]:
        """L and R of every family, in the order of the sites."""
        frames = ((name, self.frames[name]) for name in self.sites)
        return {name: (jnp.asarray(frame.left), jnp.asarray(frame.right)) for name, frame in frames}

    def prepare(self, batch: Batch) -> Batch:
        """`prepared` with the model's weights, in one program for all callers."""
        self.check_tokens(batch)
        if self.is_prepared(batch):
            return batch
        found = Features(*shared_features(self.network, self._arrays, batch))
        return replace(batch, features=found, frames=self.checksum)

    def coordinates(self, adapters: Adapters) -> Float[Array, " d"]:
        """The adapters' updates in the frames: u, over families, layers, rows and columns."""
        return jnp.concatenate([self._core(name, adapters[name]).ravel() for name in self.sites])

    def _core(self, name: str, pair: Mapping[str, Array]) -> Float[Array, "l m_o m_i"]:
        frame = self.frames[name]
        left, right = jnp.asarray(frame.left), jnp.asarray(frame.right)
        outer = jnp.einsum("lor,lom->lmr", pair["b"], left) * self.sites[name].scale
        return outer @ (pair["a"] @ right)

    def __call__(self, weights: Any, batch: Batch, n_total: int | None = None) -> None:
        """Sample cores and observe labels, as `Classifier` does, without making adapters of the cores."""
        with handlers.trace() as trace:
            adapters = self.prior()
        cores = [trace.get(core_name(name)) for name in self.sites]
        if any(core is None for core in cores):
            coordinates = self.coordinates(adapters)
        else:  # what adapters were made of is unused, so the compiler leaves it out
            coordinates = jnp.concatenate([core["value"].ravel() for core in cores])
        self._observe(self._logits(weights, coordinates, batch), batch, n_total)

    def logits(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n c"]:
        """Logits of the label tokens, linear in the update."""
        return self._logits(weights, self.coordinates(adapters), batch)

    def _logits(self, weights: Any, coordinates: Float[Array, " d"], batch: Batch) -> Float[Array, "n c"]:
        found = self.features(weights, batch)
        contrasts = found.phi @ coordinates
        return found.offset + jnp.pad(contrasts, ((0, 0), (1, 0)))

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Approximate size of the largest array of a program for so many rows."""
        coordinates = self.frames.num_coordinates
        return max(shape[0] * coordinates if shape else 0, self.sites.num_parameters)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """That of the network, and of the frames."""
        about = {"coordinates": f"{self.frames.num_coordinates:,}", "frames": self.frames.source}
        return (facts("Tangent model at the base", about), *super().overview, *self.frames.overview)

    def __repr__(self) -> str:
        return f"Tangent of {super().__repr__()}"


class _WithFrames:
    """A prior program that has frames but no maker that knows them."""

    def __init__(self, program: Prior, frames: Frames):
        self.program, self.frames = program, frames
        self.__qualname__ = getattr(program, "__qualname__", type(program).__name__)  # for reports

    def __call__(self, sites: Any) -> Adapters:
        return self.program(sites)
