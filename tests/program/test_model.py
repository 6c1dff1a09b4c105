"""The classifier as a NumPyro model, and what it refuses."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import bnlora as bl
from bnlora.prediction.functions import evaluate, identifiable, log_likelihood
from bnlora.testing import tiny_base, tiny_rows

BASE = tiny_base(jax.random.key(0), num_layers=2)
ROWS = tiny_rows(jax.random.key(1), 6)
SITES = bl.select(BASE, ["q_proj", "lm_head"], rank=2)


def test_it_is_a_plain_numpyro_model():
    """log_density of NumPyro: prior plus log-likelihood, scaled by N / B through the one plate."""
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
    trace = handlers.trace(handlers.seed(model, jax.random.key(2))).get_trace(BASE.weights, ROWS)
    latent = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    prior = sum(s["fn"].log_prob(s["value"]).sum() for n, s in trace.items() if n in latent)
    adapters = handlers.substitute(model.prior, latent)()
    log_probs = jax.nn.log_softmax(model.logits(BASE.weights, adapters, ROWS))
    likelihood = np.asarray(log_probs)[np.arange(6), np.asarray(ROWS.labels)].sum()
    whole, _ = log_density(model, (BASE.weights, ROWS), {}, latent)
    np.testing.assert_allclose(whole, prior + likelihood, rtol=1e-5)
    seeded = handlers.seed(model, jax.random.key(3))
    part, _ = log_density(seeded, (BASE.weights, ROWS, 60), {}, latent)
    np.testing.assert_allclose(part, prior + 10 * likelihood, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_batch_is_no_larger_than_the_data_set(rows):
    """One row would else be broadcast over a data set of none."""
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
    with pytest.raises(ValueError, match=f"n_total must be at least the {rows} rows of the batch; got 0"):
        handlers.seed(model, jax.random.key(3))(BASE.weights, ROWS[:rows], 0)


def test_a_head_is_read_in_its_label_rows_alone():
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5, 9))
    assert model.sites["lm_head"].shapes["b"] == (1, 3, 2)
    assert "3 classes" in repr(model)


@pytest.mark.parametrize("ids", [(3,), (3, 3), ()])
def test_label_ids_must_be_two_different_tokens(ids):
    with pytest.raises(ValueError, match="at least two different token ids; got"):
        bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((5, 324), "label_ids have the token id 324, which the model has not: its embedding has 40 rows"),
        ((-1, 3), "label_ids have the token id -1, which"),
        ((3.0, 5), "label_ids must be a list of integers; got"),
        ((10**30, 3), "label_ids must be a list of integers; got"),
    ],
)
def test_label_ids_are_tokens_of_the_base(ids, message):
    with pytest.raises(ValueError, match=message):
        bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=ids)


def test_a_token_that_the_base_has_no_row_for_is_refused_by_all_that_takes_rows(tokenizer):
    """JAX would read the last row in its place. The number at padding is never read, so it may be any."""
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
    guide, key = bl.guides.Guide(model.prior, bl.guides.mean_field()), jax.random.key(4)
    padded = jnp.where(ROWS.mask, ROWS.tokens, 99)
    plain, other = (BASE.module(tokens, ROWS.mask)[ROWS.mask] for tokens in (ROWS.tokens, padded))
    np.testing.assert_array_equal(plain, other)
    zeros = {n: {f: jnp.zeros((1, *s)) for f, s in site.shapes.items()} for n, site in model.sites.items()}
    posterior = SimpleNamespace(model=model, draw_adapters=lambda key, num_draws: zeros)
    steps = {"num_steps": 1, "batch_size": 3}
    adam, schedule = optax.adam(0.01), bl.approximate.Schedule(num_draws=1, num_warmup=0, batch_size=3)
    for token in (40, -1):
        wrong = replace(ROWS, tokens=ROWS.tokens.at[2, 1].set(token))
        takers = {
            "fit": lambda rows: bl.fit(key, model, guide, rows, adam, **steps),
            "validation": lambda rows: bl.fit(key, model, guide, ROWS, adam, **steps, validation=rows),
            "predict": lambda rows: bl.predict(key, posterior, rows),
            "nuts": lambda rows: bl.sample_nuts(key, model, rows),
            "smc": lambda rows: bl.sample_smc(key, model, rows),
            "sgld": lambda rows: bl.approximate.sgld(key, model, rows, schedule, step_size=0.1),
            "cache": lambda rows: bl.cache_prefix(model, rows),
            "prior predictive": lambda rows: bl.prior_predictive(key, model, rows),
            "NumPyro": lambda rows: handlers.trace(handlers.seed(model, key)).get_trace(BASE.weights, rows),
            "functions": lambda rows: identifiable(model, rows),
            "conditional": lambda rows: bl.condition(model, {"q_proj.a": jnp.zeros((2, 2, 16))}).hidden(
                BASE.weights, rows
            ),
            "module": lambda rows: BASE.module(rows.tokens, rows.mask),
        }
        for take in takers.values():
            with pytest.raises(
                ValueError, match=rf"^row 2 has the token id {token}, which the model has not"
            ):
                take(wrong)
    told = replace(BASE, tokenizer=tokenizer)
    sizes = f"the tokenizer has {len(tokenizer)} tokens, the embedding 40 rows"
    with pytest.raises(
        ValueError, match=f"row 2 has the token '.*' of id 60, which the model has not: {sizes}"
    ):
        model.over(told).check_tokens(replace(ROWS, tokens=ROWS.tokens.at[2, 1].set(60)))


def test_labels_are_classes_of_the_model():
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
    for label, message in ((-1, "the given rows have no labels"), (2, "labels up to 2, but the model has 2")):
        wrong = replace(ROWS, labels=ROWS.labels.at[1].set(label))
        with pytest.raises(ValueError, match=message):
            handlers.trace(handlers.seed(model, jax.random.key(3))).get_trace(BASE.weights, wrong)
        zeros = {n: {f: jnp.zeros((1, *s)) for f, s in x.shapes.items()} for n, x in model.sites.items()}
        with pytest.raises(ValueError, match=message):
            evaluate(identifiable(model, ROWS), model, zeros, wrong)
        lone = {name: {f: x[0] for f, x in pair.items()} for name, pair in zeros.items()}
        assert np.isnan(log_likelihood(model, BASE.weights, lone, wrong))


def test_sites_of_another_base_are_refused():
    deeper = tiny_base(jax.random.key(0), num_layers=3)
    with pytest.raises(
        ValueError, match="sites are those of another base: 'q_proj' maps 16 -> 16 in a model of 2"
    ):
        bl.Classifier(deeper, SITES, bl.priors.normal(), label_ids=(3, 5))
    beyond = replace(SITES, families=(replace(SITES["q_proj"], layers=(0, 2)),))
    with pytest.raises(ValueError, match="the layers of 'q_proj' must be from 0 to 1; got 2"):
        bl.Classifier(BASE, beyond, bl.priors.normal(), label_ids=(3, 5))


def test_a_prior_that_returns_something_else_is_named():
    with pytest.raises(ValueError, match="a prior must return adapters by family; got NoneType"):
        bl.Classifier(BASE, SITES, lambda sites: None, label_ids=(3, 5)).prior()

    def transposed(sites):
        return {n: {f: jnp.zeros(s[::-1]) for f, s in site.shapes.items()} for n, site in sites.items()}

    with pytest.raises(
        ValueError, match=r"factor 'a' of 'q_proj' needs shape \(2, 2, 16\), layer axis first"
    ):
        bl.Classifier(BASE, SITES, transposed, label_ids=(3, 5)).prior()
