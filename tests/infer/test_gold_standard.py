"""A fit of several families against chains on some of its sites, and what is held where."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import bnlora as bl
from bnlora.assess.comparison.problem import common_problem
from bnlora.assess.comparison.side import side_of
from bnlora.infer.mcmc import chains as of_chains
from bnlora.prediction.functions import evaluate, identifiable
from bnlora.program.conditional import condition
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
TRAIN, NEW = tiny_rows(jax.random.key(2), 12), tiny_rows(jax.random.key(3), 6)


def shared_scale(sites):
    """One scale for all updates, so that a site may be held that moves with those that are free."""
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    adapters = bl.priors.normal(scale=0.7)(sites)
    return {name: {"a": pair["a"], "b": tau * pair["b"]} for name, pair in adapters.items()}


MODEL = bl.Classifier(
    BASE, bl.select(BASE, ["q_proj", "k_proj", "lm_head"], rank=1, layers=[1]), shared_scale, label_ids=(3, 5)
)


@pytest.fixture(scope="module")
def fit():
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field(init_scale=0.3))
    return bl.fit(KEY, MODEL, guide, TRAIN, optax.adam(0.03), num_steps=100, batch_size=12)


@pytest.fixture(scope="module")
def said(fit):
    """Chains on one of three families, their certificate by lenient thresholds, and a comparison."""
    small = {"num_warmup": 100, "num_draws": 100, "target_acceptance": 0.8}
    with pytest.MonkeyPatch.context() as patch:
        lenient = bl.Thresholds(rhat=1.5, ess=40.0, divergences=100, bfmi=0.01)
        patch.setattr(of_chains, "Thresholds", lambda: lenient)
        chains = bl.sample_nuts(KEY, MODEL, TRAIN, sites=["lm_head"], given=fit, **small)
        return chains, chains.certificate, bl.compare(KEY, fit, chains, NEW, num_draws=60)


@pytest.mark.thorough
def test_a_fit_of_three_families_is_compared_with_chains_on_one(said, fit):
    chains, certificate, found = said
    assert certificate.passed
    assert found.names == ("log_likelihood", *(f"margin[{i}]" for i in range(6)), "norm[lm_head]")
    assert "both sides hold k_proj.a, k_proj.b, q_proj.a, q_proj.b, tau at the values of the ref" in repr(
        found
    )
    assert "draws of the other sites are those of the whole fit, and so is k-hat" in found.notes
    # The approximation's values are those of its head alone, at the values of the chains.
    drawn = fit.draws(jax.random.split(KEY, 4)[0], 60)[0].sites
    head = {"a": drawn["lm_head.a"], "b": chains.model.fixed["tau"] * drawn["lm_head.b"]}
    still = jax.tree.map(lambda x: jnp.broadcast_to(x, (60, *x.shape)), chains.model.trunk.below)
    functions = identifiable(MODEL, NEW)
    names, values = evaluate(functions, MODEL, still | {"lm_head": head}, NEW)
    kept = [names.index(name) for name in found.names]
    np.testing.assert_allclose(found.posterior.pooled, values[:, kept], atol=1e-4)
    # Functions of the whole model are told apart: those that the chains cannot change are left out and said.
    own = chains.certify(functions=functions, thresholds=certificate.thresholds)
    assert own.constant == ("norm[k_proj]", "norm[q_proj]")
    assert own.passed
    again = bl.compare(KEY, fit, _certified(chains, own), NEW, functions=functions, num_draws=60)
    assert again.constant == own.constant
    assert "left out, constant under the reference: norm[k_proj], norm[q_proj]" in repr(again)
    np.testing.assert_allclose(again.reference.values, found.reference.values, atol=1e-4)


@pytest.mark.slow
def test_a_stored_reference_holds_what_its_chains_held(said, fit, tmp_path):
    chains, certificate, found = said
    bl.save_reference(bl.store_reference(_certified(chains, certificate), NEW, num_draws=60), tmp_path)
    stored = bl.load_reference(tmp_path)
    assert set(stored.fixed) == set(chains.model.fixed)
    assert stored.fixed["tau"].shape == ()
    again = bl.compare(KEY, fit, stored, NEW, num_draws=60)
    assert again.notes == found.notes
    np.testing.assert_allclose(again.posterior.values, found.posterior.values, atol=1e-4)
    alike = common_problem(ones(chains.model), side_of(stored), "reference")
    assert alike.model is chains.model
    assert alike.holds == ()
    elsewhere = condition(MODEL, {name: 1.5 * value for name, value in chains.model.fixed.items()})
    with pytest.raises(ValueError, match="same values of the sites that both posteriors fix"):
        common_problem(ones(elsewhere), side_of(stored), "reference")
    unknown = common_problem(fit, side_of(replace(stored, fixed={}, params={})), "reference")
    assert "only the reference holds sites (" in unknown.notes[0]


def _certified(chains, certificate):
    made = replace(chains)
    made.__dict__["certificate"] = certificate
    return made


def ones(model):
    """A posterior that has draws of adapters, and no sites."""
    shapes = {name: site.shapes for name, site in model.sites.items()}
    return bl.PointPosterior(model, {n: {f: jnp.ones(x) for f, x in of.items()} for n, of in shapes.items()})


def test_what_is_held_on_which_side_is_said(said, fit):
    chains, _, _ = said
    fixed = chains.model.fixed
    problem = common_problem(ones(MODEL), side_of(chains), "reference")
    adapters = problem.draw_adapters(KEY, ones(MODEL), 3)
    np.testing.assert_array_equal(adapters["q_proj"]["a"], jnp.stack([fixed["q_proj.a"]] * 3))
    np.testing.assert_array_equal(adapters["lm_head"]["b"], jnp.ones((3, 1, 2, 1)))
    assert problem.notes[1] == "adapters that the other sites change are those of the whole approximation"
    # One that is fitted to the conditional posterior is compared like with like.
    alike = common_problem(ones(chains.model), side_of(chains), "reference")
    assert alike.holds == ()
    assert len(alike.notes) == 1
    loose = common_problem(ones(chains.model), side_of(ones(MODEL)), "other posterior")
    assert loose.model is MODEL
    assert (
        "the approximation holds k_proj.a, k_proj.b, q_proj.a, q_proj.b, tau, which the other"
        in loose.notes[0]
    )
    elsewhere = condition(MODEL, {name: 1.5 * value for name, value in fixed.items()})
    with pytest.raises(
        ValueError, match=r"same values of the sites that both posteriors fix; those of k_proj.a, .* differ"
    ):
        common_problem(ones(elsewhere), side_of(chains), "reference")


def test_what_can_be_refused_is_refused_before_anything_is_computed(said, fit):
    chains, certificate, _ = said
    reference = _certified(chains, certificate)
    nothing = replace(fit, guide=None)  # a draw would fail
    for wrong, message in (
        ({"level": 5}, r"level must lie in \(0, 1\); got 5"),
        ({"num_draws": 12}, "at least 20 draws on each side .*num_draws=12"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bl.compare(KEY, nothing, reference, NEW, **wrong)
