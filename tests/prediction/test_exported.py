"""Export of posteriors for peft: the mean update, draws, cards, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.prediction.exported import mean_update
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=3)
ROWS = tiny_rows(jax.random.key(2), 12)
IDS = (3, 5)


def drawn(sites, count: int) -> dict:
    """Random draws whose mean has the rank of the draws together."""
    keys = jax.random.split(KEY, len(sites))
    return {
        name: {
            f: jax.random.normal(jax.random.fold_in(key, i), (count, *shape))
            for i, (f, shape) in enumerate(site.shapes.items())
        }
        for key, (name, site) in zip(keys, sites.items(), strict=True)
    }


def update(site, pair) -> np.ndarray:
    return site.scale * np.einsum("...or,...ri->...oi", *(np.asarray(pair[f], np.float64) for f in "ba"))


def test_the_mean_is_the_best_approximation_of_the_mean_update_at_the_rank():
    sites = bl.select(BASE, ["q_proj", "down_proj"], rank=2, alpha=3.0)
    draws = drawn(sites, 5)
    mean, retained = mean_update(sites, draws)
    for name, site in sites.items():
        exact = update(site, draws[name]).mean(0)
        u, d, vt = np.linalg.svd(exact)
        best = np.einsum("lor,lr,lri->loi", u[:, :, :2], d[:, :2], vt[:, :2])
        np.testing.assert_allclose(update(site, mean[name]), best, atol=1e-5)
        assert retained[name] == pytest.approx((d[:, :2] ** 2).sum() / (d**2).sum(), rel=1e-5)


def test_a_mean_of_low_rank_is_exact_and_a_point_stays_as_it_is():
    sites = bl.select(BASE, ["q_proj"], rank=4)
    draws = drawn(sites, 2)
    a = draws["q_proj"]["a"]
    shared = {"q_proj": {"a": jnp.broadcast_to(a[:1], a.shape), "b": draws["q_proj"]["b"]}}
    mean, retained = mean_update(sites, shared)
    assert retained["q_proj"] == pytest.approx(1.0)
    exact = update(sites["q_proj"], shared["q_proj"]).mean(0)
    np.testing.assert_allclose(update(sites["q_proj"], mean["q_proj"]), exact, atol=1e-5)
    point = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), draws)
    same, _ = mean_update(sites, point)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), same, point)


@pytest.fixture(scope="module")
def fit() -> bl.Fit:
    """A fit with the head, whose adapter has only the rows of the label words."""
    sites = bl.select(BASE, {"v_proj": 2, "lm_head": 1})
    model = bl.Classifier(BASE, sites, bl.priors.normal(), label_ids=IDS)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    return bl.fit(KEY, model, guide, ROWS, optax.adam(0.05), num_steps=20, batch_size=6)


@pytest.mark.slow
def test_draws_predict_as_the_posterior_does(fit, tmp_path):
    """Each draw is read back with all rows of the head, and has the probabilities of its draw."""
    export = bl.export_peft(KEY, fit, tmp_path, num_draws=3, mean_of=8, data=ROWS)
    expected = bl.PointPosterior  # one draw at a time
    draws = fit.draw_adapters(KEY, 8)
    for index, folder in enumerate(export.draws):
        imported = bl.load_peft_posterior(folder, BASE, label_ids=IDS)
        own = expected(fit.model, jax.tree.map(lambda x, i=index: x[i], draws))
        got, want = (bl.predict(KEY, p, ROWS, num_draws=1).log_probs for p in (imported, own))
        np.testing.assert_allclose(got, want, atol=1e-5)
    mean = bl.load_peft_posterior(export.mean, BASE, label_ids=IDS)
    nll = bl.metrics.nll(bl.predict(KEY, mean, ROWS, num_draws=1), ROWS)
    assert export.nll["mean"] == pytest.approx(nll, abs=1e-5)
    posterior = bl.metrics.nll(bl.predict(KEY, fit, ROWS, num_draws=8), ROWS)
    assert export.nll["posterior"] == pytest.approx(posterior, abs=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: random" in card
    assert "`draw-000` to `draw-002` are draws" in card
    assert f"- mean: {nll:.4f}" in card
    assert "lm_head" in card


@pytest.mark.slow
def test_of_a_tangent_posterior_only_the_mean_is_written(tmp_path):
    core = bl.fit_core(KEY, BASE, ROWS, label_ids=IDS, num_steps=4)
    with pytest.raises(ValueError, match="of a tangent posterior only the mean can be exported, with `data`"):
        bl.export_peft(KEY, core, tmp_path, num_draws=1, data=ROWS)
    with pytest.raises(ValueError, match="of a tangent posterior only the mean can be exported"):
        bl.export_peft(KEY, core, tmp_path)
    export = bl.export_peft(KEY, core, tmp_path, mean_of=50, data=ROWS)
    imported = bl.load_peft_posterior(export.mean, BASE, label_ids=IDS)
    nll = bl.metrics.nll(bl.predict(KEY, imported, ROWS, num_draws=1), ROWS)
    assert export.nll["mean"] == pytest.approx(nll, abs=1e-4)
    assert min(export.retained.values()) > 0.999  # one frame for all draws, so the mean has its rank
    assert "runs in the network, another model" in (tmp_path / "README.md").read_text()


def test_numbers_out_of_range_are_refused(fit, tmp_path):
    with pytest.raises(ValueError, match="num_draws must be at least 0; got -1"):
        bl.export_peft(KEY, fit, tmp_path, num_draws=-1)
    with pytest.raises(ValueError, match="mean_of must be at least 1; got 0"):
        bl.export_peft(KEY, fit, tmp_path, mean_of=0)
