r"""Inducing-point algebra of a matrix-valued Gaussian process: pure functions, no sampling.

A weight factor `W` (d_o x d_i) has independent entries N(0, sigma^2). A row side and a column side connect
it to an inducing matrix `U` (m_r x m_c):

    W | U  =  sigma (F_r V F_c^T + Sigma^{1/2} E),     Sigma = I - P_r (x) P_c,
    V, E   ~  independent standard normals,            P = F F^T with eigenvalues in [0, 1),

where `V` is the whitened inducing matrix (U = L_r V L_c^T). The marginal of `W` is N(0, sigma^2) for all
sides. So the sides are variational parameters: the fit maximises the bound over them.

| paper          | code              | shape        |
|----------------|-------------------|--------------|
| V              | `V`               | ... k_r k_c  |
| E              | `E`               | ... d_o d_i  |
| F_r, F_c       | `Side.factor`     | ... d k      |
| F^T F          | `Side.gram`       | ... k (k)    |
| Z_r, Z_c       | `Z`               | ... m d      |
| D_r, D_c       | `D`               | ... m        |
| lambda         | `lam`             | ...          |

A side is built from orthonormal frames (`frame_side`; no Cholesky, no jitter) or from the paper's inducing
bases (`inducing_side`; K = Z Z^T + D^2). The square root of Sigma is the symmetric one,

    Sigma^{1/2} E = E - F_r H(F_r^T E F_c) F_c^T,

where H, in the eigenbases of the two Gram matrices, multiplies entry (i, j) by g(p_i q_j), with
g(s) = (1 - sqrt(1 - s)) / s = 1 / (1 + sqrt(1 - s)). The last form has no singularity at s = 0.

Reference: Lin et al. (2026), Bayesian-LoRA, arXiv 2601.21003; Ritter et al. (2021), Sparse
uncertainty representation in deep learning with inducing weights, for the joint Gaussian.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Side(NamedTuple):
    """One side (rows or columns) of the inducing structure.

    Attributes:
        factor: `F`, of shape `(..., d, k)`, with `F F^T = P`.
        gram: `F^T F`, of shape `(..., k)` if it is diagonal, otherwise `(..., k, k)`.
    """

    factor: Float[Array, "... d k"]
    gram: Array


def frame_side(free: Float[Array, "... d k"], reliability: Float[Array, "... k"]) -> Side:
    """Build a side from an orthonormal frame `Q` (QR of `free`) and the eigenvalues of `P`.

    Args:
        free: Any full-rank matrix with `k <= d`, shape `(..., d, k)`.
        reliability: Eigenvalues of `P = Q diag(reliability) Q^T`, each in (0, 1).

    Raises:
        ValueError: If `k > d`: no frame has more than `d` orthonormal vectors.
    """
    d, k = free.shape[-2:]
    if k > d:
        raise ValueError(f"a frame needs at most as many vectors as dimensions; got {k} vectors for {d}")
    return _frame_side(free, reliability)


@jax.jit  # sides of one shape share its text, and that of its derivative
def _frame_side(free: Array, reliability: Array) -> Side:
    frame, _ = _orthonormal(free)
    return Side(frame * jnp.sqrt(reliability)[..., None, :], reliability)


@jax.custom_jvp
def _orthonormal(free: Array) -> tuple[Array, Array]:
    """`Q` and `T = R^{-1}` of `free = Q R` with R_jj > 0, by one loop over columns for all layers.

    Two passes of Gram-Schmidt for each column give a `Q` that is orthonormal to rounding if `free` has full
    numerical rank (Giraud et al., 2005), and `Q` is continuous in `free`. LAPACK would need one call for each
    layer (see `one_by_one`), and its solves in the derivative take milliseconds when the cores are busy.
    """

    def column(j: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        frame, inverse = done  # columns from j onwards are zero
        rest = jax.lax.dynamic_slice_in_dim(free, j, 1, axis=-1)
        unit = (jnp.arange(free.shape[-1]) == j)[:, None]
        shares = jnp.zeros_like(inverse[..., :1])
        for _ in range(2):
            share = jnp.swapaxes(frame, -1, -2) @ rest
            rest, shares = rest - frame @ share, shares + share
        length = jnp.linalg.norm(rest, axis=-2, keepdims=True)
        # `unit.T` is true in column j: only that column is written.
        frame = jnp.where(unit.T, rest / length, frame)
        return frame, jnp.where(unit.T, (unit - inverse @ shares) / length, inverse)

    square = jnp.zeros((*free.shape[:-2], free.shape[-1], free.shape[-1]), free.dtype)
    return jax.lax.fori_loop(0, free.shape[-1], column, (jnp.zeros_like(free), square))


@_orthonormal.defjvp
def _orthonormal_jvp(primals, tangents):
    """With M = dX T, P = Q^T M and O = tril(P, -1) - tril(P, -1)^T: dQ = M - Q (P - O), dT = -T (P - O)."""
    frame, inverse = _orthonormal(*primals)
    moved = tangents[0] @ inverse
    inside = jnp.swapaxes(frame, -1, -2) @ moved
    below = jnp.tril(inside, -1)
    upper = inside - below + jnp.swapaxes(below, -1, -2)
    return (frame, inverse), (moved - frame @ upper, -inverse @ upper)


def inducing_side(Z: Float[Array, "... m d"], D: Float[Array, "... m"]) -> Side:
    """Build a side from inducing bases `Z` and inducing noise `D > 0`, with `K = Z Z^T + diag(D)^2`.

    `F = Z^T L^{-T}` with `L` the Cholesky factor of `K`, so `F F^T = Z^T K^{-1} Z`. Add any jitter to `D`
    first, so that mean, noise and whitening use the same `K`.
    """
    whitened = one_by_one(lower_solve, inducing_root(Z, D), Z)
    return Side(jnp.swapaxes(whitened, -1, -2), whitened @ jnp.swapaxes(whitened, -1, -2))


def inducing_root(Z: Float[Array, "... m d"], D: Float[Array, "... m"]) -> Float[Array, "... m m"]:
    """The lower triangular `L` with `L L^T = K = Z Z^T + diag(D)^2`."""
    each = jnp.arange(Z.shape[-2])
    K = (Z @ jnp.swapaxes(Z, -1, -2)).at[..., each, each].add(D**2)
    return one_by_one(jnp.linalg.cholesky, K)


def whiten(
    U: Float[Array, "... m_r m_c"], L_r: Float[Array, "... m_r m_r"], L_c: Float[Array, "... m_c m_c"]
) -> Float[Array, "... m_r m_c"]:
    """`V = L_r^{-1} U L_c^{-T}`; standard normal if `U` is matrix normal with these roots."""
    half = one_by_one(lower_solve, L_r, U)
    return jnp.swapaxes(one_by_one(lower_solve, L_c, jnp.swapaxes(half, -1, -2)), -1, -2)


def lower_solve(L: Array, right: Array) -> Array:
    """`L^{-1} right` for one lower triangular matrix."""
    return jax.scipy.linalg.solve_triangular(L, right, lower=True)


def one_by_one(function: Callable[..., Any], *stacks: Array) -> Any:
    """Apply a factorisation to the matrices of some stacks, one matrix at a time.

    jaxlib splits a batched LAPACK call over XLA's threads and blocks the calling thread until all parts are
    done. Two such calls in one program hang a machine with two cores (jaxlib 0.10.2). A call for a single
    matrix is not split.
    """
    batch = stacks[0].shape[:-2]
    results = jax.lax.map(lambda one: function(*one), [x.reshape(-1, *x.shape[-2:]) for x in stacks])
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)


def conditional_mean(V: Float[Array, "... k_r k_c"], rows: Side, cols: Side) -> Float[Array, "... d_o d_i"]:
    """Conditional mean of `W / sigma`, given the whitened inducing matrix: `F_r V F_c^T`."""
    return rows.factor @ V @ jnp.swapaxes(cols.factor, -1, -2)


@jax.jit  # factors of one shape share its text, and that of its derivative
def conditional_weights(
    V: Float[Array, "... k_r k_c"],
    E: Float[Array, "... d_o d_i"],
    rows: Side,
    cols: Side,
    lam: Float[Array, "..."] | float,
) -> Float[Array, "... d_o d_i"]:
    """`W / sigma`: the mean plus `lam` times the noise, with one product by each factor for both."""
    inner = V - lam * _shrunk(E, rows, cols)
    return lam * E + rows.factor @ inner @ jnp.swapaxes(cols.factor, -1, -2)


def conditional_noise(E: Float[Array, "... d_o d_i"], rows: Side, cols: Side) -> Float[Array, "... d_o d_i"]:
    """`Sigma^{1/2} E` with the symmetric root of `Sigma = I - P_r (x) P_c`.

    No array of size `(d_o d_i)^2` is formed. The cost is that of multiplying `E` by the two factors.
    """
    return E - rows.factor @ _shrunk(E, rows, cols) @ jnp.swapaxes(cols.factor, -1, -2)


def _shrunk(E: Array, rows: Side, cols: Side) -> Array:
    """`H(F_r^T E F_c)`, what the root of `Sigma` takes from `E` between the factors."""
    inner = jnp.swapaxes(rows.factor, -1, -2) @ E @ cols.factor
    # Diagonal Gram matrices (orthonormal frames) are already in their eigenbases.
    if rows.gram.ndim < rows.factor.ndim:
        return _gain(rows.gram[..., :, None], cols.gram[..., None, :]) * inner
    return _shrink(rows.gram, cols.gram, inner)


def conditional_gap(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """Eigenvalues `1 - p q` of `Sigma`, with a floor because rounding can push `p q` above 1 by an ulp."""
    gap = 1.0 - p * q
    floor = jnp.full_like(gap, jnp.finfo(gap.dtype).eps)
    return jax.lax.select(gap > floor, gap, floor)  # the derivative of a maximum has more operations


def conditional_kl(size: int, lam: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL of N(M, lam^2 sigma^2 Sigma) from N(M, sigma^2 Sigma) in nats, for `size = d_o d_i` weights.

    It is `size (lam^2 / 2 - log lam - 1 / 2)`, independent of `U` and of the sides, and zero only at
    `lam = 1`.
    """
    return size * (0.5 * lam**2 - jnp.log(lam) - 0.5)


def _root(p: Array, q: Array) -> Array:
    return jnp.sqrt(conditional_gap(p, q))


def _gain(p: Array, q: Array) -> Array:
    return 1.0 / (1.0 + _root(p, q))


@jax.custom_jvp
def _shrink(gram_r: Array, gram_c: Array, inner: Array) -> Array:
    """`H(inner)`: multiply entry (i, j) by g(p_i q_j) in the eigenbases of two symmetric matrices."""
    (p, R_r), (q, R_c) = (one_by_one(jnp.linalg.eigh, gram) for gram in (gram_r, gram_c))
    rotated = jnp.swapaxes(R_r, -1, -2) @ inner @ R_c
    return R_r @ (_gain(p[..., :, None], q[..., None, :]) * rotated) @ jnp.swapaxes(R_c, -1, -2)


@_shrink.defjvp
def _shrink_jvp(primals, tangents):
    """Daleckii-Krein rule with the divided differences of g in closed form.

    The derivative of an eigenvector contains 1 / (p_i - p_k), which is infinite if two eigenvalues are equal.
    The derivative of H is finite: with u = sqrt(1 - p q),
    (g(p_i q) - g(p_k q)) / (p_i - p_k) = q / ((u_i + u_k)(1 + u_i)(1 + u_k)).
    """
    gram_r, gram_c, inner = primals
    (p, R_r), (q, R_c) = (one_by_one(jnp.linalg.eigh, gram) for gram in (gram_r, gram_c))

    def to_eigen(left, x, right):
        return jnp.swapaxes(left, -1, -2) @ x @ right

    rotated = to_eigen(R_r, inner, R_c)
    d_r, d_c, d_inner = (to_eigen(*x) for x in zip((R_r, R_c, R_r), tangents, (R_r, R_c, R_c), strict=True))
    u = _root(p[..., :, None], q[..., None, :])  # (..., k_r, k_c)

    def divided(u_1, u_2, other):
        return other / ((u_1 + u_2) * (1.0 + u_1) * (1.0 + u_2))

    by_row = divided(u[..., :, None, :], u[..., None, :, :], q[..., None, None, :])  # (..., i, k, j)
    by_col = divided(u[..., :, :, None], u[..., :, None, :], p[..., :, None, None])  # (..., i, l, j)
    tangent = (
        d_inner / (1.0 + u)
        + jnp.einsum("...ikj,...ik,...kj->...ij", by_row, d_r, rotated)
        + jnp.einsum("...ilj,...il,...lj->...ij", by_col, rotated, d_c)
    )
    back = jnp.swapaxes(R_c, -1, -2)
    return R_r @ (rotated / (1.0 + u)) @ back, R_r @ tangent @ back
