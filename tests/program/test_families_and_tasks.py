"""Every family of decoders: words, completions and texts are read from the logits of the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.special
from builders.families import base_of, reference
from builders.thorough import sample_of

import bnlora as bl
from bnlora.data.batch import Choices

KEY = jax.random.key(0)
ROWS, CHOICES, LENGTH, SPAN = 2, 3, 12, 3
WORDS = (3, 5)


@pytest.mark.parametrize("family", sample_of(reference.FAMILIES, ["qwen2"]))
def test_words_completions_and_texts_are_read_from_the_logits(family):
    base = base_of(family)
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, base.config.vocab_size, (ROWS, CHOICES, LENGTH)))
    mask = jnp.asarray(np.arange(LENGTH) >= random.integers(0, 4, (ROWS, CHOICES))[..., None])
    scored = jnp.broadcast_to(jnp.arange(LENGTH) >= LENGTH - SPAN, tokens.shape)
    choices = Choices(scored, jnp.ones((ROWS, CHOICES)), SPAN)
    labels = jnp.zeros(ROWS, int)
    batches = {
        "completions": bl.Batch(tokens, mask, labels, choices=choices),
        "texts": bl.Batch(
            tokens[:, :1], mask[:, :1], labels, choices=Choices(scored[:, :1], jnp.ones((ROWS, 1)), SPAN)
        ),
        "words": bl.Batch(tokens[:, 0], mask[:, 0], labels),
    }
    likelihoods = {
        "completions": bl.likelihoods.Completions(CHOICES),
        "texts": bl.likelihoods.Texts(),
        "words": bl.likelihoods.Words(WORDS),
    }
    sites = bl.select(base, ["v_proj"], rank=2, layers=slice(-1, None))
    models = {n: bl.Classifier(base, sites, bl.priors.normal(), likelihood=x) for n, x in likelihoods.items()}
    adapters = numpyro.handlers.seed(models["words"].prior, KEY)()
    placed = sites.place(adapters, first_layer=0)
    flat = tokens.reshape(-1, LENGTH), mask.reshape(-1, LENGTH)
    logits = np.asarray(jax.jit(lambda *rows: base.module(*rows, adapters=placed))(*flat))
    log_probs = scipy.special.log_softmax(logits, axis=-1).reshape(ROWS, CHOICES, LENGTH, -1)
    own = np.take_along_axis(log_probs[..., :-1, :], np.asarray(tokens)[..., 1:, None], axis=-1)[..., 0]
    scores = own[..., -SPAN:].sum(-1)
    last = logits.reshape(ROWS, CHOICES, LENGTH, -1)[:, 0, -1]
    expected = {"completions": scores, "texts": scores[:, :1], "words": last[:, list(WORDS)]}
    for name, model in models.items():
        got = jax.jit(model.logits)(base.weights, adapters, model.prepare(batches[name]))
        np.testing.assert_allclose(got, expected[name], rtol=1e-4, atol=2e-4)
