r"""Laplace's approximation of a linear model with a softmax likelihood: mode, evidence, covariance.

    eta_i = z_i + Phi_i u,      u ~ N(0, I),      p(y_i = c | eta_i) = softmax([0, eta_i])_c

    log p(y) ~ log p(y | u*) - |u*|^2 / 2 - log|B| / 2,      B = I + M M^T or I + M^T M,  M = V^T Phi,

where u* is the posterior mode and W = V V^T is the Hessian of the negative log-likelihood in eta. All
computations are in rows or in coordinates, whichever are fewer. In rows, u = Phi^T a and eta = z + K a with
K = Phi Phi^T.

The evidence is a JAX function of the log scales s of groups of columns, Phi = [s_g Phi_g]. The mode is
computed by damped Newton steps without derivatives. One more step, with derivatives of the gradient but not
of the Hessian, gives the exact gradient.

References: Rasmussen and Williams (2006), Gaussian processes for machine learning, algorithms 3.1, 3.3 and
5.1; MacKay (1992), the evidence framework.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.typing import AnyArray

MAX_STEPS = 100
"""Largest number of Newton steps for the mode."""


class Linear(NamedTuple):
    """A linear model whose columns form groups with one scale each.

    Attributes:
        offset: Contrasts of the base, class c against class 0, shape (row, class - 1).
        groups: Derivatives at scale one, by group, shape (row, class - 1, coordinates of the group).
        labels: Classes, shape (row,).
    """

    offset: Float[AnyArray, "n k"]
    groups: Sequence[Float[AnyArray, "n k d"]] | Float[AnyArray, "g m m"]
    labels: Int[AnyArray, " n"]

    @property
    def num_coordinates(self) -> int:
        """Number of columns of all groups."""
        return sum(group.shape[2] for group in self.groups)

    @property
    def in_rows(self) -> bool:
        """Whether to compute in rows: rows times contrasts are fewer than coordinates."""
        return self.offset.size < self.num_coordinates

    def design(self, log_scales: Float[Array, " g"]) -> Float[Array, "m d"]:
        """Phi including the scales, with m = rows x contrasts."""
        scaled = [jnp.exp(s) * jnp.asarray(x) for s, x in zip(log_scales, self.groups, strict=True)]
        return jnp.concatenate(scaled, axis=2).reshape(self.offset.size, -1)


class Informed(NamedTuple):
    """The likelihood as a function of the coordinates that inform it, along the columns of a matrix V.

    Attributes:
        design: Derivative of each contrast along the columns of V, shape (row, class - 1, r).
        offset: Contrasts at the centre of a Gaussian, shape (row, class - 1).
        labels: Classes, shape (row,).
    """

    design: Float[AnyArray, "n k r"]
    offset: Float[AnyArray, "n k"]
    labels: Int[AnyArray, " n"]

    def log_posterior(
        self, z: Float[Array, " r"], centre: Float[Array, " r"], gains: Float[Array, " r"]
    ) -> Float[Array, ""]:
        """Log posterior density at `centre + gains z` under a standard normal prior, up to a constant."""
        moved = gains * z
        eta = jnp.asarray(self.offset + self.design @ moved)
        return log_likelihood(eta, self.labels) - 0.5 * jnp.sum((centre + moved) ** 2)


class Mode(NamedTuple):
    """The posterior mode and quantities at the mode.

    Attributes:
        log_evidence: Laplace's approximation of log p(y), in nats.
        log_likelihood: log p(y | u*).
        weights: The mode in rows (a) or in coordinates (u); see `Linear.in_rows`.
        root: V (row, class - 1, class - 1), with V V^T the Hessian of the negative log-likelihood.
    """

    log_evidence: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    weights: Float[Array, " w"]
    root: Float[Array, "n k k"]


def log_likelihood(eta: Float[Array, "n k"], labels: Int[AnyArray, " n"]) -> Float[Array, ""]:
    """Sum of the log-probabilities of the labels, in nats, as a function of the contrasts."""
    logits = jnp.pad(eta, ((0, 0), (1, 0)))
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).sum()


def residual_and_root(
    eta: Float[Array, "n k"], labels: Int[AnyArray, " n"]
) -> tuple[Float[Array, "n k"], Float[Array, "n k k"]]:
    """Gradient of the log-likelihood in eta, and the lower triangular V of its negative Hessian V V^T."""
    p = jax.nn.softmax(jnp.pad(eta, ((0, 0), (1, 0))))[:, 1:]
    residual = jax.nn.one_hot(labels, p.shape[1] + 1, dtype=eta.dtype)[:, 1:] - p
    if p.shape[1] == 1:
        # sqrt(p (1 - p)) by logarithms: if p rounds to one, the root of the product has no derivative.
        return residual, jnp.exp((jax.nn.log_sigmoid(eta) + jax.nn.log_sigmoid(-eta)) / 2)[:, :, None]
    # `tiny` keeps diag(p) - p p^T positive definite if a probability rounds to 0 or 1.
    tiny = jnp.finfo(eta.dtype).eps
    hessian = jax.vmap(jnp.diag)(p + tiny) - p[:, :, None] * p[:, None, :]
    return residual, jax.vmap(jnp.linalg.cholesky)(hessian)


def laplace_mode(model: Linear, kernel: Array, *, in_rows: bool, start: Array | None = None) -> Mode:
    """The mode and the evidence, differentiable in `kernel`.

    Args:
        model: The linear model; its groups are not used.
        kernel: K (m, m) if `in_rows`, else Phi (m, d).
        in_rows: Whether to compute in rows.
        start: Start value of the weights; zero if omitted.
    """
    zero = jnp.zeros(kernel.shape[1], kernel.dtype)
    fixed = jax.lax.stop_gradient(kernel)

    def penalty(change: Array, weights: Array) -> Array:
        """|u|^2 / 2, where `change` is the kernel times the weights."""
        return 0.5 * (weights @ change if in_rows else weights @ weights)

    def penalised(change: Array, weights: Array) -> Array:
        eta = change.reshape(model.offset.shape) + model.offset
        return log_likelihood(eta, model.labels) - penalty(change, weights)

    def improve(carry: tuple) -> tuple:
        weights, value, _, count = carry
        step = _newton(model, fixed, weights, in_rows=in_rows) - weights
        # Line search by halving. If the base is confident and wrong, the first Newton step at a large scale
        # can be 10^4 times too long. Two products with the kernel serve steps of every length.
        here, along = fixed @ weights, fixed @ step
        shares = 0.5 ** jnp.arange(40.0, dtype=kernel.dtype)
        values = jax.vmap(lambda t: penalised(here + t * along, weights + t * step))(shares)
        first = jnp.argmax(values > value)  # the longest step that improves
        better = values[first] > value
        weights = jnp.where(better, weights + shares[first] * step, weights)
        gain = jnp.where(better, values[first] - value, 0.0)
        return weights, jnp.where(better, values[first], value), gain, count + 1

    def goes_on(carry: tuple) -> Array:
        return (carry[2] > 1e-9) & (carry[3] < MAX_STEPS)

    begin = zero if start is None else start
    carry = begin, penalised(fixed @ begin, begin), jnp.asarray(jnp.inf, kernel.dtype), 0
    optimum = jax.lax.stop_gradient(jax.lax.while_loop(goes_on, improve, carry)[0])
    weights = _differentiable(model, kernel, optimum, in_rows=in_rows)
    eta = _eta(model, kernel, weights)
    likelihood = log_likelihood(eta, model.labels)
    _, root = residual_and_root(eta, model.labels)
    half_log_det = _half_log_det(_matrix(kernel, root, in_rows=in_rows))
    evidence = likelihood - penalty(kernel @ weights, weights) - half_log_det
    return Mode(evidence, likelihood, weights, root)


def _eta(model: Linear, kernel: Array, weights: Array) -> Array:
    return (kernel @ weights).reshape(model.offset.shape) + model.offset


def _times_root(root: Array, columns: Array, *, transpose: bool) -> Array:
    """V^T X or V X with the block-diagonal V, for X of shape (m, ...) with m = rows x contrasts."""
    n, k, _ = root.shape
    blocks = columns.reshape(n, k, -1)
    pattern = "nij,nid->njd" if transpose else "nij,njd->nid"
    return jnp.einsum(pattern, root, blocks).reshape(columns.shape)


def _cholesky(kernel: Array, root: Array, *, in_rows: bool) -> Array:
    """Cholesky root of B. The eigenvalues of B are at least one, so it needs no jitter."""
    return jnp.linalg.cholesky(_matrix(kernel, root, in_rows=in_rows))


def _matrix(kernel: Array, root: Array, *, in_rows: bool) -> Array:
    """B = I + V^T K V in rows, or I + Phi^T W Phi in coordinates."""
    half = _times_root(root, kernel, transpose=True)
    inner = _times_root(root, half.T, transpose=True) if in_rows else half.T @ half
    return jnp.eye(len(inner), dtype=kernel.dtype) + inner


@jax.custom_jvp
def _half_log_det(B: Array) -> Array:
    """log|B| / 2; its derivative tr(B^-1 dB) / 2 costs half as much as that of a Cholesky root."""
    return jnp.log(jnp.diag(jnp.linalg.cholesky(B))).sum()


@_half_log_det.defjvp
def _half_log_det_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    chol = jnp.linalg.cholesky(primals[0])
    inverse = _solved(chol, jnp.eye(len(chol), dtype=chol.dtype))
    return jnp.log(jnp.diag(chol)).sum(), 0.5 * jnp.sum(inverse * tangents[0])


def _differentiable(model: Linear, kernel: Array, optimum: Array, *, in_rows: bool) -> Array:
    """The mode with its derivative in `kernel`.

    The gradient g vanishes at the mode, so the derivative of the mode is H^-1 dg/d kernel: that of one more
    Newton step, whose Hessian H needs no derivative.
    """
    fixed = jax.lax.stop_gradient(kernel)
    _, root = residual_and_root(_eta(model, fixed, optimum), model.labels)
    chol = _cholesky(fixed, root, in_rows=in_rows)
    residual, _ = residual_and_root(_eta(model, kernel, optimum), model.labels)
    if not in_rows:
        return optimum + _solved(chol, kernel.T @ residual.reshape(-1) - optimum)
    # In rows: (I + W K)^-1 = I - V B^-1 V^T K.
    gap = residual.reshape(-1) - optimum
    inner = _solved(chol, _times_root(root, fixed @ gap, transpose=True))
    return optimum + gap - _times_root(root, inner, transpose=False)


def _solved(chol: Array, x: Array) -> Array:
    """B^-1 x from the Cholesky root of B."""
    half = jax.scipy.linalg.solve_triangular(chol, x, lower=True)
    return jax.scipy.linalg.solve_triangular(chol.T, half, lower=False)


def _newton(model: Linear, kernel: Array, weights: Array, *, in_rows: bool) -> Array:
    """The weights after one Newton step."""
    eta = _eta(model, kernel, weights)
    residual, root = residual_and_root(eta, model.labels)
    chol = _cholesky(kernel, root, in_rows=in_rows)
    # target = W (eta - z) + residual, shape (m,): algorithm 3.1 of Rasmussen and Williams.
    centred = (kernel @ weights).reshape(-1)
    curved = _times_root(root, _times_root(root, centred, transpose=True), transpose=False)
    target = curved + residual.reshape(-1)
    if not in_rows:
        return _solved(chol, kernel.T @ target)
    # In rows: a = target - V B^-1 V^T K target.
    inner = _solved(chol, _times_root(root, kernel @ target, transpose=True))
    return target - _times_root(root, inner, transpose=False)


def posterior(
    design: Float[Array, "m d"], mode: Mode, *, in_rows: bool
) -> tuple[Float[Array, " d"], Float[Array, "d r"], Float[Array, " r"]]:
    """Mean u* of the coordinates, and the eigenvectors and eigenvalues of Phi^T W Phi.

    The covariance is the inverse of I + Phi^T W Phi. The variance along an eigenvector is
    1 / (1 + eigenvalue); in all other directions it is the prior variance, one.

    Args:
        design: Phi, for a mode in rows as well as in coordinates.
        mode: The result of `laplace_mode`.
        in_rows: Whether the weights of the mode are in rows.

    Returns:
        u* (d,), eigenvectors (d, r) and eigenvalues (r,), with r the smaller of m and d.
    """
    mean = design.T @ mode.weights if in_rows else mode.weights
    # SVD of V^T Phi instead of an eigendecomposition of its square: small eigenvalues stay accurate.
    half = _times_root(mode.root, design, transpose=True)
    _, singular, vectors = jnp.linalg.svd(half, full_matrices=False)
    return mean, vectors.T, singular**2


def predicted(
    mode: Mode,
    kernel: Float[Array, "m w"],
    cross: Float[Array, "j w"],
    own: Float[Array, "i k k"],
    *,
    in_rows: bool,
) -> tuple[Float[Array, "i k"], Float[Array, "i k k"]]:
    """Posterior mean of the change of the contrasts of other rows, and its covariance within each row.

    Args:
        mode: The result of `laplace_mode` with this kernel.
        kernel: K or Phi of the rows that were fitted.
        cross: Phi_* Phi^T if `in_rows`, else Phi_*, for the other rows, with j = other rows x contrasts.
        own: Prior covariance of the contrasts of each other row; used only if `in_rows`.
        in_rows: Whether the kernel is in rows.
    """
    shape = (len(own), mode.root.shape[1])
    chol = _cholesky(kernel, mode.root, in_rows=in_rows)
    columns = _times_root(mode.root, cross.T, transpose=True) if in_rows else cross.T
    half = jax.scipy.linalg.solve_triangular(chol, columns, lower=True).reshape(-1, *shape)
    inner = jnp.einsum("rik,ril->ikl", half, half)
    # In rows: K_** - K_* V B^-1 V^T K_*^T, algorithm 3.2 of Rasmussen and Williams; else Phi_* B^-1 Phi_*^T.
    return (cross @ mode.weights).reshape(shape), own - inner if in_rows else inner


def in_float64(model: Linear) -> Linear:
    """The same model in double precision, as NumPy arrays."""
    groups = tuple(np.asarray(x, np.float64) for x in model.groups)
    return Linear(np.asarray(model.offset, np.float64), groups, np.asarray(model.labels, np.int64))
