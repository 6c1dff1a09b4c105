r"""Coordinates in which a tangent posterior with random scales is nearly standard normal.

At log scales l, one for each group g of columns, the contrasts eta = z + sum_g e^(l_g) Phi_g u_g are Gaussian
a priori. They vary in a few directions Q only, eta = z + Q c with

    c ~ N(0, A),      A = sum_g e^(2 l_g) A_g,      A_g = Q^+ Phi_g Phi_g^T Q^+^T.

A quadratic likelihood around one mode, with curvature W and gradient r at Q c*, makes the posterior of c
Gaussian at every l. Its coordinates are

    c = R x,      x = m + L^-T e,      R R^T = A,      L L^T = I + R^T H R,      L L^T m = R^T h,

with H = Q^T W Q and h = H c* + Q^T r. These coordinates follow the scales. This removes the funnel of scales
and cores: e is close to N(0, I) at all scales. The density of (l, e) is exact; only the choice of coordinates
is approximate. A vector u with a given c is drawn from the prior conditional on c (Matheron's rule).

References: Vehtari et al. (2016), JMLR 17, for Gaussian sites that stay fixed while hyper-parameters change;
Wilson et al. (2020), arXiv 2002.09309, for Matheron's rule.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.typing import AnyArray
from bnlora.program.tangent.linear import Linear, log_likelihood, residual_and_root

LEFT_OUT = 0.05**2
"""Mean prior variance of a row's contrast, in squared nats, along the directions that are left out.

Draws of the adapters include these directions, drawn from the prior."""

NUGGET = 1e-5
"""Added to the diagonal of A, so that its Cholesky root also exists in single precision.

A is the identity at the reference scales."""


class Moving(NamedTuple):
    """The likelihood in the directions of the contrasts, and the arrays that define the coordinates.

    Attributes:
        grams: A_g, shape (group, r, r).
        columns: Q^+ Phi at scale one, all groups side by side, shape (r, p).
        group: Group of every column, shape (p,).
        basis: Q, shape (row, class - 1, r).
        curvature: H, shape (r, r).
        pull: h, shape (r,).
        offset: Contrasts of the base, shape (row, class - 1).
        labels: Classes, shape (row,).
    """

    grams: Float[AnyArray, "g r r"]
    columns: Float[AnyArray, "r p"]
    group: Int[AnyArray, " p"]
    basis: Float[AnyArray, "n k r"]
    curvature: Float[AnyArray, "r r"]
    pull: Float[AnyArray, " r"]
    offset: Float[AnyArray, "n k"]
    labels: Int[AnyArray, " n"]

    def roots(self, log_scales: Float[Array, " g"]) -> tuple[Array, Array, Array]:
        """R, L and m at some log scales."""
        count = self.pull.shape[0]
        weights = jnp.exp(2 * log_scales)
        eye = jnp.eye(count, dtype=weights.dtype)
        R = jnp.linalg.cholesky(jnp.tensordot(weights, jnp.asarray(self.grams), 1) + NUGGET * eye)
        L = jnp.linalg.cholesky(eye + R.T @ self.curvature @ R)  # eigenvalues >= 1: no nugget needed
        half = jax.scipy.linalg.solve_triangular(L, R.T @ self.pull, lower=True)
        return R, L, jax.scipy.linalg.solve_triangular(L.T, half, lower=False)

    def scaled(self, log_scales: Float[Array, " g"]) -> Float[Array, "r p"]:
        """`columns` including the scales, so that c is their product with a vector u."""
        return jnp.asarray(self.columns) * jnp.exp(log_scales)[self.group]

    def log_joint(self, log_scales: Float[Array, " g"], e: Float[Array, " r"]) -> Float[Array, ""]:
        """Log-density of e and the labels given the scales, in nats. The mode is near e = 0."""
        return _log_joint(self, log_scales, e)

    def cores(
        self, log_scales: Float[Array, " g"], e: Float[Array, " r"], normal: Float[Array, " p"]
    ) -> Float[Array, " p"]:
        """A vector u with the c of e. `normal` is a prior draw of u; it fills the directions outside c."""
        R, L, m = self.roots(log_scales)
        scaled = self.scaled(log_scales)
        # Matheron's rule: correct the prior draw by S^T A^-1 (c - S normal), with S the scaled columns.
        missing = R @ _prior_coordinates(L, m, e) - scaled @ normal
        return normal + scaled.T @ jax.scipy.linalg.cho_solve((R, True), missing)

    def standard(self, log_scales: Float[Array, " g"], u: Float[Array, " p"]) -> Float[Array, " r"]:
        """The e of a vector u: the inverse of `cores`."""
        R, L, m = self.roots(log_scales)
        x = jax.scipy.linalg.solve_triangular(R, self.scaled(log_scales) @ u, lower=True)
        return L.T @ (x - m)


def _prior_coordinates(L: Array, m: Array, e: Array) -> Array:
    """The x of e; x is standard normal under the prior."""
    return m + jax.scipy.linalg.solve_triangular(L.T, e, lower=False)


def _formula(moving: Moving, log_scales: Array, e: Array) -> Array:
    R, L, m = moving.roots(log_scales)
    x = _prior_coordinates(L, m, e)
    eta = jnp.asarray(moving.offset + moving.basis @ (R @ x))
    log_prior = -0.5 * (x @ x) - 0.5 * len(e) * jnp.log(2 * jnp.pi)
    # The last term is the log-determinant of the map from e to x, -log|L|.
    return log_likelihood(eta, moving.labels) + log_prior - jnp.log(jnp.diag(L)).sum()


# Evaluate chains one after the other: XLA's batched triangular solves on a CPU are a hundred times slower.
_value_and_slopes = jax.custom_batching.sequential_vmap(jax.value_and_grad(_formula, argnums=(1, 2)))


@jax.custom_vjp
def _log_joint(moving: Moving, log_scales: Array, e: Array) -> Array:
    return _value_and_slopes(moving, log_scales, e)[0]


def _forward(moving: Moving, log_scales: Array, e: Array) -> tuple[Array, tuple[Array, Array]]:
    return _value_and_slopes(moving, log_scales, e)


def _backward(slopes: tuple[Array, Array], cotangent: Array) -> tuple[None, Array, Array]:
    return None, cotangent * slopes[0], cotangent * slopes[1]


_log_joint.defvjp(_forward, _backward)


def moving(
    model: Linear,
    log_scales: Float[np.ndarray, " g"],
    spread: Float[np.ndarray, " g"],
    mode: Float[np.ndarray, " p"],
) -> Moving:
    """Compute the coordinates around the mode at some scales, in double precision.

    Args:
        model: The linear model, with one group for each scale.
        log_scales: Log scale of each group at the mode.
        spread: Posterior standard deviation of each log scale. Directions that matter at scales one standard
            deviation larger are kept.
        mode: Mode of the cores at `log_scales`.
    """
    flat = [np.asarray(x, np.float64).reshape(model.offset.size, -1) for x in model.groups]
    group = np.repeat(np.arange(len(flat)), [x.shape[1] for x in flat])
    design = np.concatenate(flat, axis=1)
    Q, singular, _ = scipy.linalg.svd(design * np.exp(log_scales + spread)[group], full_matrices=False)
    # Prior variance of a direction and all smaller ones, summed over rows.
    variance_from = np.cumsum(singular[::-1] ** 2)[::-1]
    kept = variance_from > LEFT_OUT * model.offset.size
    Q = Q[:, kept] * singular[kept]  # scaled so that A is the identity at the reference scales
    columns = (Q / singular[kept] ** 2).T @ design  # Q^+ Phi
    grams = np.stack([columns[:, group == g] @ columns[:, group == g].T for g in range(len(flat))])
    basis = Q.reshape(*model.offset.shape, -1)
    c = columns @ (np.exp(log_scales)[group] * mode)
    eta = jnp.asarray(model.offset + basis @ c)
    residual, root = (np.asarray(x) for x in residual_and_root(eta, model.labels))
    half = np.einsum("nij,nir->njr", root, basis).reshape(model.offset.size, -1)
    curvature = half.T @ half
    pull = curvature @ c + Q.T @ residual.reshape(-1)
    return Moving(grams, columns, group, basis, curvature, pull, model.offset, model.labels)
