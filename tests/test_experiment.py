"""The comparison and its report on a tiny model."""

import re

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import bnlora as bl
from bnlora import plots
from bnlora.demo import demo_page
from bnlora.display import Table
from bnlora.experiment import BAYES, EARLY, LORA, compare
from bnlora.predict import Prediction
from bnlora.recipe import Recipe, Schedule
from bnlora.report import page
from bnlora.testing import tiny_base, tiny_rows
from bnlora.text import TextData

RECIPE = Recipe((" bad", " good"), targets=("lm_head",), top_layers=1, rank=2, inducing=2)
SCHEDULES = {LORA: Schedule(9, 8, 0.05), BAYES: Schedule(9, 8, 0.02)}


@pytest.fixture(scope="module")
def comparison():
    base = tiny_base(jax.random.key(0), num_layers=2)
    sizes = {"train": 24, "validation": 12, "near": 20, "far": 16}
    splits = {n: tiny_rows(jax.random.key(i), size) for i, (n, size) in enumerate(sizes.items())}
    data = TextData(splits, RECIPE.words, np.array([3, 5]))
    return compare(base, data, RECIPE, SCHEDULES, num_samples=4)


def test_methods_share_adapters_and_rows(comparison):
    plain, bayes = comparison.fits[LORA], comparison.fits[BAYES]
    assert plain.model.sites == bayes.model.sites
    np.testing.assert_array_equal(plain.train.tokens, bayes.train.tokens)
    assert not plain.history["inducing_kl"].any()
    assert bayes.history["inducing_kl"].all()


def test_early_stopping_is_the_same_fit_at_its_best_step(comparison):
    plain, early = comparison.fits[LORA], comparison.fits[EARLY]
    jax.tree.map(np.testing.assert_array_equal, plain.params, plain.last_params)
    np.testing.assert_array_equal(plain.history["elbo"], early.history["elbo"])
    assert early.best_step == early.validation["step"][np.argmin(early.validation["nll"])]


def test_every_method_predicts_every_test_set(comparison):
    draws = {m: {n: len(p.draw_log_probs) for n, p in by.items()} for m, by in comparison.predictions.items()}
    assert draws == {m: dict.fromkeys(("near", "far"), 4 if m == BAYES else 1) for m in (LORA, EARLY, BAYES)}


def test_tables_show_the_metrics_of_the_predictions(comparison):
    scores = comparison.scores
    assert len(scores.rows) == 6
    labels = comparison.labels["far"]
    nll = {m: bl.metrics.nll(comparison.predictions[m]["far"].log_probs, labels) for m in (LORA, BAYES)}
    shown = {row[1]: row for row in scores.rows[3:]}
    assert shown[BAYES][3].startswith(f"{nll[BAYES]:.3f}\n")
    difference = comparison.differences.rows[2]
    assert difference[:2] == ("far", LORA)
    assert difference[3].startswith(f"{nll[BAYES] - nll[LORA]:+.3f}\n")
    costs = {row[0]: row for row in comparison.costs.rows}
    assert costs[LORA][1] == f"{comparison.fits[LORA].num_parameters:,}"
    assert costs[LORA][3] == "1.00"


def test_report_stands_alone(comparison):
    html = demo_page(comparison, "bnlora demo --seed 0")
    assert html.count("<table>") == 3
    assert html.count("data:image/png;base64,") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "bnlora demo --seed 0" in html
    assert "restricts the variational family" in html


def test_reliability_panels_show_the_error_that_the_metric_has():
    random = np.random.default_rng(0)
    probs = random.dirichlet([1, 1], 300)
    labels = (random.random(300) > probs[:, 0]).astype(int)
    prediction = Prediction(np.log(probs)[None])
    figure = plots.reliability({"method": {"rows": prediction}}, {"rows": labels})
    (axes,) = figure.axes
    assert axes.get_title() == f"method, rows\nECE {bl.metrics.ece(np.log(probs), labels):.3f}"
    curve = bl.metrics.reliability(prediction, labels)
    np.testing.assert_allclose(axes.lines[1].get_xydata(), np.stack([curve.confidence, curve.accuracy], 1))


def test_curves_of_the_objective_are_the_history(comparison):
    figure = plots.elbo({BAYES: comparison.fits[BAYES]})
    bound, data, divergences = figure.axes
    np.testing.assert_array_equal(bound.lines[0].get_ydata(), comparison.fits[BAYES].history["elbo"])
    np.testing.assert_array_equal(data.lines[0].get_ydata(), comparison.fits[BAYES].history["data"])
    assert len(divergences.lines) == 4
    smooth = bound.lines[1].get_ydata()
    np.testing.assert_allclose(smooth[-1], comparison.fits[BAYES].history["elbo"][-15:].mean())


def test_pages_escape_their_text():
    html = page("a < b", ["# one & two", "x > y", Table("t", ("h",), (("<c>",),)), (Figure(), 'say "so"')])
    for piece in (
        "<h1>a &lt; b</h1>",
        "<h2>one &amp; two</h2>",
        "<p>x &gt; y</p>",
        "&lt;c&gt;",
        "&quot;so&quot;",
    ):
        assert piece in html
