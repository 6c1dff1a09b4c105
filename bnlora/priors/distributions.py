r"""The conditional law of a weight matrix given its inducing matrix, as a NumPyro distribution.

    W | V  ~  N( sigma F_r V F_c^T,  lam^2 sigma^2 (I - P_r (x) P_c) ),        P = Q diag(p) Q^T,  F = Q
    diag(sqrt p)

with orthonormal frames `Q` and eigenvalues `p` in (0, 1) on each side. With R = (W / sigma - F_r V F_c^T) /
lam,

    R' Sigma^-1 R = ||R||^2 + sum_ij (1 / (1 - p_i q_j) - 1) (Q_r^T R Q_c)_ij^2,
    log det Sigma = sum_ij log(1 - p_i q_j),

so that neither density nor sampler forms anything of size (d_o d_i)^2. Two such laws that differ in `lam`
alone have KL(lam_q || lam_p) = d_o d_i (rho^2 / 2 - log rho - 1 / 2), rho = lam_q / lam_p: free of `V` and
the sides.

Reference: Lin et al. (2026), Bayesian-LoRA, arXiv 2601.21003; Ritter et al. (2021) for the joint Gaussian.

Two more laws that NumPyro has in forms that do not fit here: `LowRankGaussian`, whose factorisations take one
matrix at a time (`gp.one_by_one` says why), and `MatrixAffine`, the map behind a matrix normal.
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
    """`W | V` of the sparse GP, with `lam` times its standard deviations.

    Args:
        V: Whitened inducing matrix, shape `(layer, k_r, k_c)`.
        rows: Row side from `gp.frame_side`, factor of shape `(layer, d_o, k_r)`.
        cols: Column side, factor of shape `(layer, d_i, k_c)`.
        sigma: Prior standard deviation of a weight, broadcasting against `(layer, d_o, d_i)`.
        lam: Factor on the conditional standard deviation, shape `(layer,)` or `()`.

    Raises:
        ValueError: When a side does not come from orthonormal frames.
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
        """Draws by the symmetric root of `Sigma`, shape `sample_shape + (layer, d_o, d_i)`."""
        E = jax.random.normal(key, (*sample_shape, *self.V.shape[:-2], *self.event_shape), self.V.dtype)
        return self.mean + self._lam * self.sigma * gp.conditional_noise(E, self.rows, self.cols)

    def log_prob(self, value: Array) -> Array:
        """Log-density of `W`, shape of the layers."""
        R = (value - self.mean) / (self._lam * self.sigma)
        gap = gp.conditional_gap(self.rows.gram[..., :, None], self.cols.gram[..., None, :])
        # As F = Q sqrt(p), the square of F^T R F already carries p q: p q / (1 - p q) is 1 / (1 - p q) - 1.
        inner = jnp.swapaxes(self.rows.factor, -1, -2) @ R @ self.cols.factor
        quadratic = (R**2).sum((-2, -1)) + (inner**2 / gap).sum((-2, -1))
        # The shape of `R` rather than `batch_shape`, which is that of before when layers are mapped by vmap.
        scale = jnp.broadcast_to(self._lam * self.sigma, R.shape)
        logdet = jnp.log(gap).sum((-2, -1)) + 2 * jnp.log(scale).sum((-2, -1))
        return -0.5 * (quadratic + logdet + math.prod(self.event_shape) * math.log(2 * math.pi))


@kl_divergence.register(MatrixConditional, MatrixConditional)
def _kl_of_two_scales(q: MatrixConditional, p: MatrixConditional) -> Array:
    """Closed form, which holds where both share `V`, sides and `sigma`, as guide and prior do."""
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
        """The whole covariance, shape `(..., size, size)`."""
        inner = jnp.eye(self.event_shape[0]) + self.factor @ jnp.swapaxes(self.factor, -1, -2)
        return self.scale[..., :, None] * inner * self.scale[..., None, :]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape `sample_shape + (..., size)`."""
        size, rank = self.factor.shape[-2:]
        z = jax.random.normal(key, (*sample_shape, *self.batch_shape, size + rank), self.loc.dtype)
        correlated = (self.factor @ z[..., size:, None])[..., 0]
        return self.loc + self.scale * (z[..., :size] + correlated)

    def log_prob(self, value: Array) -> Array:
        """Log-density by the Woodbury identity: a matrix of side `rank` is the largest factorised."""
        R = (value - self.loc) / self.scale
        F_t = jnp.swapaxes(self.factor, -1, -2)
        root = gp.one_by_one(jnp.linalg.cholesky, jnp.eye(F_t.shape[-2]) + F_t @ self.factor)
        inner = F_t @ R[..., None]
        root = jnp.broadcast_to(root, (*inner.shape[:-2], *root.shape[-2:]))
        solved = gp.one_by_one(gp.lower_solve, root, inner)
        logdet = jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1) + jnp.log(self.scale).sum(-1)
        quadratic = (R**2).sum(-1) - (solved**2).sum((-2, -1))
        return -0.5 * (quadratic + self.event_shape[0] * math.log(2 * math.pi)) - logdet


class MatrixAffine(Transform):
    """`z -> loc + R z C^T`: a standard normal matrix becomes matrix normal with these roots.

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
        """`n log|R| + m log|C|`, shape of the batch."""
        rows, cols = (jnp.log(jnp.abs(jnp.diagonal(L, axis1=-2, axis2=-1))).sum(-1) for L in (self.R, self.C))
        return self.loc.shape[-1] * rows + self.loc.shape[-2] * cols

    def tree_flatten(self):
        """All three matrices are leaves."""
        return (self.loc, self.R, self.C), (("loc", "R", "C"), {})
