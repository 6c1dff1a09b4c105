"""The comparison of methods and its report on a tiny model."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import bnlora as bl
from bnlora import plots
from bnlora._util.display import Table
from bnlora.app import experiment, results
from bnlora.app.demo import demo_page, demo_tables
from bnlora.app.experiment import BASE, BAYES, CAREFUL, LORA, NUTS, compare
from bnlora.app.outcome import comparison_result
from bnlora.app.report import page
from bnlora.prediction.predict import Prediction
from bnlora.testing import tiny_base, tiny_rows

METHODS = (BASE, LORA, CAREFUL, BAYES, NUTS)


@pytest.fixture(scope="module")
def comparison():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "TARGETS", ("v_proj", "lm_head"))
        patch.setattr(experiment, "RANK", 2)
        patch.setattr(
            experiment, "NUTS_OPTIONS", {"num_warmup": 50, "num_draws": 40, "target_acceptance": 0.8}
        )
        patch.setattr(experiment, "SiteFlow", partial(bl.guides.SiteFlow, hidden=4, blocks=1))
        base = tiny_base(jax.random.key(0), num_layers=1)
        tests = {
            n: tiny_rows(jax.random.key(i), size) for i, (n, size) in enumerate((("near", 20), ("far", 16)))
        }
        train = tiny_rows(jax.random.key(5), 36)
        return compare(
            jax.random.key(0), base, train, tests, label_ids=(3, 5), held_out=12, epochs=2, num_draws=4
        )


@pytest.mark.slow
def test_every_method_predicts_every_test_set(comparison):
    draws = {m: {n: len(p.draw_log_probs) for n, p in by.items()} for m, by in comparison.predictions.items()}
    assert draws == {m: dict.fromkeys(("near", "far"), 4 if m in (BAYES, NUTS) else 1) for m in METHODS}


@pytest.mark.slow
def test_the_base_predicts_like_a_model_with_zero_adapters(comparison):
    model = comparison.core.model.network
    rows = tiny_rows(jax.random.key(1), 16)
    zero = {
        n: {f: np.zeros((1, *s), np.float32) for f, s in site.shapes.items()}
        for n, site in model.sites.items()
    }
    expected = np.asarray(model.outputs_by_draw(model.base.weights, zero, rows))[0]
    np.testing.assert_allclose(comparison.predictions[BASE]["far"].log_probs, expected, atol=1e-5)


@pytest.mark.slow
def test_methods_share_their_labelled_rows(comparison):
    assert len(comparison.lora.train) == 24
    assert len(comparison.core.fit.train) == 36
    np.testing.assert_array_equal(comparison.core.fit.train.tokens[:24], comparison.lora.train.tokens)


@pytest.mark.slow
def test_careful_lora_is_the_best_step_of_the_same_fit_with_a_temperature(comparison):
    fit = comparison.lora
    assert fit.best_step == fit.validation["step"][np.argmin(fit.validation["nll"])]
    plain, careful = (comparison.predictions[m]["far"] for m in (LORA, CAREFUL))
    assert plain.draw_log_probs.shape == careful.draw_log_probs.shape


@pytest.mark.slow
def test_chains_and_fit_have_the_same_posterior(comparison):
    assert comparison.chains.model is comparison.core.model
    assert comparison.core.model.kind == "tangent"
    assert comparison.core.scales.values.keys() == {"q_proj", "k_proj", "v_proj", "slope"}
    # The default sizes 8, 8 and 32, limited by the sides of this base: 8 outputs of k and v.
    inputs = {name: frame.size[2] for name, frame in comparison.core.frames.items()}
    assert inputs == {"q_proj": 8, "k_proj": 8, "v_proj": 8, "slope": 1}


@pytest.mark.slow
def test_tables_show_the_metrics_of_the_predictions(comparison):
    scores = results.scores(comparison)
    assert len(scores.rows) == 2 * len(METHODS)
    labels = comparison.labels["far"]
    nll = {m: bl.metrics.nll(comparison.predictions[m]["far"].log_probs, labels) for m in METHODS}
    rows = {row[1]: row for row in scores.rows[len(METHODS) :]}
    for method in METHODS:
        assert rows[method][3].startswith(f"{nll[method]:.3f}\n")
    difference = results.differences(comparison).rows[4]
    assert difference[1] == LORA
    assert difference[3].startswith(f"{nll[BAYES] - nll[LORA]:+.3f}\n")
    costs = {row[0].strip(): row for row in results.costs(comparison).rows}
    assert costs[LORA][2] == "1.00"
    assert float(costs["of which frames"][1]) == pytest.approx(comparison.core.seconds["frames"], abs=0.06)


@pytest.mark.slow
def test_approximations_are_compared_with_the_draws_of_nuts(comparison):
    table = results.agreements(comparison)
    assert [row[0] for row in table.rows] == ["Laplace", "Gaussian by SVI", "SiteFlow by SVI"]
    passed = comparison.chains.certificate.passed
    for row, agreement in zip(table.rows, comparison.agreements.values(), strict=True):
        assert agreement.other == ("reference" if passed else "other posterior")
        assert float(row[1]) == pytest.approx(np.abs(agreement.moments.shift).max(), abs=0.006)
        assert row[5] == (", ".join(agreement.differences) or "nothing")


@pytest.mark.slow
def test_the_headline_agrees_with_the_intervals(comparison):
    headline = results.headline(comparison)
    for rival in (BASE, LORA, CAREFUL):
        difference = bl.metrics.paired_difference(
            jax.random.key(0),
            bl.metrics.nll,
            *(comparison.predictions[m]["near"] for m in (BAYES, rival)),
            comparison.labels["near"],
        )
        word = (
            "lower than"
            if difference.high < 0
            else "higher than"
            if difference.low > 0
            else "not distinguishable from"
        )
        assert re.search(rf"{word} that of {re.escape(rival)} on [^.;]*near", headline)


@pytest.mark.slow
def test_report_is_self_contained(comparison):
    html = demo_page(comparison, "bnlora demo --seed 0")
    assert html.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    for piece in ("bnlora demo --seed 0", "not that of the network", "Log evidence", "epistemic share"):
        assert piece in html
    assert sum(isinstance(part, Table) for part in demo_tables(comparison)) == 4


@pytest.mark.slow
def test_the_result_as_json_has_scores_scales_and_bound(comparison, tmp_path):
    result = comparison_result(comparison, tmp_path / "report.html")
    assert set(result["scores"]["near"]) == set(METHODS)
    assert set(result["scales"]) == {"q_proj", "k_proj", "v_proj", "slope"}
    assert result["bound"] == pytest.approx(comparison.core.fit.history["elbo"][-20:].mean())


def test_reliability_panels_show_the_value_of_the_metric():
    random = np.random.default_rng(0)
    probs = random.dirichlet([1, 1], 300)
    labels = (random.random(300) > probs[:, 0]).astype(int)
    prediction = Prediction(np.log(probs)[None])
    figure = plots.reliability({"method": {"rows": prediction}}, {"rows": labels})
    (axes,) = figure.axes
    assert axes.get_title() == f"method, rows\nECE {bl.metrics.ece(np.log(probs), labels):.3f}"
    curve = bl.metrics.reliability(prediction, labels)
    np.testing.assert_allclose(axes.lines[1].get_xydata(), np.stack([curve.confidence, curve.accuracy], 1))


@pytest.mark.slow
def test_curves_of_the_objective_are_the_history(comparison):
    fit = comparison.core.fit
    bound, data, divergences = plots.elbo({BAYES: fit}).axes
    np.testing.assert_array_equal(bound.lines[0].get_ydata(), fit.history["elbo"])
    np.testing.assert_array_equal(data.lines[0].get_ydata(), fit.history["data"])
    smooth = bound.lines[1].get_ydata()
    np.testing.assert_allclose(smooth[-1], fit.history["elbo"][-15:].mean())
    assert divergences.lines


@pytest.mark.slow
def test_the_figure_of_frames_shows_the_energy_left_out(comparison):
    frames = comparison.core.frames
    figure = plots.frame_energies(frames)
    panel = figure.axes[list(frames).index("v_proj")]
    left = frames["v_proj"].energies[0]
    size = frames["v_proj"].left.shape[2]
    left_out = 1 - left[:, :size].sum() / left.sum()
    assert panel.lines[1].get_ydata()[0] == pytest.approx(max(left_out, 1e-6), rel=1e-6)


def test_null_ece_is_the_ece_of_correct_probabilities():
    random = np.random.default_rng(1)
    p = random.beta(2, 2, 4000)
    log_probs = np.log(np.stack([1 - p, p], 1))
    errors = [bl.metrics.ece(log_probs, (random.random(4000) < p).astype(int)) for _ in range(40)]
    stderr = np.std(errors) / 40**0.5
    assert abs(bl.metrics.null_ece(log_probs) - np.mean(errors)) < 5 * stderr
    wrong = random.integers(0, 2, 4000)
    debiased = bl.metrics.debiased_ece(log_probs, wrong)
    assert debiased == pytest.approx(bl.metrics.ece(log_probs, wrong) - bl.metrics.null_ece(log_probs))
    assert debiased > 0.1


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
