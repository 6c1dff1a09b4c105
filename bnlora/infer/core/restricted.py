r"""The Gaussian with a restricted covariance that is closest to another Gaussian, in variational KL.

    minimise  KL(N(0, Q) || N(0, P^-1)) = (tr(P Q) - log|Q| - log|P| - d) / 2      over the allowed Q

| allowed Q                       | where the gradient is zero                                            |
|---------------------------------|-----------------------------------------------------------------------|
| diagonal                        | Q_ii = 1 / P_ii, the conditional variances                            |
| A (x) B, a matrix normal        | A = c (P : B)^-1, B = r (P : A)^-1, alternating                       |
| diag(s) (I + F F^T) diag(s)     | F from the smallest eigenvalues of diag(s) P diag(s), alternating     |

These are the starts of guides that cannot represent the full covariance of Laplace's Gaussian.

References: Turner and Sahani (2011), Two problems with variational expectation maximisation, for the
diagonal; Dutilleul (1999), The MLE algorithm for the matrix normal distribution, for the alternation.
"""

import numpy as np
from jaxtyping import Float

TURNS = 50
"""Number of alternations."""


def diagonal(P: Float[np.ndarray, "d d"]) -> Float[np.ndarray, " d"]:
    """Standard deviations of the closest diagonal Gaussian.

    Args:
        P: The precision of the target Gaussian.
    """
    return np.diag(P) ** -0.5


def kronecker(
    P: Float[np.ndarray, "d d"], rows: int, cols: int
) -> tuple[Float[np.ndarray, "r r"], Float[np.ndarray, "c c"]]:
    """Covariances A of rows and B of columns of the closest matrix normal.

    Args:
        P: The precision of the target Gaussian over matrices, flattened by rows.
        rows: Rows r of the matrices.
        cols: Columns c.
    """
    blocks = P.reshape(rows, cols, rows, cols)  # axes a b c d: entry (a, b) against entry (c, d)
    B = np.diag(1 / np.einsum("abab->b", blocks) * rows)
    for _ in range(TURNS):
        A = cols * np.linalg.inv(np.einsum("abcd,bd->ac", blocks, B))
        B = rows * np.linalg.inv(np.einsum("abcd,ac->bd", blocks, A))
    return A, B


def low_rank(
    P: Float[np.ndarray, "d d"], rank: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d r"]]:
    """Scales s and factor F of the closest Gaussian with covariance `diag(s) (I + F F^T) diag(s)`.

    Args:
        P: The precision of the target Gaussian.
        rank: Number of columns of F.
    """
    s = diagonal(P)
    F = np.zeros((len(P), rank))
    for _ in range(TURNS):
        values, vectors = np.linalg.eigh(s[:, None] * P * s)
        few = min(rank, len(P))
        # I + F F^T should have eigenvalue 1 / value along each vector; F cannot lower it below one.
        F[:, :few] = vectors[:, :few] * np.sqrt(np.maximum(1 / values[:few] - 1, 0.0))
        slopes = s * ((P * (np.eye(len(P)) + F @ F.T)) @ s)  # 1 if the gradient in log s is zero
        s = s / np.sqrt(np.maximum(slopes, 0.25))  # the floor limits a step to doubling s
    return s, F
