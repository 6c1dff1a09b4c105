r"""A tangent model of a tiny network, and its posterior written with NumPy alone, for the tests of both.

    eta_i = z_i + phi_i^T u,      u ~ N(0, I),      p(y_i | eta_i) = softmax([0, eta_i])

with eta_i the contrasts of row i, each class against the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import bnlora as bl
from bnlora.adapters.frames import Frames
from bnlora.models.execution import Execution
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS, NEW = tiny_rows(jax.random.key(2), 24), tiny_rows(jax.random.key(3), 9)
FEW = ROWS[np.unique(ROWS.labels, return_index=True)[1]]
"""Two rows, one of each class: they inform two coordinates."""


@cache
def frames(*targets: str, size: int = 2, label_ids: tuple[int, ...] = (3, 5), layers: int = 1) -> Frames:
    """Frames of the uppermost layers."""
    where = slice(-layers, None)
    return bl.frames(KEY, BASE, list(targets), ROWS, label_ids=label_ids, size=size, layers=where)


def tangent_of(made: Frames, **options) -> bl.Tangent:
    """A tangent model under the core prior of some frames."""
    return bl.Tangent(network_of(made, **options))


def network_of(made: Frames, **options) -> bl.Classifier:
    """The network under the core prior of some frames."""
    prior = bl.priors.core(made, **options)
    return bl.Classifier(BASE, made.sites, prior, label_ids=made.label_ids)


def contrasts(logits) -> np.ndarray:
    """Logit of each class against the first, in float64."""
    logits = np.asarray(logits, np.float64)
    return logits[..., 1:] - logits[..., :1]


@contextmanager
def in_double() -> Iterator[None]:
    """The network in float64: what casts to float32 by its name casts to float64 meanwhile."""
    wide = property(lambda self: jnp.dtype("float64"))
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        with mock.patch.object(Execution, "dtype", wide):
            yield


def widened(tree):
    """Floats of a tree in float64; within `in_double`."""
    return jax.tree.map(lambda x: jnp.asarray(x, float) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@dataclass(frozen=True)
class Exact:
    """The posterior of a linear model, dense and in float64.

    Attributes:
        offset: Contrasts of the base, shape (n, k).
        design: Their derivatives, scales included, shape (n, k, d).
        labels: Classes.
    """

    offset: np.ndarray
    design: np.ndarray
    labels: np.ndarray

    def log_likelihood(self, u: np.ndarray) -> np.ndarray:
        """Of vectors with any leading axes."""
        eta = self.offset + np.einsum("nkd,...d->...nk", self.design, u)
        log_sum = np.logaddexp.reduce(np.insert(eta, 0, 0.0, axis=-1), axis=-1)
        chosen = (self.labels[:, None] == np.arange(1, eta.shape[-1] + 1)) * eta
        return (chosen.sum(-1) - log_sum).sum(-1)

    def mode(self) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mode and Hessian of the negative log-density there, by Newton's method."""
        n, k, d = self.design.shape
        u = np.zeros(d)
        for _ in range(200):
            eta = np.concatenate([np.zeros((n, 1)), self.offset + self.design @ u], 1)
            p = np.exp(eta - np.logaddexp.reduce(eta, axis=1, keepdims=True))[:, 1:]
            residual = (self.labels[:, None] == np.arange(1, k + 1)) - p
            W = p[:, :, None] * np.eye(k) - p[:, :, None] * p[:, None, :]
            H = np.eye(d) + np.einsum("nkd,nkl,nle->de", self.design, W, self.design)
            step = np.linalg.solve(H, np.einsum("nkd,nk->d", self.design, residual) - u)
            # Short steps at first: the likelihood is concave, but a whole step may overshoot.
            u = u + step / max(1.0, np.linalg.norm(step))
        return u, H

    def log_evidence(self) -> float:
        """Laplace's approximation: log p(y | u*) - |u*|^2 / 2 - log|H| / 2."""
        u, H = self.mode()
        return float(self.log_likelihood(u) - u @ u / 2 - np.linalg.slogdet(H)[1] / 2)


def exact(tangent: bl.Tangent, rows: bl.Batch, scales: dict[str, float]) -> Exact:
    """The linear model behind a tangent model, at given scales by family."""
    offset, phi = (np.asarray(x, np.float64) for x in tangent.prepare(rows).features)
    weights = [np.full(int(np.prod(f.size)), scales[name] / f.unit) for name, f in tangent.frames.items()]
    return Exact(contrasts(offset), phi * np.concatenate(weights), np.asarray(rows.labels))
