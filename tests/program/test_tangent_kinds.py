"""A posterior of the network and one of its tangent model are different, and no function confuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders.linearised import BASE, KEY, NEW, ROWS, frames, network_of, tangent_of

import bnlora as bl


def fit_of(model):
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    return bl.fit(KEY, model, guide, ROWS, optax.adam(1e-2), num_steps=2, batch_size=len(ROWS))


def test_a_network_is_not_compared_with_a_tangent_model():
    made = frames("v_proj", "lm_head")
    network, tangent = fit_of(network_of(made)), fit_of(tangent_of(made))
    for pair in ((network, tangent), (tangent, network)):
        with pytest.raises(ValueError, match="both of the network, or both of the tangent model"):
            bl.compare(KEY, *pair, NEW, against="anything", num_draws=40)


def test_tangent_models_of_other_frames_are_not_compared():
    sites = frames("v_proj", "lm_head")
    moved = bl.frames(
        jax.random.key(5),
        BASE,
        ["v_proj", "lm_head"],
        ROWS,
        label_ids=(3, 5),
        size=2,
        source="random",
        layers=[1],
    )
    assert moved.sites == sites.sites
    with pytest.raises(ValueError, match="tangent model in the same frames"):
        bl.compare(KEY, fit_of(tangent_of(sites)), fit_of(tangent_of(moved)), NEW, against="anything")


def test_the_scale_of_a_wanted_spread_is_that_of_the_tangent_model():
    """On the rows of the frames the spread is the scale itself, up to Monte Carlo error."""
    made = frames("lm_head")
    tangent = tangent_of(made)

    def prior_at(scale):
        return bl.priors.core(made, scale=scale)

    found = bl.scale_for_spread(KEY, tangent, prior_at, ROWS, spread=1.5, num_draws=2000)
    stderr = 1.5 / np.sqrt(2 * 2000)  # of a standard deviation, if the rows were one
    assert abs(found - 1.5) < 4 * stderr
    again = bl.prior_predictive(KEY, tangent.with_prior(prior_at(found)), ROWS, num_draws=2000)
    np.testing.assert_allclose(again.overall_spread, 1.5, rtol=1e-3)


def test_a_model_that_holds_sites_has_the_scale_of_the_whole_one():
    """The other prior of the comparison holds no site."""
    made = frames("v_proj", "lm_head", layers=2)
    options = {"spread": 1.0, "num_draws": 50}
    for model in (network_of(made), tangent_of(made)):
        shape = model.prior.sites["v_proj"].depth, *made["v_proj"].size[1:]
        held = bl.condition(model, {"v_proj.U": jnp.full(shape, 3.0)})
        whole, part = (
            bl.scale_for_spread(KEY, m, lambda s: bl.priors.core(made, scale=s), ROWS, **options)
            for m in (model, held)
        )
        assert part == pytest.approx(whole, rel=1e-5)


def test_a_family_has_the_frames_of_the_part_that_fills_it():
    both, other = frames("v_proj", "lm_head"), frames("v_proj", "lm_head", size=3)
    prior = bl.priors.by_family({"lm_head": bl.priors.core(both), ".*": bl.priors.core(other)})
    assert prior.frames["v_proj"] is other["v_proj"]
    assert prior.frames["lm_head"] is both["lm_head"]
    tangent = bl.Tangent(bl.Classifier(BASE, prior.frames.sites, prior, label_ids=(3, 5)))
    ready = bl.cache_prefix(tangent, ROWS)
    size = sum(int(np.prod(f.size)) for f in (both["lm_head"], other["v_proj"]))
    assert ready.features.phi.shape == (len(ROWS), 1, size)


def test_a_part_of_the_frames_gives_a_model_of_that_part():
    whole = frames("v_proj", "lm_head")
    prior = bl.priors.by_family({"lm_head": bl.priors.core(whole)})
    assert list(prior.frames) == ["lm_head"]
    tangent = bl.Tangent(bl.Classifier(BASE, prior.frames.sites, prior, label_ids=(3, 5)))
    own = tangent_of(frames("lm_head"))
    assert tangent.frames.num_coordinates == own.frames.num_coordinates
    assert jnp.isfinite(bl.laplace(tangent, ROWS).log_evidence)
