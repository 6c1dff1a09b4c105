"""Training-free Bayesianization: the turned adapter, the law of its noise, and the search for sigma."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import bnlora as bl
from bnlora.infer.approximate import TrainingFree, training_free
from bnlora.infer.approximate.training_free import largest, rotated
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
QUIET = Console(quiet=True)
BASE = tiny_base(jax.random.key(1), num_layers=1)
TRAIN = tiny_rows(jax.random.key(2), 40)


def adapter(d_out=6, rank=3, true_rank=3, layers=2):
    random = np.random.default_rng(0)
    b = random.normal(size=(layers, d_out, true_rank)) @ random.normal(size=(layers, true_rank, rank))
    return random.normal(size=(layers, rank, 5)), b


ADAPTERS = {
    "whole": adapter(),
    "deficient": adapter(true_rank=2),
    "wide": adapter(d_out=2, rank=4, true_rank=2),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_turning_leaves_the_update_and_makes_columns_orthogonal(kind):
    a, b = ADAPTERS[kind]
    turned = rotated(a, b)
    assert (turned.a.shape, turned.b.shape) == (a.shape, b.shape)
    np.testing.assert_allclose(turned.b @ turned.a, b @ a, atol=1e-12)
    gram = turned.b.swapaxes(1, 2) @ turned.b
    np.testing.assert_allclose(gram, gram * np.eye(b.shape[2]), atol=1e-12)
    present = np.count_nonzero(turned.widths, axis=1)
    np.testing.assert_array_equal(present, np.linalg.matrix_rank(b))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_noise_of_the_update_is_equal_in_every_direction_of_its_range(kind):
    """b' diag(1/d) has orthonormal columns that span the columns of b: their projector is b b^+."""
    a, b = ADAPTERS[kind]
    turned = rotated(a, b)
    sides = turned.b * turned.widths[:, None, :]
    np.testing.assert_allclose(sides @ sides.swapaxes(1, 2), b @ np.linalg.pinv(b), atol=1e-10)


def test_draws_have_that_noise():
    """Covariance of the update's rows against sigma^2 times the projector, within four standard errors."""
    a, b = ADAPTERS["deficient"]
    count, sigma = 1500, 0.3
    draws = TrainingFree(None, {"m": rotated(a, b)}, sigma).draw_adapters(KEY, count)["m"]
    update = np.asarray(draws["b"] @ draws["a"]) - b @ a  # (draw, layer, d_out, d_in)
    for layer, projector in enumerate(b @ np.linalg.pinv(b)):
        rows = update[:, layer].swapaxes(1, 2).reshape(-1, 6)  # columns of the update are independent
        expected = sigma**2 * projector
        scale = np.diag(expected)
        stderr = np.sqrt((expected**2 + np.outer(scale, scale)) / len(rows))
        assert (np.abs(rows.T @ rows / len(rows) - expected) < 4 * stderr + 1e-9).all()


@functools.cache
def fit():
    sites = bl.select(BASE, ["lm_head"], rank=2)
    model = bl.Classifier(BASE, sites, bl.priors.point(), label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior)
    options = {"num_steps": 150, "batch_size": 40, "console": QUIET}
    return bl.fit(KEY, model, guide, TRAIN, optax.adam(5e-2), **options)


def loss_at(found, sigma, criterion):
    posterior = TrainingFree(found.model, found.families, sigma)
    prediction = bl.predict(KEY, posterior, fit().train, num_draws=10, console=QUIET)
    labels = np.asarray(TRAIN.labels)
    return (
        bl.metrics.nll(prediction.log_probs, labels)
        if criterion == "nll"
        else -bl.metrics.accuracy(prediction.log_probs, labels)
    )


@pytest.mark.parametrize("criterion", ["nll", "accuracy"])
def test_sigma_is_where_the_criterion_gives_way(criterion):
    options = {"tolerance": 0.05, "criterion": criterion, "num_bisections": 5, "console": QUIET}
    found = training_free(KEY, fit(), fit().train, **options)
    point = loss_at(found, 0.0, criterion)
    assert loss_at(found, found.sigma, criterion) <= point + 0.05
    assert loss_at(found, found.sigma * 2 ** (2**-5), criterion) > point + 0.05


def test_a_posterior_says_how_many_directions_have_noise():
    """Two layers of three columns each, of rank two. In a fit the rank of `b` can hang on rounding."""
    found = TrainingFree(None, {"m": rotated(*ADAPTERS["deficient"])}, 0.25)
    assert repr(found) == "TrainingFree(sigma 0.25, 4 of 6 directions of the update with noise)"


@pytest.mark.parametrize("limit", [3e-7, 0.0123, 47.0])
def test_search_finds_the_limit_to_its_resolution(limit):
    found = largest(lambda sigma: sigma <= limit, num_bisections=6)
    assert found <= limit < found * 2 ** (2**-6) * (1 + 1e-12)


def test_search_without_a_limit_is_refused():
    with pytest.raises(ValueError, match=r"every sigma up to 1.1e\+10 passes the criterion; change its tol"):
        largest(lambda sigma: True, num_bisections=1)
    with pytest.raises(ValueError, match="no sigma down to 9.1e-15 passes the criterion"):
        largest(lambda sigma: False, num_bisections=1)


def test_bad_input():
    def run(posterior=None, **changes):
        options = {"tolerance": 0.1, "console": QUIET} | changes
        training_free(KEY, posterior or fit(), TRAIN, **options)

    with pytest.raises(ValueError, match="criterion must be one of .*; got 'loss', nearest is 'nll'"):
        run(criterion="loss")
    with pytest.raises(ValueError, match="tolerance must be a positive number; got 0"):
        run(tolerance=0)
    zero = TrainingFree(fit().model, {"lm_head": rotated(np.ones((1, 2, 16)), np.zeros((1, 2, 2)))}, 0.0)
    with pytest.raises(ValueError, match="needs a fitted update; here `b` is zero in every layer"):
        run(zero)
    spread = training_free(KEY, fit(), TRAIN, tolerance=0.1, num_bisections=1, console=QUIET)
    with pytest.raises(ValueError, match="needs a fit of a point, but the draws of this one differ"):
        run(spread)
    assert jnp.isfinite(spread.sigma)
