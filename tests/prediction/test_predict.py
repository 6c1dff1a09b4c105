"""Prediction: one definition for any number of draws, streamed over rows, and its summaries."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.prediction.predict import Prediction, predict_with_draws
from bnlora.program.draws import draw_adapters
from bnlora.program.model import Classifier
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1))
ROWS = tiny_rows(jax.random.key(2), 11)
IDS = (3, 5, 8)


def classifier(prior, targets=("q_proj", "lm_head")):
    return Classifier(BASE, bl.select(BASE, targets, rank=2, layers=[1, 3]), prior, label_ids=IDS)


@pytest.fixture(scope="module")
def fit():
    model = classifier(bl.priors.sparse_gp(rows=2, cols=2))
    train = replace(ROWS, labels=ROWS.labels + 1)
    guide = bl.guides.SiteFlow(model.prior, hidden=4, blocks=1, lam_init=0.5)
    return bl.fit(KEY, model, guide, train, optax.adam(1e-2), num_steps=3, batch_size=4)


def softmax_by_hand(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def test_zero_adapters_give_the_base_models_own_label_probabilities():
    """Against the module's full forward pass: last real token, label tokens, softmax."""
    model = classifier(bl.priors.point())
    zeros = {n: {f: jnp.zeros(s) for f, s in site.shapes.items()} for n, site in model.sites.items()}
    got = jax.jit(model.logits)(BASE.weights, zeros, ROWS)
    run = jax.jit(lambda weights, tokens, mask: BASE.bind(weights)(tokens, mask))
    full = np.asarray(run(BASE.weights, ROWS.tokens, ROWS.mask))
    for row, mask in enumerate(np.asarray(ROWS.mask)):
        expected = full[row, mask.sum() - 1, IDS]
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_left_padding_gives_the_same_logits():
    model = classifier(bl.priors.point())
    adapters = {
        n: {f: 0.3 * jax.random.normal(KEY, s) for f, s in site.shapes.items()}
        for n, site in model.sites.items()
    }
    shift = np.asarray(ROWS.mask.shape[1] - ROWS.mask.sum(1))
    tokens, mask = (
        jnp.asarray(np.stack([np.roll(x, k) for x, k in zip(np.asarray(rows), shift, strict=True)]))
        for rows in (ROWS.tokens, ROWS.mask)
    )
    logits = jax.jit(model.logits)
    right, rolled = (
        logits(BASE.weights, adapters, rows) for rows in (ROWS, replace(ROWS, tokens=tokens, mask=mask))
    )
    np.testing.assert_allclose(right, rolled, atol=1e-5)


def test_label_rows_of_the_head_are_exactly_those_of_the_whole_head():
    model = classifier(bl.priors.point())
    whole = bl.select(BASE, ["lm_head"], rank=2)["lm_head"].shapes["b"]
    b = jax.random.normal(KEY, whole)
    adapters = {
        n: {f: jax.random.normal(jax.random.key(i), s) for f, s in site.shapes.items()}
        for i, (n, site) in enumerate(model.sites.items())
    }
    adapters["lm_head"]["b"] = b[:, jnp.asarray(IDS)]

    @jax.jit
    def both(weights):
        hidden = model.hidden(weights, ROWS)
        placed = model.sites.place(adapters)
        placed.pop(HEAD)
        module = BASE.bind(weights)
        top = module.blocks(hidden, ROWS.mask, first_layer=1, stop=4, adapters=placed)
        last = jnp.take_along_axis(top, (ROWS.mask.sum(1) - 1)[:, None, None], axis=1)[:, 0]
        full = module.head(last, adapter={"a": adapters["lm_head"]["a"][0], "b": b[0]})
        return model.logits(weights, adapters, ROWS), full[:, jnp.asarray(IDS)]

    np.testing.assert_allclose(*both(BASE.weights), atol=1e-5)


@pytest.mark.slow
def test_mixture_of_softmaxes_by_hand(fit):
    draws = draw_adapters(KEY, fit.model, fit.guide, fit.params, 3)
    prediction = bl.predict(KEY, fit, ROWS, num_draws=3, batch_size=4)
    one = lambda s: jax.tree.map(lambda x: x[s], draws)  # noqa: E731
    logits = jax.jit(fit.model.logits)
    by_hand = np.mean([softmax_by_hand(logits(BASE.weights, one(s), ROWS)) for s in range(3)], 0)
    np.testing.assert_allclose(prediction.probs, by_hand, atol=1e-6)
    np.testing.assert_allclose(prediction.probs.sum(1), 1, atol=1e-6)
    labels = np.asarray(ROWS.labels)
    nll = -np.log(by_hand[np.arange(11), labels]).mean()
    np.testing.assert_allclose(bl.metrics.nll(prediction.log_probs, labels), nll, atol=1e-6)


def test_rows_at_a_time_do_not_matter(fit):
    few, all_ = (bl.predict(KEY, fit, ROWS, num_draws=2, batch_size=size) for size in (3, 32))
    np.testing.assert_allclose(few.draw_log_probs, all_.draw_log_probs, atol=1e-5)


@pytest.mark.slow
def test_without_spread_one_draw_is_the_deterministic_prediction(fit):
    """lam = s = 0: every number of draws has the negative log-likelihood of the plain adapter."""
    still = {
        n: jnp.full_like(x, 1e-12) if n.endswith((".lam", ".q.scale")) else x for n, x in fit.params.items()
    }
    still = replace(fit, params=still)
    labels = np.asarray(ROWS.labels)
    losses = [
        bl.metrics.nll(bl.predict(jax.random.key(k), still, ROWS, num_draws=s).log_probs, labels)
        for k, s in [(1, 1), (2, 1), (3, 5)]
    ]
    adapters = jax.tree.map(lambda x: x[0], draw_adapters(KEY, fit.model, fit.guide, still.params, 1))
    probs = softmax_by_hand(jax.jit(fit.model.logits)(BASE.weights, adapters, ROWS))
    deterministic = -np.log(probs[np.arange(11), labels]).mean()
    np.testing.assert_allclose(losses, deterministic, atol=1e-5)


def test_point_estimate_has_equal_draws():
    model = classifier(bl.priors.point())
    guide = bl.guides.SiteFlow(model.prior)
    fit = bl.fit(KEY, model, guide, ROWS, optax.adam(1e-2), num_steps=2, batch_size=4)
    prediction = bl.predict(KEY, fit, ROWS, num_draws=3)
    np.testing.assert_array_equal(prediction.draw_log_probs[0], prediction.draw_log_probs[2])
    np.testing.assert_allclose(prediction.mutual_information, 0, atol=1e-7)


@pytest.mark.slow
def test_stderr_is_the_spread_of_the_mixture_over_repeats(fit):
    keys = jax.random.split(jax.random.key(7), 60)
    runs = [bl.predict(k, fit, ROWS[:2], num_draws=20, batch_size=2) for k in keys]
    spread = np.std([run.probs for run in runs], axis=0, ddof=1)
    stated = np.sqrt(np.mean([run.stderr**2 for run in runs], axis=0))
    # A standard deviation over 60 repeats has a relative standard error of about 1 / sqrt(2 * 59) = 0.092.
    np.testing.assert_allclose(spread, stated, rtol=4 * 0.092)


def test_uncertainties_by_hand():
    log_probs = np.log([[[0.9, 0.1]], [[0.1, 0.9]]])
    prediction = Prediction(log_probs)
    binary = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(prediction.entropy, np.log(2))
    np.testing.assert_allclose(prediction.mutual_information, np.log(2) - binary)
    np.testing.assert_allclose(prediction.stderr, np.std([0.9, 0.1], ddof=1) / 2**0.5)
    assert np.isnan(Prediction(log_probs[:1]).stderr).all()
    assert "1 rows, 2 classes, 2 draws" in repr(prediction)


def test_rows_of_a_prediction_have_their_own_probabilities():
    probs = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 4))
    prediction, mask = Prediction(np.log(probs)), np.array([True, False, True, False])
    assert len(prediction) == 4
    for chosen, rows in ((slice(1, 3), [1, 2]), ([3, -4], [3, 0]), (mask, [0, 2])):
        np.testing.assert_allclose(prediction[chosen].probs, probs.mean(0)[rows])
        assert len(prediction[chosen].draw_log_probs) == 2


@pytest.mark.parametrize("rows", [4, [4], [True, False]])
def test_rows_that_a_prediction_does_not_have(rows):
    with pytest.raises(ValueError, match="rows"):
        Prediction(np.log(np.full((2, 4, 2), 0.5)))[rows]


def test_certain_probabilities_have_no_entropy():
    prediction = Prediction(np.array([[[0.0, -np.inf]]]))
    np.testing.assert_array_equal(prediction.entropy, 0)
    np.testing.assert_array_equal(prediction.mutual_information, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], r"the labels of the predicted rows must be in 0..1; got -1..0 \(-1 marks rows without"),
        ([[0], [1]], r"need one label each, shape \(2,\); got shape \(2, 1\); pass labels\[:, 0\]"),
        ([" good", " bad"], "must be class numbers, integers; got ' good'"),
    ],
)
def test_labels_of_a_prediction_are_class_numbers(labels, message):
    """A label of -1 would be read as the last class."""
    prediction = Prediction(np.log([[[0.9, 0.1], [0.2, 0.8]]]))
    np.testing.assert_allclose(np.exp(prediction.log_probs_of([0, 1])), [[0.9, 0.8]])
    with pytest.raises(ValueError, match=message):
        prediction.log_probs_of(labels)


def test_draws_given_by_hand(fit):
    draws = draw_adapters(KEY, fit.model, fit.guide, fit.params, 2)
    same = predict_with_draws(fit.model, draws, ROWS)
    drawn = bl.predict(KEY, fit, ROWS, num_draws=2)
    np.testing.assert_allclose(same.draw_log_probs, drawn.draw_log_probs, atol=1e-6)


@pytest.mark.parametrize("changes", [{"num_draws": 0}, {"batch_size": 0}, {"draws_together": 0}])
def test_bad_input(fit, changes):
    with pytest.raises(ValueError, match="must be at least 1; got 11 rows"):
        bl.predict(KEY, fit, ROWS, **changes)
    with pytest.raises(ValueError, match="got 0 rows"):
        bl.predict(KEY, fit, ROWS[:0])


@pytest.mark.parametrize("together", [2, 4])
def test_draws_that_run_together_give_the_same_predictions(fit, together):
    alone = bl.predict(KEY, fit, ROWS, num_draws=5)
    got = bl.predict(KEY, fit, ROWS, num_draws=5, draws_together=together)
    np.testing.assert_allclose(got.draw_log_probs, alone.draw_log_probs, atol=1e-5)


def test_equal_draws_are_predicted_once(fit, monkeypatch):
    """A point has as many rows of draws as asked for, from one pass of the network."""
    point = bl.PointPosterior(fit.model, jax.tree.map(lambda x: x[0], fit.draw_adapters(KEY, 1)))
    counts = []
    run = type(fit.model).compiled_outputs

    def counted(model, adapters, count, *args):
        counts.append(count)
        return run(model, adapters, count, *args)

    monkeypatch.setattr(type(fit.model), "compiled_outputs", counted)
    several = bl.predict(KEY, point, ROWS, num_draws=5, batch_size=len(ROWS))
    assert counts == [1]
    single = bl.predict(KEY, point, ROWS, num_draws=1, batch_size=len(ROWS))
    np.testing.assert_array_equal(several.draw_log_probs, np.repeat(single.draw_log_probs, 5, axis=0))
