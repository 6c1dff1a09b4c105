"""What every posterior must keep; one line of `posterior_members` adds one.

A stored reference (`bl.load_reference`) is none: it has function values and predictions, and no adapters.
"""

import copy
import pickle
from functools import cache

import jax
import numpy as np
import pytest
from builders.posterior_members import KEY, MEMBERS, ROWS
from builders.thorough import sample_of
from builders.tracers import tracers

import bnlora as bl
from bnlora.prediction.predict import predict_with_draws

ELSE = ("Fit of an AutoIAFNormal", "Fit around a Gaussian", "Chains of SGLD")
"""Members of the class of another, or part of one (`CoreFit`). Only `make slow` tests these."""
EACH = pytest.mark.parametrize("name", sample_of(MEMBERS, [name for name in MEMBERS if name not in ELSE]))
STORED = [name for name, member in MEMBERS.items() if member.most]


@cache
def made(name: str) -> bl.Posterior:
    return MEMBERS[name].make()


def equal(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@EACH
def test_it_is_a_posterior_of_its_kind_of_model(name):
    posterior = made(name)
    assert isinstance(posterior, bl.Posterior)
    assert posterior.model.kind == MEMBERS[name].model


@EACH
def test_draws_have_the_names_and_shapes_of_the_sites_behind_an_axis_of_draws(name):
    posterior = made(name)
    draws = posterior.draw_adapters(KEY, 4)
    assert list(draws) == list(posterior.model.sites)
    for family, site in posterior.model.sites.items():
        shapes = {factor: np.shape(values) for factor, values in draws[family].items()}
        assert shapes == {factor: (4, *shape) for factor, shape in site.shapes.items()}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(draws))


@EACH
def test_the_same_key_gives_the_same_draws_and_another_key_others(name):
    posterior = made(name)
    draws = posterior.draw_adapters(KEY, 4)
    equal(posterior.draw_adapters(KEY, 4), draws)
    others = posterior.draw_adapters(jax.random.key(1), 4)
    same = [np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (draws, others)), strict=True)]
    assert all(same) == (not MEMBERS[name].spread)


@EACH
def test_no_key_and_no_draw_are_refused(name):
    posterior = made(name)
    with pytest.raises(ValueError, match=r"key must be a random key, such as jax.random.key\(0\); got 7"):
        posterior.draw_adapters(7, 4)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"num_draws must be at least 1; got {size}"):
            posterior.draw_adapters(KEY, size)


@pytest.mark.parametrize("name", STORED)
def test_stored_draws_are_all_different_and_no_more_than_there_are(name):
    posterior, most = made(name), MEMBERS[name].most
    draws = np.asarray(posterior.draw_adapters(KEY, most)["lm_head"]["b"]).reshape(most, -1)
    assert len(np.unique(draws, axis=0)) == most
    with pytest.raises(ValueError, match=f"keeps? {most} draws; num_draws must be at most that, got"):
        posterior.draw_adapters(KEY, most + 1)


@EACH
def test_it_is_predicted_from_its_draws(name):
    posterior = made(name)
    prediction = bl.predict(KEY, posterior, ROWS, num_draws=4)
    assert prediction.draw_log_probs.shape == (4, len(ROWS), 2)
    same = predict_with_draws(posterior.model, posterior.draw_adapters(KEY, 4), ROWS)
    np.testing.assert_array_equal(prediction.draw_log_probs, same.draw_log_probs)
    np.testing.assert_allclose(prediction.probs.sum(1), 1, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def of_others() -> list:
    """Tracers that other files left in this process."""
    return tracers()


@pytest.mark.slow
@EACH
def test_a_copy_and_a_pickle_give_the_same_draws(name, of_others):
    posterior = made(name)
    before = posterior.draw_adapters(KEY, 2)
    for again in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert repr(again) == repr(posterior)
        equal(again.draw_adapters(KEY, 2), before)
    assert tracers(besides=of_others) == []


@EACH
def test_its_repr_is_short_and_shows_no_array(name):
    shown = repr(made(name))
    assert len(shown.splitlines()) <= 6
    assert len(shown) <= 700
    assert "[[" not in shown
    assert "Array(" not in shown
