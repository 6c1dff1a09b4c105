"""The posterior of one point: its checks, and an imported adapter that is predicted at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS = tiny_rows(jax.random.key(2), 6)
SITES = bl.select(BASE, ["q_proj", "lm_head"], rank=2)
MODEL = bl.Classifier(BASE, SITES, bl.priors.point(), label_ids=(3, 5))


def random_adapters(sites, seed=0):
    stream = np.random.default_rng(seed)
    shapes = {name: site.shapes for name, site in sites.items()}
    return {
        n: {f: jnp.asarray(stream.normal(size=s), jnp.float32) for f, s in x.items()}
        for n, x in shapes.items()
    }


def test_an_imported_adapter_is_predicted_as_the_network_with_it(tmp_path):
    """Written and read as peft's: rows of the label words are taken out of the whole head."""
    whole = random_adapters(SITES)
    bl.save_peft(whole, tmp_path, sites=SITES, base=BASE)
    point = bl.PointPosterior(MODEL, bl.load_peft(tmp_path, MODEL.sites, head_rows=MODEL.label_ids))
    prediction = bl.predict(KEY, point, ROWS, num_draws=2)
    rows = whole | {"lm_head": {"a": whole["lm_head"]["a"], "b": whole["lm_head"]["b"][:, np.array([3, 5])]}}
    expected = jax.nn.log_softmax(MODEL.logits(BASE.weights, rows, ROWS))
    np.testing.assert_allclose(prediction.draw_log_probs, np.stack([expected] * 2), atol=1e-5)
    np.testing.assert_allclose(prediction.mutual_information, 0, atol=1e-7)


def test_the_untouched_base_predicts_as_it_does_without_adapters():
    """Against the full forward pass of the base, whose head has all tokens."""
    prediction = bl.predict(KEY, bl.PointPosterior.untouched(MODEL), ROWS, num_draws=1)
    logits = jax.jit(lambda weights, batch: BASE.bind(weights)(batch.tokens, batch.mask))(BASE.weights, ROWS)
    last = np.asarray(ROWS.mask).sum(1) - 1
    whole = np.asarray(logits)[np.arange(len(ROWS)), last][:, np.array([3, 5])]
    np.testing.assert_allclose(prediction.log_probs, jax.nn.log_softmax(whole), atol=1e-5)


def test_adapters_of_other_sites_are_refused():
    good = random_adapters(MODEL.sites)
    wide = random_adapters(SITES)
    none = {name: pair for name, pair in good.items() if name != "q_proj"}
    for adapters, said in [
        (wide, r"expected for 'lm_head.b' \(1, 2, 2\), got \(1, 40, 2\)"),
        (none, r"expected for 'q_proj.a' \(2, 2, 16\), got no such factor"),
        (good | {"k_proj": good["q_proj"]}, r"for 'k_proj.a' no such factor, got \(2, 2, 16\)"),
        (bl.PointPosterior(MODEL, good), "expected adapters by family, .*; got a PointPosterior"),
    ]:
        with pytest.raises(ValueError, match=said):
            bl.PointPosterior(MODEL, adapters)
