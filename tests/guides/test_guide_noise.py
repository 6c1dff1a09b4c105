"""Conditional noise in every form of the sparse GP, and families that are points."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders.prior_alone import PriorAlone
from numpyro.distributions import constraints

from bnlora import guides, priors
from bnlora.infer.svi.elbo import elbo_terms, initial_parameters
from bnlora.priors import gp
from bnlora.program.draws import draw_adapters, draw_sites
from bnlora.testing import linear_gaussian, maximise_bound


def gp_prior(form, lam):
    """A prior with conditional noise as a site `w.E` or inside the weights `w.W`."""
    return partial(
        priors.sparse_gp_matrices,
        "w",
        (2, 3, 4),
        sigma=0.8,
        plate="layer",
        rows=2,
        cols=3,
        form=form,
        lam=lam,
    )


def at_start(program, families, key=12, **options):
    """Model, guide and parameters at their start."""
    model = PriorAlone(program)
    guide = guides.Guide(model.prior, families, **options)
    start, constrain = initial_parameters(jax.random.key(key), model, guide)
    return model, guide, start, constrain


def conditional_kl(program, noise, moved=0.0):
    """The term of the bound with the parameters at their start, or all moved in unconstrained space."""
    model, guide, start, constrain = at_start(program, guides.mean_field(), noise=noise)
    params = constrain(jax.tree.map(lambda x: x + moved, start))
    return elbo_terms(jax.random.key(13), params, model, guide)["conditional_kl"]


FORMS = ["whitened", "weights"]
LAMS = {
    "fixed": 0.5,
    "learned": priors.learned(0.5, constraints.unit_interval),
    "random": dist.Uniform(0.0, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("lam", LAMS.values(), ids=LAMS)
def test_the_lam_of_a_guide_is_relative_to_that_of_the_prior_in_every_form(lam):
    """KL(q(W|U) || p(W|U)) is the closed form in the guide's lam, for every lam of the prior."""
    expected = 2 * gp.conditional_kl(3 * 4, jnp.array(0.3))
    for form in FORMS:
        kl = conditional_kl(gp_prior(form, lam), guides.noise(lam_init=0.3))
        np.testing.assert_allclose(kl, expected, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lam", LAMS.values(), ids=LAMS)
def test_noise_as_in_the_prior_costs_nothing_wherever_the_lam_of_the_prior_goes(form, lam):
    kl = conditional_kl(gp_prior(form, lam), guides.prior_noise(), moved=0.4)
    np.testing.assert_allclose(kl, 0, atol=1e-5)


def test_both_forms_give_the_weights_the_same_spread():
    spreads, params = [], {}
    for form in FORMS:
        families, noise = guides.mean_field(init_scale=1e-6), guides.noise(lam_init=0.6)
        model, guide, start, constrain = at_start(gp_prior(form, 0.5), families, noise=noise)
        params = constrain(start) | {n: x for n, x in params.items() if ".E." not in n}
        draws = draw_adapters(jax.random.key(14), model, guide, params, 4000)
        spreads.append(np.asarray(draws).std(0))
    # The standard deviation of n normals is off by sd / sqrt(2 n), so the ratio of two by 1 / sqrt(n).
    np.testing.assert_allclose(spreads[0] / spreads[1], 1, atol=4.5 / 4000**0.5)


def test_frames_start_where_the_key_says_in_every_form():
    for form in FORMS:
        first, again, other = (
            at_start(gp_prior(form, 0.5), guides.mean_field(), key=key)[2] for key in (0, 0, 1)
        )
        for frame in ("w.rows.frame", "w.cols.frame"):
            np.testing.assert_array_equal(first[frame], again[frame])
            assert not np.allclose(first[frame], other[frame])


def scalar():
    numpyro.sample("tau", dist.HalfNormal(1.0))


def matrices():
    with numpyro.plate("layer", 1):
        return numpyro.sample("w", dist.Normal(jnp.zeros((1, 3, 4)), 0.8).to_event(2))


def test_the_fitted_point_of_delta_is_the_posterior_mean():
    """The posterior is Gaussian, so that its mode is its mean."""
    with jax.enable_x64(True):
        model = linear_gaussian(jax.random.key(15), matrices)
        guide = guides.Guide(model.prior, guides.delta())
        params = maximise_bound(jax.random.key(16), model, guide, num_steps=2000, learning_rate=0.05)
    np.testing.assert_allclose(params["w.q.loc"][0], model.posterior(0.8)[0], atol=1e-4)


def test_delta_stays_in_the_support_and_is_called_no_bound():
    model, guide, start, constrain = at_start(scalar, guides.delta())
    at = draw_sites(jax.random.key(17), model, guide, constrain(jax.tree.map(lambda x: x - 3, start)))
    assert at.sites["tau"] > 0
    assert at.log_q == 0
    assert "not a bound" in repr(guide)
    assert not guide.has_density


def test_dropout_drops_whole_columns_at_its_rate_and_keeps_the_mean():
    rate, size = 0.3, 4000
    model, guide, start, constrain = at_start(matrices, guides.dropout(rate=rate))
    params = constrain(start)
    draw = jax.jit(jax.vmap(lambda key: draw_sites(key, model, guide, params).sites["w"]))
    draws, loc = np.asarray(draw(jax.random.split(jax.random.key(18), size))), params["w.q.loc"]
    dropped = (draws == 0).all(-2)
    expected = np.where(dropped[..., None, :], 0, loc / (1 - rate))
    np.testing.assert_allclose(draws, expected, rtol=1e-6)
    error = (rate * (1 - rate) / size) ** 0.5
    np.testing.assert_allclose(dropped.mean(0), rate, atol=4 * error)
    np.testing.assert_array_less(np.abs(draws.mean(0) - loc), 4 * error * np.abs(loc) / (1 - rate))
    assert len({tuple(row) for row in dropped[:, 0]}) == 2**4, "columns are dropped one by one"
    assert "not a bound" in repr(guide)
    assert not guide.has_density
