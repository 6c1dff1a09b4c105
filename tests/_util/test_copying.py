"""Copies and pickles: posteriors with programs in them give the same draws, and nothing keeps a tracer."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders.posterior_members import BASE, KEY, MODEL, SITES, at_start, plain_chains
from builders.tracers import tracers
from numpyro.distributions import constraints

import bnlora as bl
from bnlora._util import copying
from bnlora.infer import approximate as inference
from bnlora.infer.svi.elbo import initial_parameters, parameter_shapes
from bnlora.testing import frozen_scale


@pytest.mark.slow
def test_a_copy_shares_the_frozen_base():
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
    made = at_start(guide)
    assert copy.deepcopy(made).model.base is BASE
    inference.Ensemble((made, copy.deepcopy(made)))  # whose members have one base
    again = pickle.loads(pickle.dumps(made))
    jax.tree.map(np.testing.assert_array_equal, again.model.base.weights, BASE.weights)


@pytest.fixture(scope="module", autouse=True)
def of_others() -> list:
    """Tracers that other files left in this process."""
    return tracers()


@pytest.mark.slow
@pytest.mark.parametrize("support", ["fixed", "computed"])
def test_a_guide_keeps_no_tracer(support, of_others):
    def prior(*_):
        end = 2.0 if support == "fixed" else numpyro.sample("end", dist.LogNormal(0.0, 0.1)) + 1.0
        with numpyro.plate("layer", 2):
            return numpyro.sample("w", dist.Uniform(0.0, end))

    made = bl.guides.Guide(prior, bl.guides.mean_field())
    assert tracers(besides=of_others) == []
    again = copy.deepcopy(made)
    assert repr(again) == repr(made)


@pytest.mark.slow
def test_parameters_whose_ends_are_computed_keep_no_tracer(of_others):
    def prior(*_):
        end = jnp.exp(jnp.ones(()))
        s = numpyro.param("s", 0.5, constraint=constraints.interval(0.0, end))
        return numpyro.sample("w", dist.Normal(0, s).expand([2]).to_event(1))

    model, guide = SimpleNamespace(prior=prior), bl.guides.Guide(prior, bl.guides.mean_field())
    start, constrain = initial_parameters(KEY, model, guide)
    assert tracers(besides=of_others) == []
    np.testing.assert_allclose(constrain(start)["s"], 0.5, rtol=1e-6)
    shapes, allowed = parameter_shapes(model, guide)
    assert tracers(besides=of_others) == []
    assert shapes["s"].shape == ()
    assert [bool(allowed["s"](np.float32(x))) for x in (-0.1, 2.7, 2.8)] == [False, True, False]


def test_programs_of_a_user_travel_too():
    """A prior and a guide that are functions inside a function, as in a notebook's cell."""

    def prior(sites):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 2, 1]).to_event(3))
        return {"lm_head": {"a": np.ones((1, 1, 16), np.float32), "b": w}}

    model = bl.Classifier(BASE, SITES, prior, label_ids=(3, 5))
    made = at_start(frozen_scale(model.prior, 0.1), model)
    again = pickle.loads(pickle.dumps(made))
    jax.tree.map(np.testing.assert_array_equal, again.draw_adapters(KEY, 2), made.draw_adapters(KEY, 2))


def test_a_pickle_of_another_version_names_the_way(monkeypatch):
    written = pickle.dumps(MODEL)
    monkeypatch.setattr(copying, "version", lambda name: "99.0")
    with pytest.raises(ValueError, match=r"has programs of bnlora .*bnlora 99.0 on .*bnlora.save_fit"):
        pickle.loads(written)


def test_errors_that_carry_results_travel():
    """As a pool of processes sends them to who waits."""
    made = at_start(bl.guides.Guide(MODEL.prior, bl.guides.mean_field()))
    history = {**made.history, "elbo": np.zeros(4)}
    diverged = bl.FitDiverged(
        replace(made, skipped_steps=3, step_seconds=np.ones(4), history=history), skip_budget=2
    )
    errors = [
        diverged,
        inference.EnsembleDiverged(diverged, (), 3),
        inference.NoMemberFinished(diverged.fit),
        inference.ChainDiverged(plain_chains(), 7, "lower `step_size`"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again).keys() == vars(error).keys()
