r"""The conditional law of a weight matrix given its inducing matrix, as a NumPyro distribution.

    W | V  ~  N( sigma F_r V F_c^T,  lam^2 sigma^2 (I - P_r (x) P_c) ),
    P = Q diag(p) Q^T,    F = Q diag(sqrt p),

with orthonormal frames `Q` and eigenvalues `p` in (0, 1) on each side. Let R = (W / sigma - F_r V F_c^T) /
lam. Then

    R' Sigma^-1 R = ||R||^2 + sum_ij (1 / (1 - p_i q_j) - 1) (Q_r^T R Q_c)_ij^2,
    log det Sigma = sum_ij log(1 - p_i q_j),

so neither the density nor the sampler forms an array of size (d_o d_i)^2. Two such laws that differ only in
`lam` have KL(lam_q || lam_p) = d_o d_i (rho^2 / 2 - log rho - 1 / 2), rho = lam_q / lam_p, for all `V` and
sides.

Reference: Lin et al. (2026), Bayesian-LoRA, arXiv 2601.21003; Ritter et al. (2021) for the joint Gaussian.

Two more laws replace NumPyro's own: `LowRankGaussian` factorises one matrix at a time (`gp.one_by_one` gives
the reason), and `MatrixAffine` is the map behind a matrix normal.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.transforms import Transform

from bnlora.priors import gp


class MatrixConditional(dist.Distribution):
    """The law of `W | V` in the sparse GP, with standard deviations multiplied by `lam`.

    Args:
        V: Whitened inducing matrix, shape `(layer, k_r, k_c)`.
        rows: Row side from `gp.frame_side`, factor of shape `(layer, d_o, k_r)`.
        cols: Column side, factor of shape `(layer, d_i, k_c)`.
        sigma: Prior standard deviation of a weight; must broadcast against `(layer, d_o, d_i)`.
        lam: Factor on the conditional standard deviation, shape `(layer,)` or `()`.

    Raises:
        ValueError: If a side does not come from orthonormal frames.
    """

    support = constraints.real_matrix
    pytree_data_fields = ("V", "rows", "cols", "sigma", "lam")

    def __init__(
        self,
        V: Float[Array, "layer k_r k_c"],
        rows: gp.Side,
        cols: gp.Side,
        sigma: float | Array,
        lam: float | Array = 1.0,
        *,
        validate_args: bool | None = None,
    ):
        for name, side in {"rows": rows, "cols": cols}.items():
            if side.gram.ndim >= side.factor.ndim:
                raise ValueError(f"{name} must be a side of orthonormal frames (`gp.frame_side`)")
        self.V, self.rows, self.cols, self.sigma = V, rows, cols, sigma
        self.lam = jnp.asarray(lam, V.dtype)
        shape = (rows.factor.shape[-2], cols.factor.shape[-2])
        super().__init__(V.shape[:-2], shape, validate_args=validate_args)

    def scaled_to(self, lam: float | Array) -> "MatrixConditional":
        """The same law with another `lam`."""
        return MatrixConditional(self.V, self.rows, self.cols, self.sigma, lam)

    @property
    def mean(self) -> Array:
        """`sigma F_r V F_c^T`."""
        return self.sigma * gp.conditional_mean(self.V, self.rows, self.cols)

    @property
    def _lam(self) -> Array:
        return self.lam[..., None, None]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws, shape `sample_shape + (layer, d_o, d_i)`, by the symmetric root of `Sigma`."""
        E = jax.random.normal(key, (*sample_shape, *self.V.shape[:-2], *self.event_shape), self.V.dtype)
        return self.mean + self._lam * self.sigma * gp.conditional_noise(E, self.rows, self.cols)

    def log_prob(self, value: Array) -> Array:
        """Log-density of `W` in nats, one value for each layer."""
        R = (value - self.mean) / (self._lam * self.sigma)
        # (layer, k_r, k_c): eigenvalues 1 - p_i q_j of Sigma. The other eigenvalues are 1.
        gap = gp.conditional_gap(self.rows.gram[..., :, None], self.cols.gram[..., None, :])
        # F = Q sqrt(p), so (F^T R F)^2 already contains p q, and p q / (1 - p q) = 1 / (1 - p q) - 1.
        inner = jnp.swapaxes(self.rows.factor, -1, -2) @ R @ self.cols.factor
        quadratic = (R**2).sum((-2, -1)) + (inner**2 / gap).sum((-2, -1))
        # Use the shape of `R`: under vmap over layers, `batch_shape` still includes the mapped axis.
        scale = jnp.broadcast_to(self._lam * self.sigma, R.shape)
        logdet = jnp.log(gap).sum((-2, -1)) + 2 * jnp.log(scale).sum((-2, -1))
        return -0.5 * (quadratic + logdet + math.prod(self.event_shape) * math.log(2 * math.pi))


@kl_divergence.register(MatrixConditional, MatrixConditional)
def _kl_of_two_scales(q: MatrixConditional, p: MatrixConditional) -> Array:
    """KL in closed form. It requires that both laws share `V`, sides and `sigma`, as guide and prior do."""
    kl = gp.conditional_kl(math.prod(q.event_shape), q.lam / p.lam)
    return jnp.broadcast_to(kl, q.batch_shape)


class LowRankGaussian(dist.Distribution):
    """`x = loc + scale (z_1 + F z_2)`: covariance `diag(scale) (I + F F^T) diag(scale)`.

    Args:
        loc: Mean, shape `(..., size)`.
        scale: Positive scales, shape `(..., size)`.
        factor: `F`, shape `(..., size, rank)`.
    """

    support = constraints.real_vector
    pytree_data_fields = ("loc", "scale", "factor")

    def __init__(
        self,
        loc: Float[Array, "... size"],
        scale: Float[Array, "... size"],
        factor: Float[Array, "... size rank"],
        *,
        validate_args: bool | None = None,
    ):
        self.loc, self.scale, self.factor = loc, scale, factor
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Array:
        """`loc`."""
        return self.loc

    @property
    def covariance_matrix(self) -> Array:
        """The full covariance, shape `(..., size, size)`."""
        inner = jnp.eye(self.event_shape[0]) + self.factor @ jnp.swapaxes(self.factor, -1, -2)
        return self.scale[..., :, None] * inner * self.scale[..., None, :]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape `sample_shape + (..., size)`."""
        size, rank = self.factor.shape[-2:]
        z = jax.random.normal(key, (*sample_shape, *self.batch_shape, size + rank), self.loc.dtype)
        correlated = (self.factor @ z[..., size:, None])[..., 0]
        return self.loc + self.scale * (z[..., :size] + correlated)

    def log_prob(self, value: Array) -> Array:
        """Log-density by the Woodbury identity; only a `rank x rank` matrix is factorised."""
        R = (value - self.loc) / self.scale
        F_t = jnp.swapaxes(self.factor, -1, -2)
        # With L L^T = I + F^T F (rank x rank): (I + F F^T)^-1 = I - F (L L^T)^-1 F^T,
        # and log det(I + F F^T) = 2 log det L.
        root = gp.one_by_one(jnp.linalg.cholesky, jnp.eye(F_t.shape[-2]) + F_t @ self.factor)
        inner = F_t @ R[..., None]
        root = jnp.broadcast_to(root, (*inner.shape[:-2], *root.shape[-2:]))  # sample axes of `value`
        solved = gp.one_by_one(gp.lower_solve, root, inner)
        logdet = jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1) + jnp.log(self.scale).sum(-1)
        quadratic = (R**2).sum(-1) - (solved**2).sum((-2, -1))
        return -0.5 * (quadratic + self.event_shape[0] * math.log(2 * math.pi)) - logdet


class MatrixAffine(Transform):
    """The map `z -> loc + R z C^T`: a standard normal matrix becomes matrix normal with these roots.

    Args:
        loc: Mean, shape `(..., m, n)`.
        R: Lower triangular root of the row covariance, shape `(..., m, m)`.
        C: Lower triangular root of the column covariance, shape `(..., n, n)`.
    """

    domain = codomain = constraints.real_matrix

    def __init__(self, loc: Float[Array, "... m n"], R: Float[Array, "... m m"], C: Float[Array, "... n n"]):
        self.loc, self.R, self.C = loc, R, C

    def __call__(self, x: Array) -> Array:
        """Map a standard normal matrix to the matrix normal."""
        return self.loc + self.R @ x @ jnp.swapaxes(self.C, -1, -2)

    def _inverse(self, y: Array) -> Array:
        shift = y - self.loc
        R, C = (jnp.broadcast_to(L, (*shift.shape[:-2], *L.shape[-2:])) for L in (self.R, self.C))
        return gp.whiten(shift, R, C)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """`n log|R| + m log|C|`, one value for each batch entry."""
        rows, cols = (jnp.log(jnp.abs(jnp.diagonal(L, axis1=-2, axis2=-1))).sum(-1) for L in (self.R, self.C))
        return self.loc.shape[-1] * rows + self.loc.shape[-2] * cols

    def tree_flatten(self):
        """All three matrices are leaves."""
        return (self.loc, self.R, self.C), (("loc", "R", "C"), {})
