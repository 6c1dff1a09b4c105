"""The classifier as a NumPyro model, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

BASE = tiny_base(jax.random.key(0), num_layers=2)
ROWS = tiny_rows(jax.random.key(1), 6)
SITES = bl.select(BASE, ["q_proj", "lm_head"], rank=2)


def test_it_is_a_plain_numpyro_model():
    """log_density of NumPyro: prior plus log-likelihood, scaled by N / B through the one plate."""
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
    trace = handlers.trace(handlers.seed(model, jax.random.key(2))).get_trace(BASE.params, ROWS)
    latent = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    prior = sum(s["fn"].log_prob(s["value"]).sum() for n, s in trace.items() if n in latent)
    adapters = handlers.substitute(model.prior, latent)()
    log_probs = jax.nn.log_softmax(model.logits(BASE.params, adapters, ROWS))
    likelihood = np.asarray(log_probs)[np.arange(6), np.asarray(ROWS.labels)].sum()
    whole, _ = log_density(model, (BASE.params, ROWS), {}, latent)
    np.testing.assert_allclose(whole, prior + likelihood, rtol=1e-5)
    seeded = handlers.seed(model, jax.random.key(3))
    part, _ = log_density(seeded, (BASE.params, ROWS, 60), {}, latent)
    np.testing.assert_allclose(part, prior + 10 * likelihood, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_batch_is_no_larger_than_the_data_set(rows):
    """One row would else be broadcast over a data set of none."""
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
    with pytest.raises(ValueError, match=f"n_total must be at least the {rows} rows of the batch; got 0"):
        handlers.seed(model, jax.random.key(3))(BASE.params, ROWS[:rows], 0)


def test_a_head_is_read_in_its_label_rows_alone():
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5, 9))
    assert model.sites["lm_head"].shapes["b"] == (1, 3, 2)
    assert "3 classes" in repr(model)


@pytest.mark.parametrize("ids", [(3,), (3, 3), ()])
def test_label_ids_must_be_two_different_tokens(ids):
    with pytest.raises(ValueError, match="at least two different token ids; got"):
        bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=ids)


def test_a_prior_that_returns_something_else_is_named():
    with pytest.raises(ValueError, match="a prior must return adapters by family; got NoneType"):
        bl.Classifier(BASE, SITES, lambda sites: None, label_ids=(3, 5)).prior()

    def transposed(sites):
        return {n: {f: jnp.zeros(s[::-1]) for f, s in site.shapes.items()} for n, site in sites.items()}

    with pytest.raises(
        ValueError, match=r"factor 'a' of 'q_proj' needs shape \(2, 2, 16\), layer axis first"
    ):
        bl.Classifier(BASE, SITES, transposed, label_ids=(3, 5)).prior()
