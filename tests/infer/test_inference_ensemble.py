"""Ensembles: an equal mixture of members that differ by their key alone."""

import functools

import jax
import numpy as np
import optax
import pytest
from numpyro.infer.autoguide import AutoDelta
from rich.console import Console

import bnlora as bl
from bnlora.infer.approximate import Ensemble, EnsembleDiverged, NoMemberFinished, fit_ensemble
from bnlora.testing import frozen_scale, tiny_base, tiny_rows

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
    whole = bl.predict(KEY, three(), TRAIN, num_draws=6, console=QUIET)
    each = [bl.predict(KEY, m, TRAIN, num_draws=1, console=QUIET).probs for m in three().members]
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


def two_steps(guide=delta, **options):
    options = {"num_steps": 2, "batch_size": 6, "console": QUIET, **options}
    return fit_ensemble(KEY, classifier(), guide, TRAIN, optax.adam(1e-2), size=3, **options)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_interrupt_ends_it_with_the_finished_members(steps):
    """The first of two steps of the first member, and of the second."""
    done = []

    def interrupt(step, params):
        done.append(step)
        if len(done) == steps:
            raise KeyboardInterrupt

    if steps == 1:
        with pytest.raises(NoMemberFinished, match="interrupted after 1 steps of the first member") as error:
            two_steps(on_step=interrupt)
        assert error.value.fit.stopped == "interrupted"
        return
    found = two_steps(on_step=interrupt)
    assert repr(found) == "Ensemble(1 members of Fit, interrupted before the next was finished)"
    assert [found.members[0].stopped, found.unfinished.stopped] == ["steps", "interrupted"]
    jax.tree.map(np.testing.assert_array_equal, found.members[0].params, three().members[0].params)


def test_an_interrupt_between_two_fits_ends_it_too():
    built = []

    def guide(prior):
        built.append(prior)
        if len(built) == 3:
            raise KeyboardInterrupt
        return delta(prior)

    found = two_steps(guide)
    assert len(found.members) == 2
    assert found.stopped == "interrupted"


def test_a_diverged_member_leaves_the_finished_ones():
    guides = iter([delta, delta, lambda prior: frozen_scale(prior, 1e30)])
    with pytest.raises(EnsembleDiverged, match="member 3 of 3: 1 of 1 steps gave a bound") as error:
        two_steps(lambda prior: next(guides)(prior), optimisation=bl.Optimisation(skip_budget=0))
    assert isinstance(error.value, bl.FitDiverged)
    assert error.value.fit.stopped == "diverged"
    for found, expected in zip(error.value.members, three().members[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def member(model):
    """A posterior of which nothing but the model matters."""
    shapes = {name: site.shapes for name, site in model.sites.items()}
    zero = {name: {f: np.zeros(shape) for f, shape in pair.items()} for name, pair in shapes.items()}
    return bl.PointPosterior(model, zero)


def test_members_must_share_what_the_likelihood_reads():
    another = tiny_base(KEY, num_layers=1)
    Ensemble((member(classifier()), member(classifier(bl.priors.point()))))  # priors may differ
    for other, what in [
        (classifier(rank=2), "sites"),
        (classifier(label_ids=(3, 6)), "likelihood"),
        (bl.Classifier(another, bl.select(another, ["lm_head"], rank=1), bl.priors.normal(),
                       label_ids=(3, 5)), "base"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"of the first; member 2 has other {what}"):
            Ensemble((member(classifier()), member(other)))
    with pytest.raises(ValueError, match="the number of members must be at least 1; got 0"):
        Ensemble(())
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        fit_ensemble(KEY, classifier(), delta, TRAIN, optax.adam(1e-2), size=0)
