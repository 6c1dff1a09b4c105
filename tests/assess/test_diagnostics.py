"""The ArviZ tree: its groups against the fit's own numbers, and ArviZ's functions on it."""

from dataclasses import replace

import arviz_base
import arviz_plots
import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray

import bnlora as bl
from bnlora.assess.diagnostics import singular_values
from bnlora.infer.svi.elbo import TERMS
from bnlora.program.draws import adapters_at, draw_sites
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1))
ROWS = tiny_rows(jax.random.key(2), 12)


def prior(sites):
    """A prior with a scale of its own for every update, shared by all layers."""
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    adapters = bl.priors.normal(scale=0.5)(sites)
    return {n: {"a": pair["a"], "b": tau * pair["b"]} for n, pair in adapters.items()}


@pytest.fixture(scope="module")
def fit():
    sites = bl.select(BASE, ["q_proj", "k_proj", "lm_head"], rank=2, layers=[1, 3])
    model = bl.Classifier(BASE, sites, prior, label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.3))
    return bl.fit(KEY, model, guide, ROWS, optax.adam(0.02), num_steps=5, batch_size=6)


@pytest.fixture(scope="module")
def tree(fit):
    return bl.to_arviz(fit.draw_key, fit, ROWS[:7], num_draws=120)


@pytest.mark.slow
def test_groups_dimensions_and_coordinates(tree):
    assert set(tree.children) == {
        "posterior",
        "sample_stats",
        "log_prior",
        "log_likelihood",
        "posterior_predictive",
        "observed_data",
    }
    posterior = tree["posterior"]
    assert posterior["update_norm"].dims == ("chain", "draw", "module", "layer")
    assert posterior["singular_value"].dims == ("chain", "draw", "module", "layer", "rank")
    assert posterior["singular_value_lm_head"].dims == ("chain", "draw", "rank_lm_head")
    assert posterior["tau"].dims == posterior["update_norm_lm_head"].dims == ("chain", "draw")
    assert list(posterior["layer"].values) == [1, 3]
    assert list(posterior["module"].values) == ["q_proj", "k_proj"]
    assert list(posterior["rank"].values) == [1, 2]
    assert tree["log_likelihood"]["y"].shape == (4, 30, 7)
    np.testing.assert_array_equal(tree["observed_data"]["y"], ROWS.labels[:7])


def test_norms_are_those_of_the_scaled_updates(fit, tree):
    draw = draw_sites(jax.random.split(fit.draw_key, 120)[5], fit.model, fit.guide, fit.params)
    adapters = adapters_at(fit.model, fit.params, draw.sites)
    by_draw = tree["posterior"].to_dataset().stack(sample=("chain", "draw")).isel(sample=5)
    for module in ("q_proj", "k_proj"):
        pair, scale = adapters[module], fit.model.sites[module].scale
        norms = [np.linalg.norm(scale * pair["b"][i] @ pair["a"][i]) for i in range(2)]
        np.testing.assert_allclose(by_draw["update_norm"].sel(module=module), norms, rtol=1e-4)


def test_families_that_form_no_grid_get_variables_of_their_own():
    sites = bl.select(BASE, {r"layers\.[23]\.q_proj": 1, "k_proj": 2, "lm_head": 2})
    model = bl.Classifier(BASE, sites, bl.priors.point(), label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior)
    made = bl.fit(KEY, model, guide, ROWS, optax.adam(0.02), num_steps=1, batch_size=6)
    posterior = bl.to_arviz(made.draw_key, made, ROWS[:2], num_draws=4)["posterior"]
    assert posterior["update_norm_q_proj"].dims == ("chain", "draw", "module_q_proj", "layer_q_proj")
    assert list(posterior["layer_k_proj"].values) == [0, 1, 2, 3]
    assert posterior["singular_value_q_proj"].shape == (4, 1, 1, 2, 1)


def test_densities_are_those_of_the_draws(fit, tree):
    """log q and log p of each draw against the guide's and the model's own, by numpyro's handlers."""
    keys = jax.random.split(fit.draw_key, 120)
    stats = tree["sample_stats"]
    for index in (0, 13):
        draw = draw_sites(keys[index], fit.model, fit.guide, fit.params)
        seeded = numpyro.handlers.seed(fit.model, KEY)
        fixed = numpyro.handlers.substitute(seeded, data={**fit.params, **draw.sites})
        trace = numpyro.handlers.trace(fixed).get_trace(BASE.weights, ROWS)
        joint = sum(s["fn"].log_prob(s["value"]).sum() for s in trace.values() if s["type"] == "sample")
        np.testing.assert_allclose(stats["log_p"].values.reshape(-1)[index], joint, rtol=1e-5)
        np.testing.assert_allclose(stats["log_q"].values.reshape(-1)[index], draw.log_q, rtol=1e-5)


def test_mean_of_log_p_minus_log_q_is_the_bound(fit, tree):
    """E_q[log p - log q] is the bound, here with other draws than the terms of `elbo_terms`."""
    from bnlora.infer.svi.elbo import elbo_terms

    ratio = (tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]).values.reshape(-1)
    bound = jax.jit(lambda k: elbo_terms(k, fit.params, fit.model, fit.guide, BASE.weights, ROWS)["elbo"])
    other = np.array([bound(k) for k in jax.random.split(jax.random.key(9), 200)])
    error = np.hypot(ratio.std(ddof=1) / len(ratio) ** 0.5, other.std(ddof=1) / len(other) ** 0.5)
    assert abs(ratio.mean() - other.mean()) < 4 * error


def test_record_of_the_optimisation(fit, tree):
    for name in TERMS:
        np.testing.assert_array_equal(tree["sample_stats"][name], fit.history[name])
    assert list(tree["sample_stats"]["step"].values) == [1, 2, 3, 4, 5]


def test_predictive_classes_follow_the_probabilities(fit):
    tree = bl.to_arviz(fit.draw_key, fit, ROWS[:2], num_draws=800)
    share = tree["posterior_predictive"]["y"].mean(("chain", "draw")).values
    probs = bl.predict(jax.random.key(5), fit, ROWS[:2], num_draws=800).probs[:, 1]
    # Both are means over 800 draws with variance of at most 1/4 each.
    np.testing.assert_allclose(share, probs, atol=4 * (2 * 0.25 / 800) ** 0.5)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")  # the fit is five steps old
def test_arviz_summarises_plots_and_stores_it(tree, tmp_path):
    table = arviz_stats.summary(tree)
    assert {"tau", "update_norm[k_proj, 3]", "singular_value_lm_head[2]"} <= set(table.index)
    plot = arviz_plots.plot_forest(tree, var_names=["update_norm"])
    plot.savefig(tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 5000
    loo = arviz_stats.loo(tree)
    assert np.isfinite(getattr(loo, "elpd", None) or loo.elpd_loo)
    tree.to_netcdf(tmp_path / "fit.nc")
    back = xarray.open_datatree(tmp_path / "fit.nc")
    np.testing.assert_array_equal(back["posterior"]["update_norm"], tree["posterior"]["update_norm"])
    assert arviz_base.extract(tree)["tau"].size == 120


def test_same_call_same_tree(fit, tree):
    again = bl.to_arviz(fit.draw_key, fit, ROWS[:7], num_draws=120)
    xarray.testing.assert_equal(again["posterior"].to_dataset(), tree["posterior"].to_dataset())
    other = bl.to_arviz(jax.random.key(4), fit, ROWS[:7], num_draws=120)
    assert (other["posterior"]["tau"].values != tree["posterior"]["tau"].values).any()


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(2, 5, 4), (3, 6, 2)])
def test_singular_values_are_those_of_the_product(rank, d_in, d_out):
    a, b = jax.random.normal(KEY, (7, rank, d_in)), jax.random.normal(jax.random.key(3), (7, d_out, rank))
    product = np.asarray(jnp.einsum("nor,nri->noi", b, a), np.float64)
    expected = np.linalg.svd(product, compute_uv=False)
    got = singular_values(a, b)
    assert got.shape == (7, rank)
    size = min(rank, d_in, d_out)
    np.testing.assert_allclose(got[:, :size], expected[:, :size], rtol=1e-4)
    np.testing.assert_array_equal(got[:, size:], 0)


@pytest.mark.parametrize("size", [0, 6])
def test_number_of_draws_must_fill_the_chains(fit, size):
    with pytest.raises(ValueError, match=f"positive multiple of 4; got {size}"):
        bl.to_arviz(fit.draw_key, fit, ROWS, num_draws=size)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ROWS.labels[:, None],
            r"the data rows need one label each, shape \(12,\); got shape \(12, 1\); pass",
        ),
        (jnp.full(12, -1), "the data rows have no labels"),
        (jnp.full(12, 2), "the data rows have labels up to 2, but the model has 2 classes"),
    ],
)
def test_rows_need_labels_that_the_model_knows(fit, labels, message):
    with pytest.raises(ValueError, match=message):
        bl.to_arviz(fit.draw_key, fit, replace(ROWS, labels=labels), num_draws=4)
