"""Restricted Gaussians closest to a given one, against minimisation of the divergence by SciPy."""

import numpy as np
import pytest
from scipy.optimize import minimize

from bnlora.infer.core.restricted import diagonal, kronecker, low_rank

ROWS, COLS, RANK = 2, 3, 2
SIZE = ROWS * COLS


def divergence(Q, P) -> float:
    """KL(N(0, Q) || N(0, P^-1))."""
    return 0.5 * (np.trace(P @ Q) - np.linalg.slogdet(Q)[1] - np.linalg.slogdet(P)[1] - len(P))


def precision(informed: int, seed: int = 0) -> np.ndarray:
    """Of a posterior whose data inform some directions, the others being at their prior."""
    design = 2 * np.random.default_rng(seed).normal(size=(informed, SIZE))
    return np.eye(SIZE) + design.T @ design


def of_roots(x) -> np.ndarray:
    row, column = np.zeros((ROWS, ROWS)), np.zeros((COLS, COLS))
    row[np.tril_indices(ROWS)], column[np.tril_indices(COLS)] = x[:3], x[3:]
    return np.kron(row @ row.T, column @ column.T)


def of_scales(x) -> np.ndarray:
    s, F = np.exp(x[:SIZE]), x[SIZE:].reshape(SIZE, -1)
    return s[:, None] * (np.eye(SIZE) + F @ F.T) * s


@pytest.mark.parametrize("informed", [1, 3, 9])
def test_the_matrix_normal_is_the_closest(informed):
    P = precision(informed)
    A, B = kronecker(P, ROWS, COLS)
    start = np.concatenate([np.eye(ROWS)[np.tril_indices(ROWS)], np.eye(COLS)[np.tril_indices(COLS)]])
    best = minimize(lambda x: divergence(of_roots(x), P), start, method="BFGS").fun
    assert divergence(np.kron(A, B), P) == pytest.approx(best, abs=1e-6)


def test_a_matrix_normal_is_found_again():
    row, column = np.array([[2.0, 0.5], [0.5, 1.0]]), np.diag([0.3, 1.0, 2.0]) + 0.1
    A, B = kronecker(np.linalg.inv(np.kron(row, column)), ROWS, COLS)
    np.testing.assert_allclose(np.kron(A, B), np.kron(row, column), rtol=1e-9)


@pytest.mark.parametrize("informed", [1, 3, 9])
def test_scales_are_those_of_the_closest_diagonal(informed):
    P = precision(informed)
    best = minimize(lambda x: divergence(np.diag(np.exp(2 * x)), P), np.zeros(SIZE), method="BFGS")
    np.testing.assert_allclose(diagonal(P), np.exp(best.x), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("informed", [1, 3, 9])
def test_diagonal_plus_low_rank_is_close_to_the_closest(informed):
    """Turns approach the minimum slowly: within a twentieth of a nat, where the diagonal is nats away."""
    P = precision(informed)
    s, F = low_rank(P, RANK)
    found = divergence(s[:, None] * (np.eye(SIZE) + F @ F.T) * s, P)
    starts = np.random.default_rng(1).normal(size=(6, SIZE + SIZE * RANK)) * 0.3
    best = min(minimize(lambda x: divergence(of_scales(x), P), x, method="BFGS").fun for x in starts)
    assert found < best + 0.05
    assert found < divergence(np.diag(diagonal(P) ** 2), P) - 0.1


def test_diagonal_plus_low_rank_is_exact_where_the_covariance_is_of_that_form():
    F = np.random.default_rng(2).normal(size=(SIZE, 1))
    covariance = np.eye(SIZE) + F @ F.T
    s, found = low_rank(np.linalg.inv(covariance), 1)
    np.testing.assert_allclose(s[:, None] * (np.eye(SIZE) + found @ found.T) * s, covariance, rtol=0.02)


def test_more_directions_than_numbers_are_left_empty():
    s, F = low_rank(precision(9), SIZE + 2)
    assert F.shape == (SIZE, SIZE + 2)
    assert (F[:, SIZE:] == 0).all()
    assert np.isfinite(s).all()
