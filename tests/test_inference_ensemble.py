"""Ensembles: an equal mixture of members that differ by their key alone."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest
from numpyro.infer.autoguide import AutoDelta
from rich.console import Console

import bnlora as bl
from bnlora.inference import Ensemble, fit_ensemble
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
QUIET = Console(quiet=True)
BASE = tiny_base(jax.random.key(1), num_layers=1)
TRAIN = tiny_rows(jax.random.key(2), 12)


def classifier(prior=None, rank=1, label_ids=(3, 5)):
    sites = bl.select(BASE, ["lm_head"], rank=rank)
    return bl.Classifier(BASE, sites, prior or bl.priors.normal(), label_ids=label_ids)


def delta(prior):
    return AutoDelta(prior, init_loc_fn=bl.guides.init_to_base)


@functools.cache
def three():
    options = {"num_steps": 2, "batch_size": 6, "console": QUIET}
    return fit_ensemble(KEY, classifier(), delta, TRAIN, optax.adam(1e-2), size=3, **options)


def test_prediction_is_the_mean_of_the_members():
    whole = bl.predict(KEY, three(), TRAIN, num_samples=6, console=QUIET)
    each = [bl.predict(KEY, m, TRAIN, num_samples=1, console=QUIET).probs for m in three().members]
    np.testing.assert_allclose(whole.probs, np.mean(each, axis=0), atol=1e-6)
    assert "3 members of Fit" in repr(three())


def test_members_start_apart():
    """Two steps of at most 0.01 cannot have moved equal starts this far from each other."""
    first, second, third = (m.params["lm_head.a_auto_loc"] for m in three().members)
    for other in (second, third):
        assert np.abs(first - other).max() > 0.1


def test_a_member_is_the_fit_of_its_key():
    key = jax.random.split(KEY, 3)[1]
    model, options = three().model, {"num_steps": 2, "batch_size": 6, "console": QUIET}
    alone = bl.fit(key, model, delta(model.prior), TRAIN, optax.adam(1e-2), **options)
    jax.tree.map(np.testing.assert_array_equal, alone.params, three().members[1].params)


def test_draws_come_in_equal_shares():
    draws = three().draw_adapters(KEY, 6)["lm_head"]["b"]
    expected = [m.draw_adapters(KEY, 1)["lm_head"]["b"][0] for m in three().members]
    np.testing.assert_array_equal(draws, np.repeat(expected, 2, axis=0))
    for wrong, nearest in [(7, 6), (8, 9), (1, 3)]:
        with pytest.raises(ValueError, match=f"multiple of the 3 members; got {wrong}, nearest is {nearest}"):
            three().draw_adapters(KEY, wrong)


@dataclass(frozen=True)
class Member:
    """A posterior of which nothing but the model matters."""

    model: Any

    def draw_adapters(self, key, num_samples):
        raise NotImplementedError


def test_members_must_share_what_the_likelihood_reads():
    Ensemble((Member(classifier()), Member(classifier(bl.priors.point()))))  # priors may differ
    for other, what in [
        (classifier(rank=2), "sites"),
        (classifier(label_ids=(3, 6)), "label_ids"),
        (bl.Classifier(tiny_base(KEY), bl.select(BASE, ["lm_head"], rank=1), bl.priors.normal(),
                       label_ids=(3, 5)), "base"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"of the first; member 2 has other {what}"):
            Ensemble((Member(classifier()), Member(other)))
    with pytest.raises(ValueError, match="the number of members must be at least 1; got 0"):
        Ensemble(())
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        fit_ensemble(KEY, classifier(), delta, TRAIN, optax.adam(1e-2), size=0)
