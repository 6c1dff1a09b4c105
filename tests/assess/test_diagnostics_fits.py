"""Diagnostics of fits, against closed forms, quadrature and the model's own densities."""

from dataclasses import replace

import arviz_stats
import jax
import numpy as np
import numpyro
import optax
import pytest
from builders.diagnosed import BASE, exact, problem
from builders.thorough import sample_of

import bnlora as bl
from bnlora.assess import diagnostics
from bnlora.assess.diagnostics.bound import final_bound
from bnlora.assess.diagnostics.weights import held_log_joint
from bnlora.infer.svi.elbo import elbo_terms
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
SCALE = 0.7


@pytest.fixture(scope="module")
def head():
    return problem(scale=SCALE, rank=1, rows=60, truth=1.0)


@pytest.fixture(scope="module")
def head_fit(head):
    return head.fit(bl.guides.full(init_scale=0.3), num_steps=300, rate=0.05)


@pytest.fixture(scope="module")
def deep_fit():
    """Two families of two layers and a head, under a mean-field guide, a few steps old."""
    base = tiny_base(jax.random.key(1))
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2, alpha=1.0, layers=[1, 3])
    model = bl.Classifier(base, sites, bl.priors.normal(scale={"a": 1.0, "b": 0.5}), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.1))
    rows = tiny_rows(jax.random.key(2), 12)
    return bl.fit(KEY, model, guide, rows, optax.adam(0.02), num_steps=5, batch_size=6)


@pytest.mark.slow
def test_divergence_of_normals_by_site_and_layer(deep_fit):
    found = {one.sites[0]: one for one in diagnostics.divergence(deep_fit)}
    assert set(found) == {"q_proj.a", "q_proj.b", "lm_head.a", "lm_head.b"}
    for name, one in found.items():
        family, factor = name.split(".")
        sigma = {"a": 1.0, "b": 0.5}[factor] / deep_fit.model.sites[family].shapes[factor][-1] ** 0.5
        loc, scale = (np.asarray(deep_fit.params[f"{name}.q.{x}"], np.float64) for x in ("loc", "scale"))
        kl = 0.5 * ((scale**2 + loc**2) / sigma**2 - 1) - np.log(scale / sigma)
        np.testing.assert_allclose(one.by_layer, kl.sum((1, 2)), rtol=1e-4)
        np.testing.assert_allclose(one.total, kl.sum(), rtol=1e-4)
        assert (one.family, one.factor, one.error) == (family, factor, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("over", sample_of(["layer", "all"], ["layer"]))
def test_divergence_of_tied_sites_is_that_of_the_bound(over):
    base = tiny_base(jax.random.key(1))
    sites = bl.select(base, ["q_proj", "lm_head"], rank=1, layers=[1, 3])
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.low_rank(rank=1, over=over, init_scale=0.2))
    rows = tiny_rows(jax.random.key(2), 6)
    made = bl.fit(KEY, model, guide, rows, optax.adam(0.02), num_steps=1, batch_size=6)
    terms = jax.jit(lambda k: elbo_terms(k, made.params, model, guide, base.weights, rows)["inducing_kl"])
    bound = np.array([terms(k) for k in jax.random.split(jax.random.key(4), 200)])
    found = diagnostics.divergence(made)
    total, error = sum(x.total for x in found), np.linalg.norm([x.error for x in found])
    assert abs(total - bound.mean()) < 4 * np.hypot(error, bound.std(ddof=1) / 200**0.5)
    assert [one.by_layer is not None for one in found] == [over == "layer"] * len(found)
    assert len(found) == (1 if over == "all" else 4)


def test_points_have_no_divergence_and_others_do(deep_fit):
    families = {r".*\.a": bl.guides.delta(), ".*": bl.guides.mean_field()}
    guide = bl.guides.Guide(deep_fit.model.prior, families)
    made = bl.fit(KEY, deep_fit.model, guide, deep_fit.train, optax.adam(0.02), num_steps=1, batch_size=6)
    totals = {one.sites[0]: one.total for one in diagnostics.divergence(made)}
    assert [np.isnan(totals[f"{f}.a"]) for f in ("q_proj", "lm_head")] == [True, True]
    assert totals["q_proj.b"] > 0
    assert diagnostics.khat(made).overall is None
    with pytest.raises(ValueError, match="hold rows out"):
        diagnostics.loo(made)


def test_map_of_shrinkage(deep_fit):
    found = diagnostics.shrinkage(diagnostics.sample(deep_fit.draw_key, deep_fit, num_draws=300))
    table = found.table.set_index(["family", "layer", "factor"])
    assert list(found.grid().index) == ["q_proj", "lm_head"]
    assert list(found.grid().columns) == [1, 3, 4]
    assert np.isnan(found.grid().loc["lm_head", 1])
    # An entry of alpha / rank B A with independent entries: alpha / rank * (rank * var_b * var_a)^(1/2).
    sigma_a, sigma_b = 16**-0.5, 0.5 * 2**-0.5
    row = table.loc[("q_proj", 3, "update")]
    relative = row.ratio_error / row.ratio  # that of the prior's spread is part of it
    np.testing.assert_allclose(row.prior_sd, 0.5 * (2 * sigma_a**2 * sigma_b**2) ** 0.5, rtol=4 * relative)
    scale = np.asarray(deep_fit.params["q_proj.a.q.scale"])[1]
    sd = table.loc[("q_proj", 3, "a"), "posterior_sd"]
    np.testing.assert_allclose(sd, (scale**2).mean() ** 0.5, rtol=4 / (2 * 300 * scale.size) ** 0.5)
    by_factor = table.loc[[("q_proj", 3, "a"), ("q_proj", 3, "b")], "kl"].sum()
    np.testing.assert_allclose(row.kl, by_factor)
    np.testing.assert_allclose(found.total_kl, table[table.index.get_level_values(2) == "update"].kl.sum())


def test_spectrum_is_that_of_the_products(deep_fit):
    drawn = diagnostics.sample(deep_fit.draw_key, deep_fit, num_draws=25)
    found = {(one.family, one.layer): one for one in diagnostics.spectrum(drawn).layers}
    pair = {f: np.asarray(x, np.float64) for f, x in drawn.drawn[1]["q_proj"].items()}
    product = 0.5 * np.einsum("sor,sri->soi", pair["b"][:, 1], pair["a"][:, 1])
    expected = np.linalg.svd(product, compute_uv=False)[:, :2]
    one = found["q_proj", 3]
    np.testing.assert_allclose(one.values, expected, rtol=1e-5)
    entropy = -(p := expected / expected.sum(1, keepdims=True)) * np.log(p)
    np.testing.assert_allclose(one.effective_rank, np.exp(entropy.sum(1)), rtol=1e-5)


@pytest.mark.slow
def test_densities_with_the_other_families_held(deep_fit):
    drawn = diagnostics.sample(deep_fit.draw_key, deep_fit, num_draws=25)
    got = held_log_joint(drawn, ("q_proj.a", "q_proj.b"))
    sites = drawn.drawn[0].sites
    for index in (0, 13):
        values = {n: x[index] if n.startswith("q_proj") else x.mean(0) for n, x in sites.items()}
        seeded = numpyro.handlers.seed(deep_fit.model, KEY)
        fixed = numpyro.handlers.substitute(seeded, data={**deep_fit.params, **values})
        trace = numpyro.handlers.trace(fixed).get_trace(deep_fit.model.base.weights, deep_fit.train)
        joint = sum(s["fn"].log_prob(s["value"]).sum() for s in trace.values() if s["type"] == "sample")
        # A sum near zero of a hundred terms of order one, each rounded to 24 bits.
        np.testing.assert_allclose(got[index], joint, rtol=1e-5, atol=1e-5)


def test_k_hat_by_family_needs_a_guide_that_parts_them(deep_fit):
    drawn = diagnostics.sample(deep_fit.draw_key, deep_fit, num_draws=50)
    found = diagnostics.khat(drawn)
    assert set(found.families) == {"q_proj", "lm_head"}
    assert None not in found.families.values()
    log_q = sum(np.asarray(drawn.drawn[0].log_q_of[f"q_proj.{f}"], np.float64) for f in "ab")
    again = bl.comparison.khat(held_log_joint(drawn, ("q_proj.a", "q_proj.b")), log_q)
    assert found.families["q_proj"] == again
    guide = bl.guides.Guide(deep_fit.model.prior, bl.guides.low_rank(rank=1, over="all"))
    tied = bl.fit(KEY, deep_fit.model, guide, deep_fit.train, optax.adam(0.02), num_steps=1, batch_size=6)
    found = diagnostics.khat(diagnostics.sample(tied.draw_key, tied, num_draws=25))
    assert found.families == {"q_proj": None, "lm_head": None}


@pytest.mark.slow
def test_leave_one_out_is_that_of_quadrature(head, head_fit):
    expected = exact(head, scale=SCALE).log_loo
    keys = jax.random.split(jax.random.key(3), 6)
    drawn = [diagnostics.sample(k, head_fit, num_draws=400) for k in keys]
    found = [diagnostics.loo(one) for one in drawn]
    elpd = np.array([one.elpd for one in found])
    # Six runs say how large the Monte Carlo error is; t of five degrees of freedom, 1 in 1000.
    assert abs(elpd.mean() - expected.sum()) < 6.9 * elpd.std(ddof=1) / 6**0.5
    rows = np.stack([one.elpd_of for one in found])
    np.testing.assert_allclose(rows.mean(0), expected, atol=6.9 * rows.std(0, ddof=1).max() / 6**0.5)
    labels = np.asarray(head.train.labels)
    probs = np.stack([diagnostics.loo_probs(one) for one in drawn])
    np.testing.assert_allclose(probs.sum(-1), 1.0)
    own = probs[:, np.arange(60), labels]
    np.testing.assert_allclose(own.mean(0), np.exp(expected), atol=6.9 * own.std(0, ddof=1).max() / 6**0.5)


def test_leave_one_out_of_some_rows(head_fit):
    drawn = diagnostics.sample(head_fit.draw_key, head_fit)
    whole, part = diagnostics.loo(drawn), diagnostics.loo(drawn, observations=30)
    assert len(part.rows) == len(set(part.rows)) == 30
    np.testing.assert_allclose(part.elpd_of, whole.elpd_of[part.rows])
    assert abs(part.elpd - whole.elpd) < 4 * part.subsampling_error
    with pytest.raises(ValueError, match="at most the number of training rows, 60; got 61"):
        diagnostics.loo(drawn, observations=61)


@pytest.mark.parametrize("observations", [None, 40])
def test_comparison_of_fits(head, head_fit, observations):
    narrow = problem(scale=0.01, rank=1, rows=60, truth=1.0)
    other = narrow.fit(bl.guides.full(init_scale=0.01), num_steps=100, rate=0.01)
    fits = {
        "narrow": diagnostics.sample(other.draw_key, other),
        "wide": diagnostics.sample(head_fit.draw_key, head_fit),
    }
    table = diagnostics.compare_fits(fits, observations=observations)
    assert list(table.index) == ["wide", "narrow"]
    if observations is None:
        gap = diagnostics.loo(fits["wide"]).elpd - diagnostics.loo(fits["narrow"]).elpd
        # ArviZ 1 rounds its table to the digits of the standard error.
        np.testing.assert_allclose(abs(table.loc["narrow", "elpd_diff"]), gap, atol=0.51)
    shorter = replace(other, train=other.train[:50])
    with pytest.raises(ValueError, match="'short' has others"):
        diagnostics.compare_fits({"whole": head_fit, "short": shorter})


def test_power_scaling_is_that_of_the_tree(head_fit):
    drawn = diagnostics.sample(head_fit.draw_key, head_fit, num_draws=400)
    found = diagnostics.sensitivity(drawn, head_fit.train[:3])
    tree = bl.to_arviz(head_fit.draw_key, head_fit, head_fit.train, num_draws=400)
    norm = found.names.index("norm[lm_head]")
    for group, values in (("prior", found.prior), ("likelihood", found.likelihood)):
        expected = arviz_stats.psense(tree, var_names=["update_norm_lm_head"], group=group)
        np.testing.assert_allclose(values[norm], expected["update_norm_lm_head"], rtol=1e-3)
    np.testing.assert_allclose(
        tree["log_prior"]["lm_head"].values.ravel(), drawn.drawn[0].log_prior, rtol=1e-5
    )


def test_overlap_of_a_posterior_that_is_the_prior(head):
    guide = bl.guides.Guide(head.model.prior, bl.guides.mean_field(init_scale=SCALE))
    made = bl.fit(KEY, head.model, guide, head.train, optax.adam(1e-9), num_steps=1, batch_size=60)
    made = replace(made, params={n: x * 0 if n.endswith("loc") else x for n, x in made.params.items()})
    found = diagnostics.overlap(diagnostics.sample(made.draw_key, made, num_draws=1000), head.train)
    assert (found.value > 0.9).all()
    assert (np.abs(found.position - 0.5) < 4 * 0.5 / 250**0.5).all()
    assert {"margin[7]", "norm[lm_head]"} <= set(found.table.index)


def trace(fit, values, kl=0.0):
    values = np.asarray(values, np.float64)
    history = {"elbo": values, "data": values + kl, "inducing_kl": np.broadcast_to(kl, values.shape)}
    history |= {n: np.zeros(len(values)) for n in ("conditional_kl", "flow_logdet")}
    return replace(fit, history=history, step_seconds=np.zeros(len(values)))


def test_bound_by_windows(head_fit):
    noise = np.random.default_rng(0).normal(size=500)
    still = diagnostics.bound(trace(head_fit, -100 + noise))
    np.testing.assert_allclose(still.value, (-100 + noise)[400:].mean())
    np.testing.assert_allclose(still.errors["elbo"][-1], noise[400:].std(ddof=1) / 10)
    np.testing.assert_array_equal(still.last_step, [100, 200, 300, 400, 500])
    assert (still.verdict, still.rhat < 1.05) == ("converged", True)
    rising = diagnostics.bound(trace(head_fit, -200 + 0.2 * np.arange(500) + noise))
    np.testing.assert_allclose(rising.change, 20, atol=4 * rising.change_error)
    assert (rising.verdict, rising.rhat > 1.1) == ("moving", True)
    # The bound stands still under its noise while the KL term grows without any.
    assert diagnostics.bound(trace(head_fit, -100 + 9 * noise, np.linspace(9, 29, 500))).verdict == "moving"
    assert diagnostics.bound(trace(head_fit, -100 + 200 * noise)).verdict == "too noisy"
    assert diagnostics.bound(trace(head_fit, -100 + noise[:30])).verdict == "too short"
    broken = np.where(np.arange(500) == 450, np.nan, -100 + noise)
    assert diagnostics.bound(trace(head_fit, broken)).num_steps == 499
    with pytest.raises(ValueError, match="at least 10 finite steps; got 9"):
        diagnostics.bound(trace(head_fit, noise[:9]))


def test_final_bound_is_below_the_evidence_by_the_divergence(head, head_fit):
    """Bound = log p(y) - KL(q || posterior); the evidence by quadrature."""
    found = final_bound(diagnostics.sample(head_fit.draw_key, head_fit))
    grid = exact(head, scale=SCALE)
    weights = np.exp(grid.log_prior - np.logaddexp.reduce(grid.log_prior))
    evidence = np.log((weights * np.exp(grid.log_likelihood.sum(1))).sum())
    assert found.value - 4 * found.error < evidence
    assert found.value > evidence - 0.5  # a Gaussian is close to the posterior of a logistic regression


def test_restarts_agree_or_not(head, head_fit):
    again = head.fit(bl.guides.full(init_scale=0.3), num_steps=300, rate=0.05, seed=1)
    found = diagnostics.restarts([head_fit, again], head.others)
    assert found.passed
    assert {"margin[0]", "norm[lm_head]", "singular value[lm_head, 1, 1]"} <= set(found.names)
    apart = {n: x * 2.0 if n.endswith("loc") else x for n, x in again.params.items()}
    moved = replace(again, params=apart)
    assert not diagnostics.restarts([head_fit, moved], head.others).passed
    with pytest.raises(ValueError, match="number of fits must be at least 2; got 1"):
        diagnostics.restarts([head_fit], head.others)
    drawn = [diagnostics.sample(head_fit.draw_key, head_fit, num_draws=n) for n in (40, 60)]
    with pytest.raises(ValueError, match="fit 2 has 60"):
        diagnostics.restarts(drawn, head.others)


def test_only_fits_are_diagnosed(head_fit):
    ensemble = bl.approximate.Ensemble((head_fit,))
    with pytest.raises(ValueError, match="diagnostics need a Fit.*got Ensemble"):
        diagnostics.khat(ensemble)
    with pytest.raises(ValueError, match="num_draws must be at least 25; got 24"):
        diagnostics.sample(head_fit.draw_key, head_fit, num_draws=24)


def test_plain_lora_has_no_prior_to_ask():
    sites = bl.select(BASE, ["lm_head"], rank=2)
    model = bl.Classifier(BASE, sites, bl.priors.point(), label_ids=(3, 5))
    rows = tiny_rows(jax.random.key(2), 6)
    guide = bl.guides.SiteFlow(model.prior)
    made = bl.fit(KEY, model, guide, rows, optax.adam(0.02), num_steps=2, batch_size=6)
    assert diagnostics.divergence(made) == ()
    for of_fit in (diagnostics.shrinkage, lambda f: diagnostics.overlap(f, rows)):
        with pytest.raises(ValueError, match="needs a prior with sample sites"):
            of_fit(made)
    page = bl.diagnose(made.draw_key, made, rows, num_draws=25)
    assert page["k-hat"].status == page["leave-one-out"].status == "not asked"
    assert page["convergence"].status == "problem"
