"""SWAG: its moments against the whole stream, the law of its draws, and what it takes from a fit."""

import functools
import importlib

import jax
import numpy as np
import optax
import pytest
from numpyro.infer.autoguide import AutoDelta
from rich.console import Console

import bnlora as bl
from bnlora.infer.approximate import Swag, swag
from bnlora.infer.approximate.mode import flattened, mode_of
from bnlora.infer.approximate.swag import no_moments, updated
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
QUIET = Console(quiet=True)
BASE = tiny_base(jax.random.key(1), num_layers=1)
TRAIN = tiny_rows(jax.random.key(2), 20)
OPTIONS = {"batch_size": 10, "console": QUIET}


@functools.cache
def fit():
    sites = bl.select(BASE, ["lm_head"], rank=1)
    model = bl.Classifier(BASE, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = AutoDelta(model.prior, init_loc_fn=bl.guides.init_to_base)
    return bl.fit(KEY, model, guide, TRAIN, optax.adam(3e-2), num_steps=10, **OPTIONS)


def stream(count, size):
    return 3.0 + np.random.default_rng(0).normal(size=(count, size)) * np.arange(1, size + 1)


def moments_of(iterates, rank):
    return functools.reduce(lambda m, x: updated(m, x, rank), iterates, no_moments(iterates.shape[1]))


def test_moments_are_those_of_the_whole_stream():
    iterates = stream(12, 4)
    found = moments_of(iterates, 5)
    np.testing.assert_allclose(found.mean, iterates.mean(0))
    np.testing.assert_allclose(found.variance, iterates.var(0))
    so_far = [iterates[: t + 1].mean(0) for t in range(12)]
    np.testing.assert_allclose(found.deviations, (iterates - so_far)[-5:])


def test_draws_have_the_covariance_of_the_paper():
    """Half the diagonal and half the low-rank part, entry by entry within four standard errors."""
    mode, count = mode_of(fit(), "this test"), 4000
    moments = moments_of(stream(12, 18), 5)
    draws = flattened(Swag(fit().model, mode, moments).draw_adapters(KEY, count))
    D = moments.deviations
    expected = (np.diag(moments.variance) + D.T @ D / (len(D) - 1)) / 2
    scale = np.diag(expected)
    stderr = np.sqrt((expected**2 + np.outer(scale, scale)) / count)  # of a normal's sample covariance
    assert (np.abs(np.cov(draws.T) - expected) < 4.5 * stderr).all()  # 171 entries
    assert (np.abs(draws.mean(0) - moments.mean) < 4 * np.sqrt(scale / count)).all()


def test_iterates_come_from_descent_that_starts_at_the_fit():
    found = swag(KEY, fit(), learning_rate=0.05, num_steps=6, every=2, rank=3, **OPTIONS)
    assert found.moments.count == 3
    by_hand = []
    options = {"num_steps": 6, "init_params": fit().params, **OPTIONS}
    bl.fit(
        KEY, fit().model, fit().guide, fit().train, optax.sgd(0.05), **options,
        on_step=lambda step, params: by_hand.append(params) if step % 2 == 0 else None,
    )  # fmt: skip
    means = {n: np.mean([params[n] for params in by_hand], axis=0) for n in by_hand[0]}
    joined = np.concatenate([means[f"lm_head.{factor}_auto_loc"].ravel() for factor in ("a", "b")])
    np.testing.assert_allclose(found.moments.mean, joined, rtol=1e-5, atol=1e-7)
    assert (found.moments.variance > 0).all()
    assert "3 iterates of 18 weights, 3 deviations kept" in repr(found)


@pytest.mark.parametrize("seen", [1, 2])
def test_an_interrupt_leaves_what_was_collected_or_one_sentence(monkeypatch, seen):
    def interrupted(moments, iterate, rank):
        if moments.count == seen:
            raise KeyboardInterrupt
        return updated(moments, iterate, rank)

    # By its name in the import system: as an attribute the function hides the module.
    monkeypatch.setattr(importlib.import_module("bnlora.infer.approximate.swag"), "updated", interrupted)
    options = {"learning_rate": 0.05, "num_steps": 8, "every": 2, "rank": 2, **OPTIONS}
    if seen < 2:
        with pytest.raises(ValueError, match="interrupted with 1 iterates; expected at least rank=2 of them"):
            swag(KEY, fit(), **options)
        return
    found = swag(KEY, fit(), **options)
    assert repr(found) == (
        "Swag(2 iterates of 18 weights, 2 deviations kept, interrupted before the last step)"
    )
    assert np.isfinite(flattened(found.draw_adapters(KEY, 3))).all()


def test_predicts_like_a_fit():
    found = swag(KEY, fit(), learning_rate=0.05, num_steps=4, rank=2, **OPTIONS)
    first, same = (bl.predict(KEY, found, TRAIN, num_draws=3, console=QUIET) for _ in range(2))
    np.testing.assert_array_equal(first.draw_log_probs, same.draw_log_probs)
    np.testing.assert_allclose(first.probs.sum(1), 1, atol=1e-6)
    assert (first.stderr > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a positive number; got 0.0"),
        ({"rank": 1}, "rank must be at least 2; got 1"),
        ({"every": 0}, "every must be at least 1; got 0"),
        ({"batch_size": 21}, "training rows; got 21 for 20 rows, nearest is 20"),
        ({"rank": 4, "every": 3}, "8 steps give 2 iterates, fewer than rank=4; take at least num_steps=12"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        swag(KEY, fit(), **{"learning_rate": 0.1, "num_steps": 8, "rank": 2, **OPTIONS} | changes)
