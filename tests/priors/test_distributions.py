"""Three laws against scipy's, with explicit covariances, and two roots of `gp`.

Sampled moments are compared in standard errors: of a mean sqrt(C_ii / n), of a covariance
sqrt((C_ii C_jj + C_ij^2) / n); the largest may not exceed the normal quantile of 1e-4 after Bonferroni.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.test_util import check_grads
from numpyro.distributions import kl_divergence
from scipy import stats

from bnlora.priors import gp
from bnlora.priors.distributions import LowRankGaussian, MatrixAffine, MatrixConditional

LAYERS, D_O, D_I, K_R, K_C, SIZE = 2, 3, 4, 2, 3, 20_000


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def conditional(*, lam=0.7, sigma=0.6):
    k_v, k_r, k_c, k_p, k_q = keys(1, 5)
    return MatrixConditional(
        jax.random.normal(k_v, (LAYERS, K_R, K_C)),
        gp.frame_side(
            jax.random.normal(k_r, (LAYERS, D_O, K_R)), jax.random.uniform(k_p, (LAYERS, K_R), maxval=0.95)
        ),
        gp.frame_side(
            jax.random.normal(k_c, (LAYERS, D_I, K_C)), jax.random.uniform(k_q, (LAYERS, K_C), maxval=0.95)
        ),
        sigma,
        lam,
    )


def explicit(law, layer):
    """Mean and covariance of one layer's row-major vector of weights, computed directly from the formula."""
    F_r, F_c = np.asarray(law.rows.factor[layer]), np.asarray(law.cols.factor[layer])
    sigma = np.broadcast_to(law.sigma, (LAYERS, D_O, D_I))[layer]
    lam = np.broadcast_to(law.lam, (LAYERS,))[layer]
    Sigma = np.eye(D_O * D_I) - np.kron(F_r @ F_r.T, F_c @ F_c.T)
    mean = sigma * (F_r @ np.asarray(law.V[layer]) @ F_c.T)
    return mean.ravel(), lam**2 * np.outer(sigma, sigma) * Sigma


SCALES = {
    "one scale": {},
    "a lam for each layer": {"lam": jnp.array([0.2, 0.9])},
    "a sigma for each layer": {"sigma": jnp.array([0.5, 2.0])[:, None, None]},
    "a sigma for each row": {"sigma": jnp.array([0.5, 2.0, 1.0])[:, None]},
}
every_scale = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)


@jax.jit
def density(law, value):
    return law.log_prob(value)


@jax.jit
def many(law, key):
    return law.sample(key, (SIZE,))


def assert_moments(draws, mean, covariance):
    n = len(draws)
    error = (draws.mean(0) - mean) / np.sqrt(np.diag(covariance) / n)
    assert np.abs(error).max() < stats.norm.isf(1e-4 / 2 / error.size)
    variance = np.diag(covariance)
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    error = (np.cov(draws.T) - covariance) / spread
    assert np.abs(error).max() < stats.norm.isf(1e-4 / 2 / error.size)


@every_scale
def test_the_conditional_has_the_density_of_the_explicit_gaussian(scales):
    law = conditional(**scales)
    W = jax.random.normal(jax.random.key(2), (5, LAYERS, D_O, D_I))
    got = density(law, W)
    assert got.shape == (5, LAYERS)
    for layer in range(LAYERS):
        expected = stats.multivariate_normal(*explicit(law, layer)).logpdf(W[:, layer].reshape(5, -1))
        np.testing.assert_allclose(got[:, layer], expected, rtol=1e-10)


@every_scale
def test_the_conditional_draws_have_the_moments_of_the_explicit_gaussian(scales):
    law = conditional(**scales)
    draws = np.asarray(many(law, jax.random.key(3)))
    for layer in range(LAYERS):
        assert_moments(draws[:, layer].reshape(SIZE, -1), *explicit(law, layer))


def test_the_conditional_kl_is_that_of_two_explicit_gaussians_and_of_draws():
    q, p = conditional(lam=jnp.array([0.2, 0.6])), conditional(lam=0.9)
    got = kl_divergence(q, p)
    for layer in range(LAYERS):
        (_, C_q), (_, C_p) = explicit(q, layer), explicit(p, layer)
        ratio = np.linalg.solve(C_p, C_q)
        exact = 0.5 * (np.trace(ratio) - len(ratio) - np.linalg.slogdet(ratio)[1])
        np.testing.assert_allclose(got[layer], exact, rtol=1e-10)
    W = many(q, jax.random.key(4))
    terms = np.asarray(density(q, W) - density(p, W))
    error = (terms.mean(0) - got) / (terms.std(0) / SIZE**0.5)
    assert np.abs(error).max() < stats.norm.isf(1e-4 / 2 / LAYERS)


def test_gradients_of_the_conditional_against_finite_differences():
    base = conditional()
    W = jax.random.normal(jax.random.key(5), (LAYERS, D_O, D_I))

    def value(W, V, p, lam, sigma):
        frame = base.rows.factor / jnp.sqrt(base.rows.gram)[:, None, :]
        rows = gp.Side(frame * jnp.sqrt(p)[:, None, :], p)
        return MatrixConditional(V, rows, base.cols, sigma, lam).log_prob(W).sum()

    at = (W, base.V, base.rows.gram, jnp.array([0.4, 0.9]), jnp.array(0.6))
    check_grads(jax.jit(value), at, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def low_rank(batch=(LAYERS,)):
    k_l, k_s, k_f = keys(6, 3)
    return LowRankGaussian(
        jax.random.normal(k_l, (*batch, 4)),
        jnp.exp(0.5 * jax.random.normal(k_s, (*batch, 4))),
        jax.random.normal(k_f, (*batch, 4, 2)),
    )


def test_the_low_rank_gaussian_is_the_gaussian_with_its_covariance():
    law = low_rank()
    x = jax.random.normal(jax.random.key(7), (5, LAYERS, 4))
    got, draws = density(law, x), np.asarray(many(law, jax.random.key(8)))
    assert got.shape == (5, LAYERS)
    for layer in range(LAYERS):
        mean, S, F = (np.asarray(v[layer]) for v in (law.loc, law.scale, law.factor))
        covariance = np.diag(S) @ (np.eye(4) + F @ F.T) @ np.diag(S)
        np.testing.assert_allclose(law.covariance_matrix[layer], covariance, rtol=1e-12)
        expected = stats.multivariate_normal(mean, covariance).logpdf(x[:, layer])
        np.testing.assert_allclose(got[:, layer], expected, rtol=1e-10)
        assert_moments(draws[:, layer], mean, covariance)


def test_gradients_of_the_low_rank_gaussian_against_finite_differences():
    law, x = low_rank(()), jnp.arange(4.0)

    def value(x, loc, scale, factor):
        return LowRankGaussian(loc, scale, factor).log_prob(x)

    check_grads(
        jax.jit(value), (x, law.loc, law.scale, law.factor), order=1, modes=["rev"], atol=1e-6, rtol=1e-6
    )


def affine():
    k_l, k_r, k_c = keys(9, 3)
    R, C = (
        jnp.tril(0.3 * jax.random.normal(k, (LAYERS, d, d)), -1) + jnp.diag(jnp.linspace(0.5, 2.0, d))
        for k, d in ((k_r, D_O), (k_c, D_I))
    )
    return MatrixAffine(jax.random.normal(k_l, (LAYERS, D_O, D_I)), R, C)


def test_the_affine_map_of_a_standard_normal_is_matrix_normal():
    flow = affine()
    law = dist.TransformedDistribution(dist.Normal(jnp.zeros((LAYERS, D_O, D_I)), 1).to_event(2), [flow])
    W = jax.random.normal(jax.random.key(10), (5, LAYERS, D_O, D_I))
    got, draws = density(law, W), np.asarray(many(law, jax.random.key(11)))
    assert got.shape == (5, LAYERS)
    for layer in range(LAYERS):
        mean, K_r, K_c = flow.loc[layer], *(np.asarray(L[layer] @ L[layer].T) for L in (flow.R, flow.C))
        expected = stats.matrix_normal(np.asarray(mean), K_r, K_c).logpdf(np.asarray(W[:, layer]))
        np.testing.assert_allclose(got[:, layer], expected, rtol=1e-10)
        assert_moments(draws[:, layer].reshape(SIZE, -1), np.asarray(mean).ravel(), np.kron(K_r, K_c))


def test_the_affine_map_has_the_log_determinant_of_its_jacobian_and_its_inverse():
    flow = affine()
    z = jax.random.normal(jax.random.key(12), (LAYERS, D_O, D_I))
    np.testing.assert_allclose(flow.inv(flow(z)), z, atol=1e-12)
    got = flow.log_abs_det_jacobian(z, flow(z))
    for layer in range(LAYERS):
        one = MatrixAffine(flow.loc[layer], flow.R[layer], flow.C[layer])
        jacobian = jax.jacobian(lambda z, one=one: one(z).ravel())(z[layer]).reshape(D_O * D_I, -1)
        np.testing.assert_allclose(got[layer], jnp.linalg.slogdet(jacobian)[1], rtol=1e-12)


def every_layer_its_own():
    return conditional(lam=jnp.array([0.2, 0.9]), sigma=jnp.array([0.5, 2.0])[:, None, None])


@pytest.mark.parametrize("make", [every_layer_its_own, low_rank], ids=["conditional", "low rank"])
def test_laws_pass_through_jit_and_map_over_layers(make):
    """In a law mapped by vmap, each layer has the same density as in the stack."""
    law = make()
    value = law.sample(jax.random.key(13))
    expected = law.log_prob(value)
    np.testing.assert_allclose(jax.jit(lambda law, x: law.log_prob(x))(law, value), expected, rtol=1e-12)
    mapped = jax.vmap(lambda law, x: law.log_prob(x))(law, value)
    assert mapped.shape == expected.shape
    np.testing.assert_allclose(mapped, expected, rtol=1e-12)


def test_the_affine_map_passes_through_jit_and_vmap():
    flow = affine()
    z = jax.random.normal(jax.random.key(14), (LAYERS, D_O, D_I))
    np.testing.assert_allclose(jax.jit(lambda t, z: t(z))(flow, z), flow(z), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(lambda t, z: t.inv(z))(flow, z), flow.inv(z), rtol=1e-12)


def test_a_conditional_needs_sides_of_orthonormal_frames():
    law = conditional()
    dense = gp.inducing_side(jnp.ones((LAYERS, K_R, D_O)) + jnp.eye(K_R, D_O), 0.5 * jnp.ones((LAYERS, K_R)))
    with pytest.raises(ValueError, match="rows must be a side of orthonormal frames"):
        MatrixConditional(law.V, dense, law.cols, 1.0)


def test_the_inducing_root_and_the_whitening():
    k_z, k_w, k_v = keys(15, 3)
    Z_r, Z_c = jax.random.normal(k_z, (LAYERS, 3, 5)), jax.random.normal(k_w, (LAYERS, 2, 4))
    D_r, D_c = (
        jnp.array([0.5, 0.7, 0.2]) * jnp.ones((LAYERS, 1)),
        jnp.array([0.4, 0.9]) * jnp.ones((LAYERS, 1)),
    )
    L_r, L_c = gp.inducing_root(Z_r, D_r), gp.inducing_root(Z_c, D_c)
    np.testing.assert_array_equal(jnp.triu(L_r, 1), jnp.zeros_like(L_r))
    for L, Z, D in ((L_r, Z_r, D_r), (L_c, Z_c, D_c)):
        K = np.array([z @ z.T + np.diag(d**2) for z, d in zip(np.asarray(Z), np.asarray(D), strict=True)])
        np.testing.assert_allclose(L @ jnp.swapaxes(L, -1, -2), K, atol=1e-12)
    V = jax.random.normal(k_v, (LAYERS, 3, 2))
    np.testing.assert_allclose(gp.whiten(L_r @ V @ jnp.swapaxes(L_c, -1, -2), L_r, L_c), V, atol=1e-12)
