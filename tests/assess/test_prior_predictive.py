"""Prior prediction: closed forms for an adapted head, the base in the limit, and the search for a scale."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import log_softmax

import bnlora as bl
from bnlora.assess.prior_predictive import PriorPredictive, prior_parameters
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS = tiny_rows(jax.random.key(2), 7)


def scaled(scale):
    """A normal prior whose scale may be traced, or zero."""

    def prior(sites):
        adapters = {}
        for name, site in sites.items():
            with numpyro.plate(f"{name}.layer", len(site.layers)):
                adapters[name] = {
                    f: scale
                    * site.shapes[f][-1] ** -0.5
                    * numpyro.sample(f"{name}.{f}", dist.Normal(jnp.zeros(site.shapes[f]), 1.0).to_event(2))
                    for f in ("a", "b")
                }
        return adapters

    return prior


def classifier(prior, targets=("lm_head",), ids=(3, 5), rank=1, alpha=None):
    return bl.Classifier(BASE, bl.select(BASE, targets, rank=rank, alpha=alpha), prior, label_ids=ids)


def features():
    """The hidden state of the last real token after the final norm, by the untouched module and numpy."""
    module = BASE.module
    hidden = module.blocks(module.embed(ROWS.tokens), ROWS.mask, first_layer=0, stop=2)
    last = np.asarray(ROWS.mask).sum(1) - 1
    hidden = np.asarray(hidden, np.float64)[np.arange(len(ROWS)), last]
    return hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + BASE.config.norm_eps)


@pytest.mark.parametrize(("ids", "rank"), [((3, 5), 1), ((3, 5, 8), 2)])
def test_spread_of_an_adapted_head_in_closed_form(ids, rank):
    """z_c - z_c' gains alpha/r (b_c - b_c')^T a h: the variance is 2 (alpha/r)^2 s_a^2 s_b^2 |h|^2 / d."""
    scales, alpha, draws = {"a": 0.7, "b": 1.3}, 1.5, 10_000
    model = classifier(bl.priors.normal(scale=scales), ids=ids, rank=rank, alpha=alpha)
    found = bl.prior_predictive(KEY, model, ROWS, num_draws=draws)
    norm = (features() ** 2).mean(1)
    expected = 2 * (alpha / rank * scales["a"] * scales["b"]) ** 2 * norm
    # A product of two normals has kurtosis 9, so that its sample variance has relative error sqrt(8 / draws).
    np.testing.assert_allclose(found.spread**2, expected, rtol=4 * (8 / draws) ** 0.5)
    assert found.overall_spread == pytest.approx(np.sqrt(np.mean(found.spread**2)))


def test_spread_is_the_mean_variance_over_pairs_of_classes():
    logits = np.random.default_rng(0).normal(size=(50, 4, 3))
    found = PriorPredictive(logits, logits[0])
    pairs = [(logits[..., i] - logits[..., j]).var(0, ddof=1) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(found.spread**2, np.mean(pairs, 0))
    shifted = PriorPredictive(logits + np.random.default_rng(1).normal(size=(50, 4, 1)), logits[0])
    np.testing.assert_allclose(shifted.spread, found.spread)


@pytest.mark.parametrize("targets", [("lm_head",), ("down_proj", "lm_head")])
def test_scale_zero_is_the_base_bit_for_bit(targets):
    model = classifier(scaled(0.0), targets, rank=2)
    found = bl.prior_predictive(KEY, model, ROWS, num_draws=3)
    np.testing.assert_array_equal(found.logits, np.broadcast_to(found.base_logits, found.logits.shape))
    assert (found.spread == 0).all()
    assert found.verdict.startswith("no change")


def test_base_logits_are_those_of_the_module():
    found = bl.prior_predictive(KEY, classifier(bl.priors.normal()), ROWS, num_draws=2)
    full = BASE.module(ROWS.tokens, ROWS.mask)
    last = np.asarray(ROWS.mask).sum(1) - 1
    np.testing.assert_allclose(found.base_logits, full[np.arange(7), last][:, [3, 5]], atol=1e-5)
    np.testing.assert_allclose(np.log(found.probs), log_softmax(found.logits.astype(float), -1), atol=1e-9)


@pytest.mark.slow
def test_parts_change_nothing():
    model = classifier(bl.priors.sparse_gp(rows=2, cols=2))
    whole = bl.prior_predictive(KEY, model, ROWS, num_draws=4)
    parts = bl.prior_predictive(KEY, model, ROWS, num_draws=4, batch_size=2)
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-5)


def test_parameters_are_the_given_ones_in_every_draw_or_one_start_of_the_key():
    model = classifier(bl.priors.sparse_gp(rows=2, cols=2))
    params_key, draw_key = jax.random.split(KEY)
    start, others = (prior_parameters(k, model) for k in (params_key, draw_key))
    options = {"num_draws": 3}
    whole = bl.prior_predictive(KEY, model, ROWS, **options)
    given = bl.prior_predictive(KEY, model, ROWS, params={**start, "of.the.guide": 0.0}, **options)
    np.testing.assert_array_equal(given.logits, whole.logits)
    moved = bl.prior_predictive(KEY, model, ROWS, params=others, **options)
    assert np.abs(moved.logits - whole.logits).max() > 1e-3
    misspelt = {n.replace("rows", "row"): x for n, x in start.items()}
    message = r"'lm_head.a.rows.frame' is missing, nearest is 'lm_head.a.row.frame'"
    for wrong, expected in ((misspelt, message), ({}, "is missing, nearest is 'nothing'")):
        with pytest.raises(ValueError, match=expected):
            bl.prior_predictive(KEY, model, ROWS, params=wrong, **options)


def made(margins, base):
    """A prior predictive of two classes with given log-odds."""
    margins, base = np.asarray(margins, float), np.asarray(base, float)
    return PriorPredictive(np.stack([0 * margins, margins], -1), np.stack([0 * base, base], -1))


def test_verdicts_follow_their_rules():
    base, signs = np.array([-0.5, 0.5]), np.where(np.arange(100) % 2, 1.0, -1.0)
    nonsense = made(signs[:, None] * [8.0, 9.0], base)
    assert nonsense.verdict.startswith("confident nonsense: 100% of draws and rows")
    assert nonsense.decided == 1
    assert made(base + 0.01 * signs[:, None], base).verdict.startswith("no change")
    # What a base that is certain itself leaves of doubt is no matter of the prior's scale.
    sure = made(signs[:, None] * [8.0, 9.0], np.array([-9.0, 9.0]))
    assert sure.verdict.startswith("sure as the base: 100% of draws and rows")
    assert "in 100% of the rows); no scale changes that" in sure.verdict
    reasonable = made(base + signs[:, None], base)
    assert reasonable.verdict.startswith("reasonable: 0%")
    assert "base model" in repr(reasonable)
    # A base that is certain itself, left alone by the prior, is no nonsense of the prior's.
    assert made(np.full((10, 2), 9.0), np.full(2, 9.0)).verdict.startswith("no change")


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("lm_head",), ("v_proj", "lm_head")])
def test_the_scale_found_has_the_wanted_spread(targets):
    calls = []

    def prior_at(scale):
        calls.append(scale)
        return scaled(scale)

    model = classifier(bl.priors.normal(), targets)
    found = bl.scale_for_spread(KEY, model, prior_at, ROWS, spread=2.0, num_draws=64)
    assert len(calls) == 1  # one trace for all evaluations
    again = bl.prior_predictive(KEY, classifier(scaled(found), targets), ROWS, num_draws=64)
    assert again.overall_spread == pytest.approx(2.0, rel=1e-3)


def test_bad_input_gets_one_sentence():
    model = classifier(bl.priors.normal())
    with pytest.raises(
        ValueError, match=r"no scale in the bounds .* at scale 0.1 and .* at scale 0.2; choose"
    ):
        bl.scale_for_spread(KEY, model, scaled, ROWS, spread=50.0, bounds=(0.1, 0.2), num_draws=8)
    with pytest.raises(ValueError, match="expected spread > 0 and 0 < least < greatest"):
        bl.scale_for_spread(KEY, model, scaled, ROWS, spread=1.0, bounds=(2.0, 1.0))
    with pytest.raises(ValueError, match="num_draws=2 and batch_size=1; got 7 rows, num_draws=1"):
        bl.prior_predictive(KEY, model, ROWS, num_draws=1)
    with pytest.raises(ValueError, match="needs a prior with sample sites"):
        bl.prior_predictive(KEY, classifier(bl.priors.point()), ROWS)
    with pytest.raises(ValueError, match="not finite in 5 of 5 draws; lower the scale"):
        bl.prior_predictive(KEY, classifier(scaled(1e30)), ROWS, num_draws=5)


def test_a_base_that_is_not_finite_is_no_matter_of_the_scale():
    def broken(path, x):
        return x.at[int(ROWS.tokens[0, 0])].set(jnp.nan) if "embedding" in jax.tree_util.keystr(path) else x

    base = replace(BASE, weights=jax.tree_util.tree_map_with_path(broken, BASE.weights))
    model = classifier(bl.priors.normal()).over(base)
    with pytest.raises(ValueError, match="base model are not; .* not finite, in embedding; load"):
        bl.prior_predictive(KEY, model, ROWS, num_draws=4)
    with pytest.raises(ValueError, match="nan at scale 0.5 and nan at scale 2; .* in embedding; load"):
        bl.scale_for_spread(KEY, model, scaled, ROWS, spread=1.0, bounds=(0.5, 2.0), num_draws=4)
