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
"""

import math

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence

from bnlora import gp


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
        """The same law with another `lam`: what a guide makes of the prior's."""
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
        E = jax.random.normal(key, (*sample_shape, *self.batch_shape, *self.event_shape), self.V.dtype)
        return self.mean + self._lam * self.sigma * gp.conditional_noise(E, self.rows, self.cols)

    def log_prob(self, value: Array) -> Array:
        """Log-density of `W`, shape of the layers."""
        R = (value - self.mean) / (self._lam * self.sigma)
        gap = gp.conditional_gap(self.rows.gram[..., :, None], self.cols.gram[..., None, :])
        # As F = Q sqrt(p), the square of F^T R F already carries p q: p q / (1 - p q) is 1 / (1 - p q) - 1.
        inner = jnp.swapaxes(self.rows.factor, -1, -2) @ R @ self.cols.factor
        quadratic = (R**2).sum((-2, -1)) + (inner**2 / gap).sum((-2, -1))
        scale = jnp.broadcast_to(self._lam * self.sigma, (*self.batch_shape, *self.event_shape))
        logdet = jnp.log(gap).sum((-2, -1)) + 2 * jnp.log(scale).sum((-2, -1))
        return -0.5 * (quadratic + logdet + math.prod(self.event_shape) * math.log(2 * math.pi))


@kl_divergence.register(MatrixConditional, MatrixConditional)
def _kl_of_two_scales(q: MatrixConditional, p: MatrixConditional) -> Array:
    """Closed form, which holds where both share `V`, sides and `sigma`, as guide and prior do."""
    kl = gp.conditional_kl(math.prod(q.event_shape), q.lam / p.lam)
    return jnp.broadcast_to(kl, q.batch_shape)
