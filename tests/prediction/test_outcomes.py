"""Predictions of values and texts, and their scores, against closed forms and large samples."""

import jax
import numpy as np
import numpyro
import pytest
import scipy.stats
from datasets import Dataset

import bnlora as bl

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(2)
LOCATIONS, SCALES = RANDOM.normal(0, 2, (5, 4)), RANDOM.uniform(0.5, 2.0, (5, 4))
NORMAL = bl.ValuePrediction(LOCATIONS, SCALES)
STUDENT = bl.ValuePrediction(LOCATIONS, SCALES, "student_t", 5.0)
SIZE = 200_000


def sample(prediction: bl.ValuePrediction) -> np.ndarray:
    """A large sample of the mixture of each row."""
    part = RANDOM.integers(0, 5, (SIZE, 4))
    noise = scipy.stats.norm if prediction.noise == "normal" else scipy.stats.t(prediction.df)
    standard = noise.rvs(size=(SIZE, 4), random_state=3)
    return np.take_along_axis(LOCATIONS, part, 0) + np.take_along_axis(SCALES, part, 0) * standard


@pytest.mark.parametrize("prediction", [NORMAL, STUDENT], ids=["normal", "student"])
def test_moments_and_probabilities_are_those_of_a_sample(prediction):
    values = sample(prediction)
    error = prediction.sd / SIZE**0.5
    np.testing.assert_array_less(np.abs(values.mean(0) - prediction.mean), 5 * error)
    np.testing.assert_allclose(values.std(0), prediction.sd, rtol=0.03)
    at = np.array([-2.0, 0.0, 1.0, 3.0])
    np.testing.assert_array_less(np.abs((values <= at).mean(0) - prediction.cdf(at)), 5 * 0.5 / SIZE**0.5)
    step = 1e-4
    slope = (prediction.cdf(at + step) - prediction.cdf(at - step)) / (2 * step)
    np.testing.assert_allclose(np.exp(prediction.log_density(at)), slope, rtol=1e-5)


@pytest.mark.parametrize("level", [0.01, 0.5, 0.95])
def test_quantiles_invert_the_distribution_function(level):
    for prediction in (NORMAL, STUDENT):
        np.testing.assert_allclose(prediction.cdf(prediction.quantile(level)), level, atol=1e-9)
    np.testing.assert_allclose(NORMAL.interval(0.9), [NORMAL.quantile(0.05), NORMAL.quantile(0.95)])


def test_crps_is_that_of_a_normal():
    """Gneiting and Raftery (2007), equation 21."""
    scales = np.array([0.5, 1.0, 2.0])
    prediction = bl.ValuePrediction(np.zeros((1, 3)), scales[None])
    values = np.array([0.1, -1.5, 3.0])
    z = values / scales
    norm = scipy.stats.norm
    expected = scales * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - np.pi**-0.5)
    np.testing.assert_allclose(bl.metrics.crps(prediction, values), expected, rtol=5e-3)


def test_scores_of_values():
    values = np.array([0.0, 1.0, -3.0, 0.5])
    prediction = bl.ValuePrediction(np.zeros((1, 4)), np.ones((1, 4)))
    summary = bl.metrics.value_summary(KEY, prediction, values, num_resamples=50)
    assert summary["nll"].value == pytest.approx(-scipy.stats.norm.logpdf(values).mean())
    assert summary["rmse"].value == pytest.approx((values**2).mean() ** 0.5)
    assert summary["mae"].value == pytest.approx(np.abs(values).mean(), abs=1e-6)
    assert (summary["coverage_50"].value, summary["coverage_90"].value) == (0.5, 0.75)
    assert summary["nll"].low < summary["nll"].value < summary["nll"].high
    with pytest.raises(ValueError, match=r"one finite value for each of 4 rows; got \(3,\)"):
        bl.metrics.value_summary(KEY, prediction, values[:3])


def test_the_probability_of_a_text_is_the_mean_over_draws():
    by_draw = np.log([[0.1, 0.2], [0.3, 0.6]])
    prediction = bl.TextPrediction(by_draw, np.array([3.0, 2.0]))
    np.testing.assert_allclose(np.exp(prediction.log_likelihood), [0.2, 0.4])
    nll = -np.log([0.2, 0.4]).sum() / 5
    assert prediction.nll_per_token == pytest.approx(nll)
    summary = bl.metrics.text_summary(KEY, prediction, num_resamples=20)
    assert summary["perplexity"].value == pytest.approx(np.exp(nll))


def test_prediction_of_texts_is_that_of_the_whole_model(tiny_folder):
    """Prompts are read and not scored; rows differ in length."""
    base = bl.load(tiny_folder)
    table = Dataset.from_dict({"q": ["the film", "a"], "text": [" was good", " plot is bad bad"]})
    data = bl.language_modelling(table, base, text="text", prompt="q")
    sites = bl.select(base, ["v_proj"], rank=1)
    model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=bl.likelihoods.Texts())
    adapters = numpyro.handlers.seed(model.prior, KEY)()
    prediction = bl.predict_texts(KEY, bl.PointPosterior(model, adapters), data.train, num_draws=1)
    assert list(prediction.num_tokens) == [len(base.tokenizer(t)["input_ids"]) for t in table["text"]]
    for row, (prompt, text) in enumerate(zip(table["q"], table["text"], strict=True)):
        ids = np.array(base.tokenizer(prompt + text)["input_ids"])[None]
        logits = base.module(ids, adapters=sites.place(adapters, first_layer=0))
        log_probs = np.asarray(jax.nn.log_softmax(logits))[0, :-1]
        own = log_probs[np.arange(len(ids[0]) - 1), ids[0, 1:]][-int(prediction.num_tokens[row]) :]
        assert prediction.log_likelihood[row] == pytest.approx(own.sum(), abs=1e-4)
