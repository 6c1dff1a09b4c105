"""The affine map against its own Jacobian, and the covariance of its draws against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.guides.affine import Affine

P, R, AT = 9, 3, (2, 6)


def example(at: tuple[int, ...] = AT, seed: int = 0) -> Affine:
    """A map of nine coordinates with three directions, and blocks as `laplace` makes them."""
    generator = np.random.default_rng(seed)
    others = [i for i in range(P) if i not in at]
    vectors = np.zeros((P, R))
    vectors[others] = np.linalg.qr(generator.normal(size=(len(others), R)))[0]
    keep, block = np.ones(P), generator.normal(size=(P, len(at)))
    keep[list(at)] = 0.0
    block[list(at)] = np.tril(block[list(at)], -1) + np.diag(generator.uniform(0.3, 2.0, len(at)))
    gains = np.array([0.1, 0.95, 3.0])
    return Affine(generator.normal(size=P), keep, vectors, gains, block, np.array(at, int))


def matrix(affine: Affine) -> np.ndarray:
    """The linear part, computed directly from the formula."""
    inner = affine.vectors @ np.diag(affine.gains - 1) @ affine.vectors.T
    placed = np.zeros((P, P))
    placed[:, affine.at] = affine.block
    return np.diag(affine.keep) + inner + placed


@pytest.mark.parametrize("at", [(), (4,), AT])
def test_the_jacobian_is_the_formula_and_its_determinant_is_the_stated_one(at):
    affine = example(at)
    with jax.enable_x64(True):
        cast = affine.cast(jnp.float64)
        jacobian = np.asarray(jax.jacobian(cast.apply)(jnp.ones(P)))
        np.testing.assert_allclose(cast.apply(jnp.zeros(P)), affine.centre, rtol=1e-14)
    np.testing.assert_allclose(jacobian, matrix(affine), atol=1e-14)
    np.testing.assert_allclose(affine.log_determinant, np.linalg.slogdet(jacobian)[1], rtol=1e-12)


@pytest.mark.parametrize("at", [(), AT])
@pytest.mark.parametrize("front", [(), (5,), (2, 3)])
def test_apply_and_invert_are_inverse(at, front):
    affine, z = example(at), np.random.default_rng(1).normal(size=(*front, P))
    x = affine.apply(z)
    assert x.shape == z.shape
    np.testing.assert_allclose(x, affine.centre + z @ matrix(affine).T, atol=1e-13)
    np.testing.assert_allclose(affine.invert(x), z, atol=1e-12)
    np.testing.assert_allclose(affine.apply(affine.invert(z)), z, atol=1e-12)


def test_draws_have_the_covariance_of_the_dense_matrix():
    affine, count = example(), 100_000
    expected = matrix(affine) @ matrix(affine).T
    drawn = affine.apply(np.random.default_rng(2).normal(size=(count, P)))
    moved = drawn - affine.centre
    assert (np.abs(moved.mean(0)) < 5 * np.sqrt(np.diag(expected) / count)).all()
    # Isserlis: the variance of x_i x_j is C_ii C_jj + C_ij^2.
    error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / count)
    assert (np.abs(moved.T @ moved / count - expected) < 5 * error).all()
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.5


def test_within_leaves_out_directions_whose_deviation_is_near_one():
    affine = example()
    near = affine.within(0.1)
    assert near.vectors.shape == (P, 2)
    np.testing.assert_array_equal(near.gains, [0.1, 3.0])
    np.testing.assert_array_equal(near.vectors, affine.vectors[:, [0, 2]])
    left_out = affine.vectors[:, 1:2]
    np.testing.assert_allclose(matrix(affine) - matrix(near), (0.95 - 1) * left_out @ left_out.T, atol=1e-14)
    assert affine.within(0.01).vectors.shape == (P, 3)
    z = np.random.default_rng(3).normal(size=P)
    none = affine.within(5.0)
    np.testing.assert_allclose(none.invert(none.apply(z)), z, atol=1e-12)
    np.testing.assert_allclose(near.log_determinant, affine.log_determinant - np.log(0.95), rtol=1e-12)


def test_casting_changes_the_type_of_numbers_and_keeps_indices():
    cast = example().cast(jnp.float32)
    assert all(x.dtype == jnp.float32 for x in cast[:5])
    assert jnp.issubdtype(cast.at.dtype, jnp.integer)
    z = jnp.asarray(np.random.default_rng(4).normal(size=(7, P)), jnp.float32)
    np.testing.assert_allclose(jax.jit(cast.apply)(z), example().apply(np.asarray(z)), rtol=1e-5, atol=1e-5)
