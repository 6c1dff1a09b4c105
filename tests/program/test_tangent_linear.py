"""Laplace's approximation of a linear model, compared with SciPy, dense Hessians and quadrature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from builders.dense_laplace import CURVATURE, SLOPE, dense, problem

from bnlora.infer.core.scales import Evidence
from bnlora.program.tangent.linear import (
    Linear,
    Mode,
    in_float64,
    laplace_mode,
    log_likelihood,
    posterior,
    residual_and_root,
)

LOG_SCALES = np.log([0.7, 1.6])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def evidence(model: Linear, *, in_rows: bool):
    """The evidence as a function of the log scales, in one form or the other."""
    if not in_rows:
        return lambda s: laplace_mode(model, model.design(s), in_rows=False).log_evidence
    flat = [np.asarray(group).reshape(model.offset.size, -1) for group in model.groups]
    grams = np.stack([x @ x.T for x in flat])
    return lambda s: (
        laplace_mode(model, jnp.tensordot(jnp.exp(2 * s), jnp.asarray(grams), 1), in_rows=True).log_evidence
    )


VALUE = jax.jit(lambda model, s: evidence(model, in_rows=False)(s))
"""The evidence in one program for each shape: run eagerly, Newton's loop would be compiled at every call."""
MODE = jax.jit(laplace_mode, static_argnames="in_rows")
POSTERIOR = jax.jit(posterior, static_argnames="in_rows")


# Rows fewer than coordinates and more; two classes and three.
SHAPES = [
    (4, 2, (3, 5)),
    pytest.param(40, 2, (3, 2), marks=pytest.mark.thorough),
    pytest.param(3, 3, (6, 4), marks=pytest.mark.thorough),
    (30, 3, (2, 3)),
    pytest.param(25, 5, (3, 2), marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("rows", "classes", "sizes"), SHAPES)
def test_evidence_and_gradient_are_those_of_dense_algebra_in_both_forms(rows, classes, sizes):
    model, step = problem(rows, classes, sizes), 1e-4
    expected = dense(model, LOG_SCALES)[0]
    slopes = [
        (dense(model, LOG_SCALES + d)[0] - dense(model, LOG_SCALES - d)[0]) / (2 * step)
        for d in step * np.eye(2)
    ]
    assert np.abs(slopes).max() > 1e-2
    for in_rows in (True, False):
        value, gradient = jax.jit(jax.value_and_grad(evidence(model, in_rows=in_rows)))(
            jnp.asarray(LOG_SCALES)
        )
        np.testing.assert_allclose(value, expected, atol=1e-8)
        np.testing.assert_allclose(gradient, slopes, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "classes", "sizes"), SHAPES[:4])
def test_the_smaller_form_is_chosen_and_both_have_one_mode(rows, classes, sizes):
    model = problem(rows, classes, sizes)
    assert model.num_coordinates == sum(sizes)
    assert model.in_rows == (rows * (classes - 1) < sum(sizes))
    chosen = Evidence.of(model)
    assert chosen.in_rows == model.in_rows
    found = chosen.mode(jnp.asarray(LOG_SCALES))
    design = model.design(jnp.asarray(LOG_SCALES))
    value, mode, covariance = dense(model, LOG_SCALES)
    np.testing.assert_allclose(found.log_evidence, value, atol=1e-8)
    for in_rows in (True, False):
        kernel = design @ design.T if in_rows else design
        made = MODE(model, kernel, in_rows=in_rows)
        mean, vectors, values = POSTERIOR(design, made, in_rows=in_rows)
        np.testing.assert_allclose(mean, mode, atol=1e-8)
        np.testing.assert_allclose(
            made.log_likelihood,
            log_likelihood(model.offset + (design @ mode).reshape(rows, -1), model.labels),
        )
        assert vectors.shape == (sum(sizes), min(rows * (classes - 1), sum(sizes)))
        V, shrunk = np.asarray(vectors), 1 / (1 + np.asarray(values))
        whole = np.eye(sum(sizes)) + V @ np.diag(shrunk - 1) @ V.T
        np.testing.assert_allclose(whole, covariance, atol=1e-8)
        assert shrunk.min() < 0.9, "the rows say nothing"


@pytest.mark.parametrize(("rows", "classes", "sizes"), [(40, 2, (1, 1)), (12, 2, (30, 2)), (40, 3, (2, 2))])
def test_the_gradient_is_right_where_probabilities_round_to_one(rows, classes, sizes):
    """Labels follow the features without noise, and at a scale of 100 logits are in the hundreds."""
    model, at, step = problem(rows, classes, sizes, seed=3), np.log([100.0, 60.0]), 1e-3
    eta = np.concatenate(model.groups, axis=2).sum(2)
    model = model._replace(offset=40.0 * np.sign(eta), labels=np.pad(eta, ((0, 0), (1, 0))).argmax(1))
    slopes = [(dense(model, at + d)[0] - dense(model, at - d)[0]) / (2 * step) for d in step * np.eye(2)]
    found = Evidence.of(model)
    gradient = jax.jit(jax.grad(lambda s: found.mode(s).log_evidence))(jnp.asarray(at))
    np.testing.assert_allclose(gradient, slopes, atol=1e-4)


def test_a_bad_start_leads_to_the_same_mode():
    """Full Newton steps leave the region where probabilities differ from zero and one."""
    model = problem(60, 2, (2, 2))
    design = model.design(np.log([5.0, 5.0]))
    expected = dense(model, np.log([5.0, 5.0]))
    for start in (30.0, -30.0):
        found = MODE(model, design, in_rows=False, start=jnp.full(4, start))
        np.testing.assert_allclose(found.weights, expected[1], atol=1e-7)
        np.testing.assert_allclose(found.log_evidence, expected[0], atol=1e-8)


@pytest.mark.parametrize("in_rows", [True, False])
def test_the_mode_is_found_where_the_base_is_sure_and_wrong(in_rows):
    """Curvature is nearly zero at the start, so that the first Newton step is thousands of times too long."""
    generator = np.random.default_rng(7)
    X, labels = generator.normal(size=(200, 1, 3)), generator.integers(0, 2, 200)
    model, at = Linear(30.0 * (1.0 - 2.0 * labels[:, None]), [X], labels), np.log([100.0])
    design = np.asarray(model.design(jnp.asarray(at)))
    kernel = design @ design.T if in_rows else design
    found = MODE(model, jnp.asarray(kernel), in_rows=in_rows)
    mode = design.T @ found.weights if in_rows else found.weights
    slope = SLOPE(mode, design[:, None], model.offset, labels)
    assert np.abs(slope).max() < 1e-6 * np.abs(SLOPE(0.0 * mode, design[:, None], model.offset, labels)).max()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_residual_and_root_are_derivatives_of_the_log_likelihood(classes):
    generator = np.random.default_rng(1)
    sizes = np.repeat([1.0, 30.0, 300.0], 20)[:, None]
    eta = jnp.asarray(sizes * generator.normal(size=(60, classes - 1)))
    labels = jnp.asarray(generator.integers(0, classes, 60))
    residual, root = jax.jit(residual_and_root)(eta, labels)
    assert np.isfinite(root).all()

    def alone(row, label):
        return -log_likelihood(row[None], label[None])

    slopes, hessian = (jax.jit(jax.vmap(d(alone)))(eta, labels) for d in (jax.grad, jax.hessian))
    np.testing.assert_allclose(residual, -slopes, atol=1e-12)
    np.testing.assert_allclose(root @ jnp.swapaxes(root, 1, 2), hessian, atol=1e-12)


def test_a_model_in_float64_holds_the_same_numbers():
    model = problem()
    single = Linear(
        model.offset.astype(np.float32), [g.astype(np.float32) for g in model.groups], model.labels
    )
    double = in_float64(single)
    assert {x.dtype for x in (double.offset, *double.groups)} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(double.groups[1], single.groups[1])


# -- Laplace's own error


def integral(model: Linear, log_scales: np.ndarray, nodes: int = 40) -> float:
    """log p(y) by Gauss and Hermite's product rule around the mode."""
    _, mode, covariance = dense(model, log_scales)
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(*[points] * len(mode), indexing="ij"), -1).reshape(-1, len(mode))
    log_weight = functools.reduce(np.add.outer, [np.log(weights)] * len(mode)).ravel()
    root = 1.2 * np.linalg.cholesky(covariance)  # a little wider: tails are not those of a Gaussian
    u = mode + grid @ root.T
    phi = np.asarray(model.design(jnp.asarray(log_scales))).reshape(*model.offset.shape, -1)
    eta = model.offset + np.einsum("nkd,gd->gnk", phi, u)
    padded = np.pad(eta, ((0, 0), (0, 0), (1, 0)))
    logits = padded - scipy.special.logsumexp(padded, axis=2, keepdims=True)
    likelihood = np.take_along_axis(logits, np.asarray(model.labels)[None, :, None], axis=2).sum((1, 2))
    log_joint = likelihood - 0.5 * (u**2).sum(1) - 0.5 * len(mode) * np.log(2 * np.pi)
    log_volume = np.linalg.slogdet(root)[1] + 0.5 * (grid**2).sum(1)
    return float(scipy.special.logsumexp(log_joint + log_volume + log_weight))


def error(model: Linear, log_scales: np.ndarray) -> float:
    """Laplace's error in nats: approximation less quadrature."""
    exact = integral(model, log_scales)
    assert abs(exact - integral(model, log_scales, nodes=32)) < 1e-9
    return float(VALUE(model, jnp.asarray(log_scales))) - exact


def repeated(model: Linear, times: int) -> Linear:
    groups = [np.concatenate([g] * times) for g in model.groups]
    return Linear(np.concatenate([model.offset] * times), groups, np.concatenate([model.labels] * times))


@pytest.mark.parametrize(("classes", "sizes"), [(2, (1,)), (3, (1, 1))])
def test_the_error_vanishes_with_the_fourth_power_of_small_scales(classes, sizes):
    """With a narrow prior the posterior is nearly Gaussian: both sides are exact to order s^2."""
    model = problem(10, classes, sizes, seed=3)
    errors = [error(model, np.full(len(sizes), np.log(s))) for s in (0.1, 0.05, 0.025)]
    base = float(log_likelihood(model.offset, jnp.asarray(model.labels)))
    gain = VALUE(model, jnp.full(len(sizes), np.log(0.05))) - base
    assert abs(errors[1]) < 0.05 * abs(gain)
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 16.0, rtol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "sizes"),
    [pytest.param(2, (1,), marks=pytest.mark.thorough), (4, (1,)), (2, (1, 1)), (3, (1, 1))],
)
def test_the_error_is_the_next_term_of_its_expansion(classes, sizes):
    """With f the negative log joint, S = (f'')^-1 and a remainder of 1 / rows^2:

    log p(y) = Laplace - f_ijkl S_ij S_kl / 8 + f_ijk f_lmn (S_ij S_kl S_mn / 8 + S_il S_jm S_kn / 12)
    """
    model, at = repeated(problem(20, classes, sizes, seed=2), 32), np.log([1.5, 1.0])[: len(sizes)]
    data = model.design(jnp.asarray(at)).reshape(*model.offset.shape, -1), model.offset, model.labels
    _, mode, S = dense(model, at)
    third = jax.jacfwd(CURVATURE)
    both = jax.jacfwd(lambda *given: (third(*given),) * 2, has_aux=True)
    Q, T = map(np.asarray, jax.jit(both)(jnp.asarray(mode), *data))
    parts = np.array([
        np.einsum("ijkl,ij,kl", Q, S, S) / 8,
        -np.einsum("ijk,lmn,ij,kl,mn", T, T, S, S, S) / 8,
        -np.einsum("ijk,lmn,il,jm,kn", T, T, S, S, S) / 12,
    ])  # fmt: skip
    found = error(model, at)
    assert np.abs(parts).max() > 1e-4
    assert abs(found) < 0.01  # nats, of 640 rows
    assert abs(found - parts.sum()) < 0.1 * np.abs(parts).max()


def test_a_mode_is_a_tuple_of_arrays_that_a_program_may_return():
    found = jax.jit(lambda s: laplace_mode(problem(), problem().design(s), in_rows=False))(jnp.zeros(2))
    assert isinstance(found, Mode)
    assert found.root.shape == (12, 1, 1)
