"""Laplace's approximation: its algebra where everything is exact, and the network's part by hand."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.infer.autoguide import AutoDelta
from rich.console import Console

import bnlora as bl
from bnlora.infer.approximate import curvature as algebra
from bnlora.infer.approximate import laplace, linearised
from bnlora.program.density import density
from bnlora.testing import linear_gaussian, tiny_base, tiny_rows

KEY = jax.random.key(0)
QUIET = Console(quiet=True)
BASE = tiny_base(jax.random.key(1), num_layers=1)
TRAIN = tiny_rows(jax.random.key(2), 20)
SIGMA, NOISE = 0.8, 0.5
PROBLEM = linear_gaussian(jax.random.key(3), lambda: None, shape=(3, 4), rows=12, noise=NOISE)


def root_of(curvature, precision):
    return curvature.spread(np.eye(curvature.size), precision)


def covariance_of(curvature, precision):
    root = root_of(curvature, precision)
    return root.T @ root


def linear_rows(weights=None):
    """R of the regression, with noise of precision `weights` between the outputs (a number times I)."""
    X = np.asarray(PROBLEM.X, np.float64)
    jacobian = np.einsum("op,ni->nopi", np.eye(3), X).reshape(len(X), 3, 12)
    hessian = np.eye(3) / NOISE**2 if weights is None else weights
    return algebra.rooted_jacobian(jacobian, np.broadcast_to(hessian, (len(X), 3, 3)))


def exact():
    """Log-evidence's arguments, at the exact posterior mean."""
    mean, covariance = PROBLEM.posterior(SIGMA)
    residual = np.asarray(PROBLEM.Y, np.float64) - np.asarray(PROBLEM.X, np.float64) @ mean.T
    log_likelihood = -0.5 * np.sum(residual**2) / NOISE**2 - residual.size * np.log(
        NOISE * (2 * np.pi) ** 0.5
    )
    known = {"log_likelihood": log_likelihood, "squared_norm": np.sum(mean**2)}
    return np.kron(np.eye(3), covariance), known


@pytest.mark.parametrize(
    "structure", [algebra.low_rank, lambda R: algebra.kronecker(R, [(3, 4)])], ids=["full", "kronecker"]
)
def test_linear_gaussian_problem_is_solved_exactly(structure):
    """Covariance and log-evidence are those in closed form; the curvature is I (x) X^T X / noise^2."""
    curvature, (covariance, known) = structure(linear_rows()), exact()
    np.testing.assert_allclose(covariance_of(curvature, SIGMA**-2), covariance, atol=1e-10)
    evidence = algebra.log_evidence(curvature, SIGMA**-2, **known)
    np.testing.assert_allclose(evidence, PROBLEM.log_evidence(SIGMA), rtol=1e-6)  # the problem is in float32


def test_kronecker_is_exact_where_the_outputs_noise_is_correlated():
    weights = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    R = linear_rows(weights)
    found = algebra.kronecker(R, [(3, 4)])
    expected = np.linalg.inv(np.kron(weights, PROBLEM.X.T @ PROBLEM.X) + 0.7 * np.eye(12))
    np.testing.assert_allclose(covariance_of(found, 0.7), expected, atol=1e-6)


def test_kronecker_of_a_block_is_the_leading_singular_pair_of_its_rearrangement():
    g = np.random.default_rng(0).normal(size=(5, 3, 4))
    G = np.einsum("moi,mpj->oipj", g, g)
    B, A = algebra.nearest_kronecker(g, iterations=200)
    singular = np.linalg.svd(G.transpose(0, 2, 1, 3).reshape(9, 16), compute_uv=False)
    distance = np.sum((G - np.einsum("op,ij->oipj", B, A)) ** 2)
    np.testing.assert_allclose(distance, np.sum(singular[1:] ** 2), rtol=1e-8)
    assert np.linalg.eigvalsh(B).min() > 0
    assert np.linalg.eigvalsh(A).min() > 0


def test_kronecker_takes_every_matrix_alone():
    R = np.random.default_rng(1).normal(size=(6, 2 * 3 + 4))
    both = algebra.kronecker(R, [(2, 3), (4, 1)])
    alone = algebra.kronecker(R[:, :6], [(2, 3)]), algebra.kronecker(R[:, 6:], [(4, 1)])
    np.testing.assert_allclose(both.log_det(0.3), sum(c.log_det(0.3) for c in alone))
    covariance = covariance_of(both, 0.3)
    np.testing.assert_allclose(covariance[:6, :6], covariance_of(alone[0], 0.3))
    np.testing.assert_array_equal(covariance[:6, 6:], 0)
    # A matrix with one column has a one by one A: its block is kept whole.
    np.testing.assert_allclose(covariance[6:, 6:], np.linalg.inv(R[:, 6:].T @ R[:, 6:] + 0.3 * np.eye(4)))


def test_structures_against_dense_matrices():
    R = np.random.default_rng(2).normal(size=(4, 7))
    G = R.T @ R
    values, vectors = np.linalg.eigh(G)
    leading = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    for curvature, dense in [
        (algebra.diagonal(R), np.diag(np.diag(G))),
        (algebra.low_rank(R, 2), leading),
        (algebra.low_rank(R), G),
    ]:
        shifted = dense + 0.4 * np.eye(7)
        np.testing.assert_allclose(covariance_of(curvature, 0.4), np.linalg.inv(shifted), atol=1e-12)
        np.testing.assert_allclose(curvature.log_det(0.4), np.linalg.slogdet(shifted)[1])


def test_evidences_are_ordered():
    """Pairs left out raise the evidence (less is learned); a diagonal lowers it (Hadamard's inequality)."""
    R, (_, known) = linear_rows(), exact()
    evidence = [
        algebra.log_evidence(c, SIGMA**-2, **known)
        for c in [algebra.diagonal(R), *(algebra.low_rank(R, r) for r in (12, 8, 4, 1))]
    ]
    assert (np.diff(evidence) > 0).all()
    np.testing.assert_allclose(evidence[1], PROBLEM.log_evidence(SIGMA), rtol=1e-6)


def test_hessians_are_those_of_the_likelihood():
    logits = jax.random.normal(KEY, (3, 4))
    loss = lambda f, y: -jax.nn.log_softmax(f)[y]  # noqa: E731
    expected = [jax.hessian(loss)(row, y) for row, y in zip(logits, (0, 3, 1), strict=True)]
    got = algebra.softmax_hessians(np.asarray(jax.nn.softmax(logits), np.float64))
    np.testing.assert_allclose(got, np.stack(expected), atol=1e-6)


def classifier(prior, kind=bl.Classifier):
    return kind(BASE, bl.select(BASE, ["lm_head"], rank=2), prior, label_ids=(3, 5, 8))


def fitted(model, steps=30):
    guide = AutoDelta(model.prior, init_loc_fn=bl.guides.init_to_base)
    options = {"num_steps": steps, "batch_size": 20, "console": QUIET}
    return bl.fit(KEY, model, guide, TRAIN, optax.adam(3e-2), **options)


@functools.cache
def fit():
    """A point under the prior with different scales for the two factors."""
    return fitted(classifier(bl.priors.normal(scale={"a": 1.0, "b": 0.6})))


@functools.cache
def full():
    return laplace(fit(), fit().train, structure="full", console=QUIET)


@functools.cache
def by_hand():
    """Mode, Jacobian (n, c, p), class probabilities and prior precisions, without the library's code."""
    model, mode = fit().model, jax.tree.map(lambda x: x[0], fit().draw_adapters(KEY, 1))
    vector, unravel = ravel_pytree(mode)
    logits = jax.jit(lambda v: model.logits(BASE.weights, unravel(v), TRAIN))
    jacobian = np.asarray(jax.jit(jax.jacfwd(logits))(vector), np.float64)
    # Flattened, `a` (2 x 16) comes before `b` (3 x 2).
    precisions = np.concatenate([np.full(32, 16 / 1.0**2), np.full(6, 2 / 0.6**2)])
    return vector, jacobian, np.asarray(jax.nn.softmax(logits(vector)), np.float64), precisions


@pytest.mark.slow
def test_full_structure_of_a_classifier_by_hand():
    """Covariance from the dense matrix; log-evidence from NumPyro's log joint at the mode."""
    vector, jacobian, probs, precisions = by_hand()
    G = sum(J.T @ (np.diag(p) - np.outer(p, p)) @ J for J, p in zip(jacobian, probs, strict=True))
    root = root_of(full().curvature, full().precision) / np.sqrt(full().profile)
    np.testing.assert_allclose(root.T @ root, np.linalg.inv(G + np.diag(precisions)), rtol=2e-4, atol=1e-6)
    log_joint = density(fit().model, {}).log_joint(vector, BASE.weights, TRAIN, len(TRAIN))
    _, log_det = np.linalg.slogdet(G + np.diag(precisions))
    expected = log_joint + 0.5 * len(vector) * np.log(2 * np.pi) - 0.5 * log_det
    np.testing.assert_allclose(full().log_evidence, expected, rtol=1e-5)
    assert "full curvature of 38 weights" in repr(full())


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_structures_of_a_classifier_by_hand(structure):
    _, jacobian, probs, precisions = by_hand()
    found = laplace(fit(), fit().train, structure=structure, batch_size=7, console=QUIET)
    R = algebra.rooted_jacobian(jacobian / np.sqrt(precisions), algebra.softmax_hessians(probs))
    shapes = [(2, 16), (3, 2)]
    expected = algebra.diagonal(R) if structure == "diagonal" else algebra.kronecker(R, shapes)
    np.testing.assert_allclose(covariance_of(found.curvature, 1.0), covariance_of(expected, 1.0), atol=1e-5)


def test_low_rank_keeps_the_leading_pairs():
    found = laplace(fit(), fit().train, structure="low-rank", rank=3, console=QUIET)
    np.testing.assert_allclose(found.curvature.values, full().curvature.values[:3], rtol=1e-6)
    assert found.log_evidence > full().log_evidence


def test_precision_by_evidence_satisfies_mackays_condition():
    """At the maximum, precision times the mode's squared norm is the number of well-determined weights."""
    found = laplace(fit(), fit().train, structure="full", precision="evidence", console=QUIET)
    mode, _ = ravel_pytree(found.mode)
    tau, eigenvalues = found.precision, found.curvature.values
    np.testing.assert_allclose(tau * np.sum(mode**2), np.sum(eigenvalues / (eigenvalues + tau)), rtol=1e-3)
    for other in (0.5 * tau, 2 * tau):
        assert laplace(fit(), fit().train, structure="full", precision=other, console=QUIET).log_evidence < (
            found.log_evidence
        )


def test_precision_of_each_factor():
    same = laplace(fit(), fit().train, structure="full", precision={"a": 16.0, "b": 2 / 0.36}, console=QUIET)
    np.testing.assert_allclose(same.log_evidence, full().log_evidence, rtol=1e-6)
    np.testing.assert_allclose(same.profile, full().profile, rtol=1e-6)


def test_draws_have_the_mean_and_covariance():
    """Along the widest and the narrowest direction of the posterior, within four standard errors."""
    draws, count = full().draw_adapters(KEY, 2000), 2000
    flat = np.concatenate([np.asarray(x).reshape(count, -1) for x in jax.tree.leaves(draws)], axis=1)
    root = root_of(full().curvature, full().precision) / np.sqrt(full().profile)
    values, vectors = np.linalg.eigh(root.T @ root)
    along = (flat - np.asarray(by_hand()[0])) @ vectors[:, [0, -1]]
    expected = values[[0, -1]]
    assert (np.abs(along.mean(0)) < 4 * np.sqrt(expected / count)).all()
    np.testing.assert_allclose(along.var(0), expected, rtol=4 * np.sqrt(2 / count))


def test_linearised_prediction_by_hand():
    vector, jacobian, _, _ = by_hand()
    deviations = full().deviations(KEY, 3)
    flat = np.concatenate([np.asarray(x).reshape(3, -1) for x in jax.tree.leaves(deviations)], axis=1)
    logits = np.asarray(fit().model.logits(BASE.weights, full().mode, TRAIN)) + np.einsum(
        "ncp,sp->snc", jacobian, flat
    )
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    got = linearised(KEY, full(), TRAIN, num_draws=3, batch_size=6, console=QUIET)
    np.testing.assert_allclose(got.draw_log_probs, expected, atol=2e-5)


class Linear(bl.Classifier):
    """A classifier whose logits are linear in the adapter's weights."""

    def logits(self, params, adapters, batch):
        factors = adapters["lm_head"]
        features = jax.nn.one_hot(batch.tokens[:, 0] % 16, 16)
        shift = jnp.outer(features @ factors["a"][0, 0] - features @ factors["a"][0, 1], jnp.arange(3.0))
        return shift + features[:, :2] @ factors["b"][0].T


def test_linear_logits_make_the_curvature_the_hessian_and_both_predictions_one():
    model = classifier(bl.priors.normal(), Linear)
    found = laplace(fitted(model, steps=3), TRAIN, structure="full", console=QUIET)
    view = density(model, {})
    hessian = jax.jit(jax.hessian(lambda v: -view.log_joint(v, BASE.weights, TRAIN, 20)))
    precision = np.asarray(hessian(ravel_pytree(found.mode)[0]), np.float64)
    root = root_of(found.curvature, found.precision) / np.sqrt(found.profile)
    np.testing.assert_allclose(root.T @ root, np.linalg.inv(precision), atol=1e-5)
    sampled = bl.predict(KEY, found, TRAIN, num_draws=4, console=QUIET)
    linear = linearised(KEY, found, TRAIN, num_draws=4, console=QUIET)
    np.testing.assert_allclose(sampled.draw_log_probs, linear.draw_log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "kron"}, "structure must be one of .*; got 'kron', nearest is 'kronecker'"),
        ({"rank": 3}, "structure='low-rank' and a `rank` go together; got 'full' and rank=3"),
        ({"structure": "low-rank", "rank": 99}, "rank must be from 1 to 38, the largest .*; got 99"),
        ({"precision": "evidense"}, "precision must be one of .*nearest is 'evidence'"),
        ({"precision": -1.0}, "precision must be a positive number; got -1.0"),
        ({"precision": {"a": 1.0}}, "one each for 'a' and 'b'; got {'a': 1.0}"),
        ({"memory_limit": 1000}, "the Jacobian of 20 rows, 3 classes and 38 weights takes .*'diagonal'"),
        ({"train": replace(TRAIN, labels=-TRAIN.labels - 1)}, "training rows have no labels"),
    ],
)
def test_bad_input(changes, message):
    train = changes.pop("train", fit().train)
    with pytest.raises(ValueError, match=message):
        laplace(fit(), train, **{"structure": "full", "console": QUIET} | changes)


def test_a_fit_that_is_no_point_and_a_prior_that_is_not_normal_are_refused():
    model = classifier(bl.priors.normal())
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    options = {"num_steps": 1, "batch_size": 20, "console": QUIET}
    spread = bl.fit(KEY, model, guide, TRAIN, optax.adam(1e-2), **options)
    with pytest.raises(ValueError, match="needs a fit of a point, but the draws of this one differ"):
        laplace(spread, TRAIN, console=QUIET)
    model = classifier(bl.priors.point())
    plain = bl.fit(KEY, model, bl.guides.SiteFlow(model.prior), TRAIN, optax.adam(1e-2), **options)
    with pytest.raises(ValueError, match="needs a prior of independent centred normals"):
        laplace(plain, TRAIN, console=QUIET)
    assert np.isfinite(laplace(plain, TRAIN, precision=2.0, console=QUIET).log_evidence)
