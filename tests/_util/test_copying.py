"""Copies and pickles: posteriors with programs in them give the same draws, and nothing keeps a tracer."""

import copy
import gc
import pickle
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders.unfitted import unfitted
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoIAFNormal, AutoNormal

import bnlora as bl
from bnlora._util import copying
from bnlora.infer import approximate as inference
from bnlora.infer.approximate.curvature import Diagonal
from bnlora.infer.approximate.swag import Moments
from bnlora.infer.approximate.training_free import Rotated
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.samplers import Tuning
from bnlora.infer.mcmc.target import Target
from bnlora.infer.mcmc.whitened import whitened
from bnlora.infer.svi.elbo import initial_parameters, parameter_shapes
from bnlora.program.density import density
from bnlora.testing import frozen_scale, tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=1)
ROWS = tiny_rows(jax.random.key(2), 6)
SITES = bl.select(BASE, ["lm_head"], rank=1)
MODEL = bl.Classifier(BASE, SITES, bl.priors.horseshoe(), label_ids=(3, 5))
FRAMES = bl.frames(KEY, BASE, ["lm_head"], ROWS, label_ids=(3, 5), size=2)
TANGENT = bl.Tangent(bl.Classifier(BASE, FRAMES.sites, bl.priors.core(FRAMES), label_ids=(3, 5)))


def tracers():
    """Tracers of a finished compilation that an object still refers to."""
    gc.collect()
    # Use `type`: `isinstance` can ask the object, such as a proxy whose owner is gone.
    return [found for found in gc.get_objects() if issubclass(type(found), jax.core.Tracer)]


def at_start(guide, model=MODEL) -> bl.Fit:
    """A fit of no steps."""
    start, constrain = initial_parameters(KEY, model, guide, BASE.weights, ROWS[:1], len(ROWS))
    return unfitted(model, guide, ROWS, constrain(start))


def weights():
    stream = np.random.default_rng(0)
    return {
        name: {f: stream.normal(size=s) for f, s in site.shapes.items()} for name, site in MODEL.sites.items()
    }


def posteriors():
    """One of every class of posteriors with a program, with arbitrary numbers."""
    view = density(MODEL, {})
    vectors = np.random.default_rng(1).normal(size=(2, 6, view.size)).astype(np.float32)
    size = sum(x.size for x in jax.tree.leaves(weights()))
    nothing, one = np.zeros((2, 6)), np.ones(size)
    reports = {"divergent": nothing > 0, "energy": nothing, "acceptance": nothing, "num_gradients": nothing}
    tuning = Tuning(vectors[:, 0], nothing[:, 0], nothing[:, 0], nothing[:, 0], np.ones(2, int))
    record = {"sampler": "NUTS", "bias": "none", "seconds": 1.0, "stopped": "done"}
    families = {"lm_head": Rotated(weights()["lm_head"]["a"], weights()["lm_head"]["b"], np.ones((1, 1)))}
    fits = [at_start(bl.guides.Guide(MODEL.prior, bl.guides.mean_field())) for _ in range(2)]
    gaussian = bl.laplace(TANGENT, ROWS)
    around = bl.guides.Guide(TANGENT.prior, bl.guides.around(gaussian))
    in_rows = whitened(Target(gaussian.view, ROWS, ROWS), gaussian)
    coordinates = np.random.default_rng(2).normal(size=(2, 6, gaussian.view.size)).astype(np.float32)
    return {
        "Fit": fits[0],
        "SiteFlow": at_start(bl.guides.SiteFlow(MODEL.prior, hidden=4, blocks=1)),
        "AutoNormal": at_start(AutoNormal(MODEL.prior)),
        "AutoIAFNormal": at_start(AutoIAFNormal(MODEL.prior, num_flows=1)),
        "Ensemble": inference.Ensemble(tuple(fits)),
        "Laplace": inference.Laplace(MODEL, weights(), "diagonal", Diagonal(one), one, 1.0, 0.0),
        "Swag": inference.Swag(MODEL, weights(), Moments(3, one, one, np.ones((2, size)))),
        "TrainingFree": inference.TrainingFree(MODEL, families, 0.1),
        "Chain": inference.Chain(view, vectors[0]),
        "Chains": Chains(Target(view, ROWS, ROWS), vectors, reports, tuning, record),
        "Gaussian": gaussian,
        "around a Gaussian": at_start(around, TANGENT),
        "Chains of rows": Chains(in_rows, coordinates, reports, tuning, record),
    }  # fmt: skip


def test_copies_and_pickles_give_the_same_draws():
    for name, made in posteriors().items():
        before = made.draw_adapters(KEY, 2)
        for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert repr(again) == repr(made), name
            jax.tree.map(np.testing.assert_array_equal, again.draw_adapters(KEY, 2), before)
    assert tracers() == []


def test_a_copy_shares_the_frozen_base():
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
    made = at_start(guide)
    assert copy.deepcopy(made).model.base is BASE
    inference.Ensemble((made, copy.deepcopy(made)))  # whose members have one base
    again = pickle.loads(pickle.dumps(made))
    jax.tree.map(np.testing.assert_array_equal, again.model.base.weights, BASE.weights)


@pytest.mark.parametrize("support", ["fixed", "computed"])
def test_a_guide_keeps_no_tracer(support):
    def prior(*_):
        end = 2.0 if support == "fixed" else numpyro.sample("end", dist.LogNormal(0.0, 0.1)) + 1.0
        with numpyro.plate("layer", 2):
            return numpyro.sample("w", dist.Uniform(0.0, end))

    made = bl.guides.Guide(prior, bl.guides.mean_field())
    assert tracers() == []
    again = copy.deepcopy(made)
    assert repr(again) == repr(made)


def test_parameters_whose_ends_are_computed_keep_no_tracer():
    def prior(*_):
        end = jnp.exp(jnp.ones(()))
        s = numpyro.param("s", 0.5, constraint=constraints.interval(0.0, end))
        return numpyro.sample("w", dist.Normal(0, s).expand([2]).to_event(1))

    model, guide = SimpleNamespace(prior=prior), bl.guides.Guide(prior, bl.guides.mean_field())
    start, constrain = initial_parameters(KEY, model, guide)
    assert tracers() == []
    np.testing.assert_allclose(constrain(start)["s"], 0.5, rtol=1e-6)
    shapes, allowed = parameter_shapes(model, guide)
    assert tracers() == []
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
        inference.ChainDiverged(inference.Chain(None, np.zeros((2, 3))), 5, "lower `step_size`"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again).keys() == vars(error).keys()
