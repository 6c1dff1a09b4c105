r"""Gaussian posteriors with a curvature of a given structure: plain linear algebra on arrays, in float64.

With J the Jacobian of row i's logits, L_i the likelihood's Hessian in them (softmax: diag(p) - p p^T) and a
prior N(0, 1/tau) on every coordinate,

    G = sum_i J_i^T L_i J_i = R^T R,    R = stack_i(L_i^{1/2} J_i),    posterior covariance (G + tau I)^{-1}.

A structure replaces G and offers two things: log det(G + tau I), and x -> (G + tau I)^{-1/2} x, which turns
standard normals into draws.

| structure    | G is replaced by                                                              |
|--------------|-------------------------------------------------------------------------------|
| `Diagonal`   | its diagonal                                                                  |
| `LowRank`    | its leading eigenpairs; all of them (at most rows x classes) are G itself     |
| `Kronecker`  | for each weight matrix, the Kronecker product nearest to its block (Frobenius)|

A prior with another precision for each coordinate, tau w, is the same problem in u = w^{1/2} theta: divide
the columns of J by w^{1/2} first. Leading eigenpairs are then those that the data inform most beyond the
prior.

References: Schraudolph (2002) for G; Van Loan and Pitsianis (1993), Approximation with Kronecker products;
Spantini et al. (2015), Optimal low-rank approximations of Bayesian linear inverse problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float


@runtime_checkable
class Curvature(Protocol):
    """A positive semidefinite matrix G over the weights, held in some structure."""

    @property
    def size(self) -> int:
        """Number of weights p."""
        ...

    def log_det(self, precision: float) -> float:
        """`log det(G + precision I)`."""
        ...

    def spread(self, normals: Float[np.ndarray, "s p"], precision: float) -> Float[np.ndarray, "s p"]:
        """Each row times the symmetric root of `(G + precision I)^{-1}`."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """A diagonal G.

    Attributes:
        values: Its diagonal, shape (p,).
    """

    values: Float[np.ndarray, " p"]

    @property
    def size(self) -> int:
        """Number of weights p."""
        return len(self.values)

    def log_det(self, precision: float) -> float:
        """`log det(G + precision I)`."""
        return float(np.log(self.values + precision).sum())

    def spread(self, normals: Float[np.ndarray, "s p"], precision: float) -> Float[np.ndarray, "s p"]:
        """Each row times the symmetric root of `(G + precision I)^{-1}`."""
        return normals / np.sqrt(self.values + precision)


@dataclass(frozen=True)
class LowRank:
    """G = V diag(values) V^T with orthonormal columns V; exact when no eigenpair was left out.

    Attributes:
        vectors: V, shape (p, r).
        values: Eigenvalues, decreasing, shape (r,).
    """

    vectors: Float[np.ndarray, "p r"]
    values: Float[np.ndarray, " r"]

    @property
    def size(self) -> int:
        """Number of weights p."""
        return len(self.vectors)

    def log_det(self, precision: float) -> float:
        """`log det(G + precision I)`."""
        return float(self.size * np.log(precision) + np.log1p(self.values / precision).sum())

    def spread(self, normals: Float[np.ndarray, "s p"], precision: float) -> Float[np.ndarray, "s p"]:
        """Each row times the symmetric root of `(G + precision I)^{-1}`."""
        shrink = (self.values + precision) ** -0.5 - precision**-0.5
        return normals * precision**-0.5 + (normals @ self.vectors * shrink) @ self.vectors.T


@dataclass(frozen=True)
class Kronecker:
    """Blocks `B (x) A` along the diagonal, one for each weight matrix, held by their eigenvectors.

    Attributes:
        left: Eigenvectors of each B, shape (d_o, d_o).
        right: Eigenvectors of each A, shape (d_i, d_i).
        values: Products of their eigenvalues, shape (d_o, d_i).
    """

    left: tuple[Float[np.ndarray, "d_o d_o"], ...]
    right: tuple[Float[np.ndarray, "d_i d_i"], ...]
    values: tuple[Float[np.ndarray, "d_o d_i"], ...]

    @property
    def size(self) -> int:
        """Number of weights p."""
        return sum(block.size for block in self.values)

    def log_det(self, precision: float) -> float:
        """`log det(G + precision I)`."""
        return float(sum(np.log(block + precision).sum() for block in self.values))

    def spread(self, normals: Float[np.ndarray, "s p"], precision: float) -> Float[np.ndarray, "s p"]:
        """Each row times the symmetric root of `(G + precision I)^{-1}`."""
        ends = np.cumsum([block.size for block in self.values])[:-1]
        found = []
        for part, U, V, block in zip(
            np.split(normals, ends, axis=1), self.left, self.right, self.values, strict=True
        ):
            inside = U.T @ part.reshape(-1, *block.shape) @ V / np.sqrt(block + precision)
            found.append((U @ inside @ V.T).reshape(len(normals), -1))
        return np.concatenate(found, axis=1)


def softmax_hessians(probs: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c c"]:
    """`diag(p) - p p^T` of each row: the Hessian of `-log softmax` in the logits, whatever the class."""
    return probs[:, :, None] * (np.eye(probs.shape[1]) - probs[:, None, :])


def rooted_jacobian(
    jacobian: Float[np.ndarray, "n c p"], hessians: Float[np.ndarray, "n c c"]
) -> Float[np.ndarray, "nc p"]:
    """R with `R^T R = sum_i J_i^T L_i J_i`, through the symmetric root of each `L_i`."""
    values, vectors = np.linalg.eigh(hessians)
    # Rounding may leave an eigenvalue of a semidefinite matrix a little below zero.
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :] @ vectors.swapaxes(1, 2)
    return (root @ jacobian).reshape(-1, jacobian.shape[-1])


def diagonal(R: Float[np.ndarray, "m p"]) -> Diagonal:
    """The diagonal of `R^T R`."""
    return Diagonal((np.asarray(R, np.float64) ** 2).sum(0))


def low_rank(R: Float[np.ndarray, "m p"], rank: int | None = None) -> LowRank:
    """The leading `rank` eigenpairs of `R^T R` (all when omitted), from the thin SVD of R.

    Raises:
        ValueError: When the rank is below one or above that of R.
    """
    _, singular, rows = np.linalg.svd(np.asarray(R, np.float64), full_matrices=False)
    if rank is not None and not 1 <= rank <= len(singular):
        raise ValueError(f"rank must be from 1 to {len(singular)}, the most that these rows give; got {rank}")
    return LowRank(rows[:rank].T, singular[:rank] ** 2)


def kronecker(
    R: Float[np.ndarray, "m p"], shapes: Sequence[tuple[int, int]], *, iterations: int = 30
) -> Kronecker:
    """The nearest Kronecker product to every diagonal block of `R^T R`.

    Args:
        R: Rows whose outer products sum to G, shape (m, p).
        shapes: Shape (d_o, d_i) of each weight matrix, in the order of the columns of R.
        iterations: Steps of the power iteration.

    Raises:
        ValueError: When the shapes do not fill the columns.
    """
    R = np.asarray(R, np.float64)
    sizes = [rows * cols for rows, cols in shapes]
    if sum(sizes) != R.shape[1]:
        raise ValueError(f"the shapes {list(shapes)} hold {sum(sizes)} weights, but there are {R.shape[1]}")
    left, right, values = [], [], []
    for part, shape in zip(np.split(R, np.cumsum(sizes)[:-1], axis=1), shapes, strict=True):
        B, A = nearest_kronecker(part.reshape(-1, *shape), iterations=iterations)
        (b, U), (a, V) = np.linalg.eigh(B), np.linalg.eigh(A)
        left.append(U)
        right.append(V)
        values.append(np.outer(np.maximum(b, 0.0), np.maximum(a, 0.0)))
    return Kronecker(tuple(left), tuple(right), tuple(values))


def nearest_kronecker(
    g: Float[np.ndarray, "m d_o d_i"], *, iterations: int = 30
) -> tuple[Float[np.ndarray, "d_o d_o"], Float[np.ndarray, "d_i d_i"]]:
    """B and A that minimise `|| sum_m vec(g_m) vec(g_m)^T - B (x) A ||` in Frobenius norm.

    Rearranged, the block has B (x) A as a rank-one matrix, so the best pair is its leading singular pair,
    found by power iteration: `B <- sum_m g_m A g_m^T` and `A <- sum_m g_m^T B g_m`, each divided by the
    other's squared norm. From A = I both stay positive semidefinite. The block itself is never formed.

    Reference: Van Loan and Pitsianis (1993), Approximation with Kronecker products.
    """
    A = np.eye(g.shape[2])
    B = np.zeros((g.shape[1], g.shape[1]))
    for _ in range(iterations):
        B = np.einsum("moi,mpi->op", g @ A, g) / np.sum(A * A)
        norm = np.sum(B * B)
        if norm == 0:  # a matrix that no logit depends on
            return B, A
        A = np.einsum("moi,moj->ij", np.einsum("op,mpi->moi", B, g), g) / norm
    return B, A


def log_evidence(
    curvature: Curvature, precision: float, *, log_likelihood: float, squared_norm: float
) -> float:
    r"""Laplace's approximation of the log-evidence, in nats.

        log p(y | mode) - tau/2 |mode|^2 + p/2 log tau - 1/2 log det(G + tau I)

    Exact when the log-likelihood is quadratic with Hessian -G and `mode` maximises the joint density at this
    precision. At another precision it leaves out the gradient that the joint density then has at the mode.

    Args:
        curvature: G, in its structure.
        precision: tau.
        log_likelihood: `log p(y | mode)`.
        squared_norm: `|mode|^2`.

    Reference: MacKay (1992), A practical Bayesian framework for backpropagation networks.
    """
    occam = curvature.size * np.log(precision) - curvature.log_det(precision)
    return float(log_likelihood - 0.5 * precision * squared_norm + 0.5 * occam)
