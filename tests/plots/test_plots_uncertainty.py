"""Figures of uncertainty show the numbers of their arguments."""

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bnlora import plots
from bnlora.prediction.predict import Prediction
from bnlora.prediction.selective import risk_coverage, separation

LABELS = np.arange(60) % 2


def prediction(seed, skill, spread):
    random = np.random.default_rng(seed)
    margin = skill * (2 * LABELS - 1) + spread * random.normal(size=(12, 60)) + random.normal(size=60)
    return Prediction(-np.logaddexp(0, np.stack([margin, -margin], -1)))


BOTH = {"plain": {"films": prediction(0, 1.0, 0.0)}, "ours": {"films": prediction(1, 1.0, 1.0)}}
DOMAINS = {"films": prediction(2, 3.0, 0.3), "tweets": prediction(3, 0.5, 2.0), "news": prediction(4, 1, 1)}
TABLE = {
    "module": ["q_proj", "q_proj", "v_proj", "lm_head"],
    "layer": [3, 10, 10, 30],
    "ratio": [0.91, 0.5, 0.25, 1.2],
    "kl": [1.0, 20.0, 300.0, 4.0],
    "posterior_sd": [0.3, 0.2, 0.1, 0.4],
}


def caption(figure):
    return figure.get_supxlabel().replace("\n", " ")


def test_risk_coverage_shows_the_curve_of_each_method():
    figure = plots.risk_coverage(jax.random.key(0), BOTH, {"films": LABELS}, by="entropy")
    (panel,) = figure.axes
    lines = {line.get_label(): line for line in panel.lines if ": AURC" in line.get_label()}
    for method, colour in (("plain", plots.BLUE), ("ours", plots.ORANGE)):
        curve = risk_coverage(jax.random.key(0), BOTH[method]["films"], LABELS, by="entropy")
        line = lines[f"{method}: AURC {curve.aurc}"]
        np.testing.assert_allclose(line.get_xydata(), np.stack([curve.coverage, curve.risk], 1))
        assert to_hex(line.get_color()).upper() == colour
    assert panel.get_legend().get_title().get_text() == "films"
    assert "ordered by entropy, lowest first (60 of films)" in caption(figure)
    assert panel.get_xlabel()
    assert panel.get_ylabel()
    with pytest.raises(ValueError, match="must have at most 5 methods; got 6"):
        plots.risk_coverage(jax.random.key(0), dict.fromkeys("abcdef", BOTH["ours"]), {"films": LABELS})


def test_domains_show_histograms_intervals_and_how_well_they_separate():
    figure = plots.domains(DOMAINS, inside="films")
    for panel, measure in zip(figure.axes, ("entropy", "mutual_information"), strict=True):
        values = {name: getattr(prediction, measure) for name, prediction in DOMAINS.items()}
        medians = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(medians, [np.median(x) for x in values.values()])
        outside = [values["tweets"], values["news"]]
        texts = [text.get_text() for text in panel.texts]
        assert texts == [f"AUC\n{separation(values['films'], x):.2f}" for x in outside]
        bars = panel.patches[1].get_data()
        count = np.histogram(values["tweets"], bars.edges)[0]
        assert count.sum() == 60  # no value is outside the bins
        np.testing.assert_allclose(bars.values - bars.baseline, 0.7 * count / count.max())
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][0] == "films\n60 rows"
    assert "12 posterior draws; blue: films" in caption(figure)
    with pytest.raises(ValueError, match="nearest is 'films'"):
        plots.domains(DOMAINS, inside="film")


def test_domains_with_zero_mutual_information_can_be_drawn():
    """Without spread over draws the mutual information of every row is zero."""
    flat = Prediction(np.log(np.full((2, 5, 2), 0.5)))
    assert len(plots.domains({"films": flat, "news": flat}).axes) == 2


@pytest.mark.parametrize(("value", "letters"), [("ratio", ".91"), ("kl", "300"), ("posterior_sd", ".30")])
def test_cells_of_the_spread_are_at_their_module_and_layer(value, letters):
    figure = plots.posterior_spread(TABLE, value=value)
    panel = figure.axes[0]
    grid = panel.images[0].get_array()
    expected = np.full((3, 3), np.nan)
    expected[[0, 0, 1, 2], [0, 1, 1, 2]] = TABLE[value]
    np.testing.assert_array_equal(grid.filled(np.nan), expected)
    assert [t.get_text() for t in panel.get_xticklabels()] == ["3", "10", "head"]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["q_proj", "v_proj", "lm_head"]
    assert letters in {text.get_text() for text in panel.texts}
    assert len(panel.texts) == 4
    assert "Grey: no adapter" in caption(figure)


def test_a_data_frame_is_a_table():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(TABLE)
    grid = plots.posterior_spread(frame).axes[0].images[0].get_array()
    assert grid.count() == 4


def test_a_table_by_factor_shows_one_factor():
    """A table like that of `diagnostics.shrinkage`: one row for each factor and for their product."""
    both = {name: [*column, *column] for name, column in TABLE.items()}
    both |= {"factor": ["a"] * 4 + ["update"] * 4, "ratio": [0.0] * 4 + TABLE["ratio"]}
    update, a = (plots.posterior_spread(both, **one).axes[0].images[0] for one in ({}, {"factor": "a"}))
    np.testing.assert_array_equal(update.get_array().compressed(), TABLE["ratio"])
    np.testing.assert_array_equal(a.get_array().compressed(), 0.0)
    with pytest.raises(ValueError, match="expected a finite ratio"):
        plots.posterior_spread(both, factor="c")


def test_an_invalid_table_raises():
    with pytest.raises(ValueError, match=r"it lacks \['kl'\]"):
        plots.posterior_spread({k: v for k, v in TABLE.items() if k != "kl"}, value="kl")
    with pytest.raises(ValueError, match="got two of 'q_proj', 3"):
        plots.posterior_spread({k: [v[0], v[0]] for k, v in TABLE.items()})


@pytest.mark.parametrize(
    ("draw", "count"),
    [
        (lambda ax: plots.risk_coverage(jax.random.key(0), BOTH, {"films": LABELS}, ax=ax), 1),
        (lambda ax: plots.domains(DOMAINS, ax=ax), 2),
        (lambda ax: plots.posterior_spread(TABLE, ax=ax), 1),
    ],
)
def test_axes_may_be_passed(draw, count):
    figure = Figure()
    assert draw(figure.subplots(1, count)) is figure
    assert figure.get_supxlabel() == ""
    with pytest.raises(ValueError, match=f"`ax` must contain {count} axes"):
        draw(figure.subplots(1, count + 1))
