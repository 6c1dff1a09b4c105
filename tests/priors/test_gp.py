"""The inducing algebra against explicit covariance matrices, finite differences and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.programs import factorised
from jax.test_util import check_grads

from bnlora.priors import gp

D_O, D_I, K_R, K_C = 4, 5, 3, 2


def frames(key, shape=(D_O, D_I)):
    k1, k2, k3, k4 = jax.random.split(key, 4)
    rows = gp.frame_side(
        jax.random.normal(k1, (shape[0], K_R)), jax.random.uniform(k2, (K_R,), minval=0.1, maxval=0.99)
    )
    cols = gp.frame_side(
        jax.random.normal(k3, (shape[1], K_C)), jax.random.uniform(k4, (K_C,), minval=0.1, maxval=0.99)
    )
    return rows, cols


def bases(key, sizes=(K_R, K_C)):
    k1, k2, k3, k4 = jax.random.split(key, 4)
    rows = gp.inducing_side(
        jax.random.normal(k1, (sizes[0], D_O)), jax.random.uniform(k2, (sizes[0],), minval=0.3)
    )
    cols = gp.inducing_side(
        jax.random.normal(k3, (sizes[1], D_I)), jax.random.uniform(k4, (sizes[1],), minval=0.3)
    )
    return rows, cols


SIDES = {
    "frames": frames,
    "bases": bases,
    "bases larger than the side": lambda key: bases(key, (D_O + 2, D_I + 1)),
}


def matrix_of(linear, shape):
    """The matrix of a linear map of matrices, for row-major vectors, by applying the map to a basis."""
    basis = jnp.eye(shape[0] * shape[1]).reshape(-1, *shape)
    return jax.vmap(lambda x: linear(x).reshape(-1))(basis).T


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("make", SIDES.values(), ids=SIDES)
def test_noise_has_covariance_identity_minus_kronecker(make, float64):
    rows, cols = make(jax.random.key(1))
    P_r, P_c = (s.factor @ s.factor.T for s in (rows, cols))
    root = matrix_of(lambda E: gp.conditional_noise(E, rows, cols), (D_O, D_I))
    np.testing.assert_allclose(root, root.T, atol=1e-12)
    np.testing.assert_allclose(root @ root.T, jnp.eye(D_O * D_I) - jnp.kron(P_r, P_c), atol=1e-12)


@pytest.mark.parametrize("make", SIDES.values(), ids=SIDES)
def test_prior_weights_are_independent_standard_normals_for_any_sides(make, float64):
    rows, cols = make(jax.random.key(2))
    size = (rows.factor.shape[-1], cols.factor.shape[-1])
    mean = matrix_of(lambda V: gp.conditional_mean(V, rows, cols), size)
    noise = matrix_of(lambda E: gp.conditional_noise(E, rows, cols), (D_O, D_I))
    np.testing.assert_allclose(mean @ mean.T + noise @ noise.T, jnp.eye(D_O * D_I), atol=1e-12)


def test_bases_reproduce_the_papers_conditional(float64):
    """T_r U T_c with U = L_r V L_c^T and K = Z Z^T + D^2, computed as in the paper."""
    key = jax.random.key(3)
    Z_r, Z_c = jax.random.normal(key, (K_R, D_O)), jax.random.normal(key, (K_C, D_I))
    D_r, D_c = jnp.array([0.5, 0.7, 0.2]), jnp.array([0.4, 0.9])
    V = jax.random.normal(jax.random.key(4), (K_R, K_C))
    K_r, K_c = Z_r @ Z_r.T + jnp.diag(D_r**2), Z_c @ Z_c.T + jnp.diag(D_c**2)
    U = jnp.linalg.cholesky(K_r) @ V @ jnp.linalg.cholesky(K_c).T
    expected = Z_r.T @ jnp.linalg.inv(K_r) @ U @ jnp.linalg.inv(K_c) @ Z_c
    got = gp.conditional_mean(V, gp.inducing_side(Z_r, D_r), gp.inducing_side(Z_c, D_c))
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_frames_are_orthonormal_and_carry_their_eigenvalues(float64):
    reliability = jnp.array([0.9, 0.5, 0.2])
    side = gp.frame_side(jax.random.normal(jax.random.key(5), (D_O, K_R)), reliability)
    np.testing.assert_allclose(side.factor.T @ side.factor, jnp.diag(reliability), atol=1e-12)


def test_the_two_forms_agree_on_one_projection(float64):
    """The same P gives the same noise, with known eigenvalues and with computed ones."""
    rows, cols = frames(jax.random.key(6))
    dense = [gp.Side(s.factor, jnp.diag(s.gram)) for s in (rows, cols)]
    E = jax.random.normal(jax.random.key(7), (D_O, D_I))
    np.testing.assert_allclose(
        gp.conditional_noise(E, rows, cols), gp.conditional_noise(E, *dense), atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 0.0], ids=["distinct eigenvalues", "equal eigenvalues"])
def test_gradient_of_the_root_against_finite_differences(spread, float64):
    """With equal eigenvalues the derivative of an eigenvector is infinite; that of the root is finite."""
    E = jax.random.normal(jax.random.key(8), (D_O, D_I))
    target = jax.random.normal(jax.random.key(9), (D_O, D_I))
    Z_c = jax.random.normal(jax.random.key(10), (K_C, D_I))

    def value(Z_r):
        sides = gp.inducing_side(Z_r, 0.5 * jnp.ones(K_R)), gp.inducing_side(Z_c, 0.5 * jnp.ones(K_C))
        return jnp.sum(target * gp.conditional_noise(E, *sides))

    Z_r = jnp.eye(K_R, D_O) + spread * jax.random.normal(jax.random.key(11), (K_R, D_O))
    check_grads(value, (Z_r,), order=1, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


def test_gradient_through_a_frame_against_finite_differences(float64):
    _, cols = frames(jax.random.key(12))
    E = jax.random.normal(jax.random.key(13), (D_O, D_I))

    def value(free, reliability):
        return jnp.sum(jnp.sin(gp.conditional_noise(E, gp.frame_side(free, reliability), cols)))

    start = jax.random.normal(jax.random.key(14), (D_O, K_R)), jnp.array([0.3, 0.6, 0.9])
    check_grads(value, start, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_leading_layer_axes_are_batch_axes():
    rows, cols = jax.vmap(frames)(jax.random.split(jax.random.key(15), 3))
    E = jax.random.normal(jax.random.key(16), (3, D_O, D_I))
    V = jax.random.normal(jax.random.key(17), (3, K_R, K_C))
    for layer in range(3):
        one = [gp.Side(s.factor[layer], s.gram[layer]) for s in (rows, cols)]
        np.testing.assert_allclose(
            gp.conditional_noise(E, rows, cols)[layer], gp.conditional_noise(E[layer], *one), atol=1e-6
        )
        np.testing.assert_allclose(
            gp.conditional_mean(V, rows, cols)[layer], gp.conditional_mean(V[layer], *one), atol=1e-6
        )


@pytest.mark.parametrize(("lam", "nats"), [(1e-3, 6.408), (1e-2, 4.105), (0.03, 3.007), (1.0, 0.0)])
def test_conditional_kl_constants_of_the_paper(lam, nats):
    assert float(gp.conditional_kl(1, jnp.array(lam))) == pytest.approx(nats, abs=5e-4)


def test_conditional_kl_is_the_divergence_of_the_two_gaussians(float64):
    """Against the general formula for two multivariate normals with the explicit Sigma."""
    rows, cols = frames(jax.random.key(18))
    P_r, P_c = (s.factor @ s.factor.T for s in (rows, cols))
    Sigma, lam, n = jnp.eye(D_O * D_I) - jnp.kron(P_r, P_c), 0.3, D_O * D_I
    trace = jnp.trace(jnp.linalg.solve(Sigma, lam**2 * Sigma))
    logdet = jnp.linalg.slogdet(Sigma)[1] - jnp.linalg.slogdet(lam**2 * Sigma)[1]
    expected = 0.5 * (trace - n + logdet)
    np.testing.assert_allclose(gp.conditional_kl(n, jnp.array(lam)), expected, rtol=1e-10)


def test_gradient_of_the_conditional_kl():
    lam = jnp.array(0.2)
    gradient = jax.grad(lambda x: gp.conditional_kl(20, x))(lam)
    np.testing.assert_allclose(gradient, 20 * (lam - 1 / lam), rtol=1e-6)


def test_a_frame_larger_than_its_side_is_refused():
    with pytest.raises(ValueError, match="at most as many vectors as dimensions; got 5 vectors for 3"):
        gp.frame_side(jnp.ones((3, 5)), jnp.ones(5))


@pytest.mark.parametrize("make", [gp.frame_side, gp.inducing_side])
def test_factorisations_take_one_matrix_at_a_time(make):
    """Batched LAPACK calls can hang a machine with two cores (jaxlib 0.10.2); no program may contain one."""
    shape = (2, 5, 3) if make is gp.frame_side else (2, 3, 5)

    def total(free, diagonal, E):
        side = make(free, diagonal)
        return jnp.sum(gp.conditional_noise(E, side, side) ** 3)

    arguments = jnp.ones(shape), 0.5 * jnp.ones((2, 3)), jnp.ones((2, 5, 5))
    found = list(factorised(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*arguments).jaxpr))
    assert {ndim for _, ndim in found} == ({2} if make is gp.inducing_side else set())


@pytest.mark.parametrize("shape", [(2, 40, 9), (3, 6, 6)])
def test_frames_and_their_derivatives_are_those_of_lapack(shape):
    """Value, gradient and second derivative of a function of Q, where R has a positive diagonal."""

    def lapack(free):
        frame, triangle = jnp.linalg.qr(free)
        return frame * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]

    def of_frame(free):
        return gp.frame_side(free, jnp.ones(shape[-1:])).factor

    def derivatives(frame, free, direction, weight):
        gradient = jax.grad(lambda free: jnp.sum(weight * frame(free) ** 3))
        return frame(free), gradient(free), jax.jvp(gradient, (free,), (direction,))[1]

    with jax.enable_x64(True):
        given = [jax.random.normal(jax.random.key(i), shape) for i in range(3)]
        got, expected = (derivatives(frame, *given) for frame in (of_frame, lapack))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * np.abs(y).max())


def test_frames_are_orthonormal_where_columns_are_nearly_dependent():
    """Columns that differ by 1e-4 of their length, in float32: one pass of Gram-Schmidt would leave 1e-3."""
    first, noise = (jax.random.normal(jax.random.key(i), (50, 4), jnp.float32) for i in range(2))
    frame = gp.frame_side(first[:, :1] + 1e-4 * noise, jnp.ones(4, jnp.float32)).factor
    np.testing.assert_allclose(frame.T @ frame, np.eye(4), atol=4 * 50**0.5 * np.finfo(np.float32).eps)
