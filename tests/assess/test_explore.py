"""`bl.explore` against `bl.laplace` with the same prior, quadrature, dense algebra, and its own code."""

import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy
from builders.compilations import counting
from builders.linearised import KEY, NEW, ROWS, exact, frames, tangent_of
from builders.thorough import sample_of

import bnlora as bl
from bnlora.assess.explore import drawing
from bnlora.assess.explore.explorer import normal_points
from bnlora.assess.explore.settings import LAWS, OFF

TWO = frames("o_proj", "lm_head")
DEEP = frames("v_proj", "lm_head", layers=2)
THREE = frames("v_proj", "lm_head", label_ids=(3, 5, 9))
SCALES = {"o_proj": 0.8, "lm_head": 2.0}
LABELS = jnp.asarray(np.random.default_rng(0).integers(0, 3, len(ROWS)))


@pytest.fixture(scope="module")
def explorers():
    """Coordinates fewer than rows; rows fewer than coordinates; three classes."""
    three = replace(ROWS, labels=LABELS), replace(NEW, labels=LABELS[: len(NEW)])
    deep = bl.explore(tangent_of(DEEP), ROWS[:6], NEW)
    assert deep.train_model.in_rows
    return {
        "coordinates": bl.explore(tangent_of(TWO), ROWS, NEW),
        "rows": deep,
        "three classes": bl.explore(tangent_of(THREE), *three),
    }


CASES = {
    "coordinates": {"scales": SCALES},
    "rows": {"scales": {"v_proj": 1.7, "lm_head": 0.4}},
    "rows, one layer": {"scales": {"v_proj": 1.7, "lm_head": 0.4}, "layers": [1]},
    "rows, some": {"scales": {"v_proj": 1.7, "lm_head": 0.4}, "rows": 4},
    "coordinates, some": {"scales": SCALES | {"o_proj": 0.0}, "rows": 15},
    "three classes": {"scales": {"v_proj": 1.5, "lm_head": 1.0}, "rows": 20},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_posterior_is_that_of_laplace_on_the_rows_in_use(case, explorers):
    explorer = explorers[case.partition(",")[0]]
    found = explorer.at(**CASES[case])
    scale = {name: jnp.asarray(value) for name, value in found.scale.items()}
    prior = bl.priors.core(explorer.tangent.frames, scale=scale)
    train = explorer.train[: found.settings.rows]
    gaussian = bl.laplace(explorer.tangent.with_prior(prior), train)
    assert found.log_evidence == pytest.approx(gaussian.log_evidence, abs=1e-6)
    # Contrasts of the validation rows are linear in the vector of the Gaussian.
    offset, phi = (np.asarray(x, float) for x in explorer.validation.features)
    weight = [np.repeat(np.broadcast_to(scale[n] / f.unit, f.size[0]), np.prod(f.size[1:]))
              for n, f in explorer.tangent.frames.items()]  # fmt: skip
    design, covariance = phi * np.concatenate(weight), gaussian.covariance()
    contrasts = offset[:, 1:] - offset[:, :1]
    np.testing.assert_allclose(found.mean, contrasts + design @ gaussian.loc, atol=1e-5)
    spread = np.sqrt(np.einsum("nkd,de,nke->nk", design, covariance, design))
    np.testing.assert_allclose(found.spread, spread, atol=1e-5)
    np.testing.assert_allclose(found.prior_spread, np.sqrt((design**2).sum(2)), atol=1e-6)
    assert found.spread.max() < found.prior_spread.max()


def test_probabilities_are_those_of_quadrature_and_of_draws(explorers):
    found = explorers["coordinates"].at(scales={"o_proj": 3.0, "lm_head": 6.0})
    for mean, spread, log_probs in (
        (found.mean, found.spread, found.prediction.log_probs),
        (contrasts_of(found.base), found.prior_spread, scores_of(found.prior)),
    ):
        for m, s, p in zip(mean[:, 0], spread[:, 0], np.exp(log_probs)[:, 1], strict=True):
            expected = scipy.integrate.quad(
                lambda z, m=m, s=s: scipy.special.expit(m + s * z) * scipy.stats.norm.pdf(z), -9, 9, limit=200
            )[0]
            assert p == pytest.approx(expected, abs=1e-4)
    assert found.spread.max() > 1  # else a rule of one point would do


def contrasts_of(base: bl.Prediction) -> np.ndarray:
    return base.log_probs[:, 1:] - base.log_probs[:, :1]


def scores_of(prior: bl.PriorPredictive) -> np.ndarray:
    return np.log(prior.probs.mean(0))


def test_points_have_the_moments_of_a_normal_vector():
    points = normal_points(3, 256)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cov(points.T, ddof=0), np.eye(3), atol=0.03)
    np.testing.assert_allclose(points.var(0), 1, atol=1e-3)
    sharp = scipy.special.expit(np.add.outer(np.linspace(-8, 8, 9), np.outer([0.5, 2, 8], points[:, 0])))
    many = scipy.special.expit(
        np.add.outer(np.linspace(-8, 8, 9), np.outer([0.5, 2, 8], normal_points(1, 2**14)[:, 0]))
    )
    np.testing.assert_allclose(sharp.mean(-1), many.mean(-1), atol=1e-4)


@pytest.mark.parametrize("name", ["coordinates", "three classes"])
def test_the_code_gives_the_same_posterior(name, explorers, capsys):
    explorer = explorers[name]
    found = explorer.at(law="half-normal", width=2.0, rows=20)
    given = {"tangent": explorer.tangent, "train": explorer.train, "validation": explorer.validation}
    exec(found.code, given)
    assert given["gaussian"].log_evidence == pytest.approx(found.log_evidence, abs=1e-6)
    assert "train[:20]" in found.code
    assert "chosen by evidence under a half-normal law of width 2" in found.code
    error = given["prediction"].stderr
    assert (np.abs(given["prediction"].probs - found.prediction.probs) < 5 * error + 1e-3).all()
    assert error.max() < 0.05
    assert "nll" in capsys.readouterr().out


def test_the_code_of_layers_and_families_that_are_off(explorers):
    explorer = explorers["rows"]
    found = explorer.at(scales={"v_proj": 1.25, "lm_head": 0.0}, layers=[1])
    assert f"'v_proj': np.array([{OFF!r}, 1.25])," in found.code
    assert f"'lm_head': {OFF!r}," in found.code
    assert "1e-06 is off" in found.code
    given = {"tangent": explorer.tangent, "train": explorer.train, "validation": explorer.validation}
    exec(found.code.partition("prediction")[0], given)
    assert given["gaussian"].log_evidence == pytest.approx(found.log_evidence, abs=1e-6)


def test_scales_by_evidence_are_those_of_choose_scales(explorers):
    explorer = explorers["coordinates"]
    chosen = bl.choose_scales(explorer.tangent, ROWS, prior=dist.HalfNormal(1.5))
    found = explorer.at(law="half-normal", width=1.5)
    for name, value in chosen.values.items():
        assert found.scale[name] == pytest.approx(value, rel=2e-2)
    totals = [
        evidence + sum(scipy.stats.halfnorm.logpdf(s, scale=1.5) + np.log(s) for s in scales.values())
        for evidence, scales in ((found.log_evidence, found.scale), (chosen.log_evidence, chosen.values))
    ]
    assert totals[0] == pytest.approx(totals[1], abs=1e-3)
    assert found.base_evidence == pytest.approx(chosen.base, abs=1e-6)


@pytest.mark.parametrize("law", sample_of(LAWS, ["log-normal"]))
def test_a_law_moves_the_scale_to_the_maximum_of_a_grid(law, explorers):
    explorer, width = explorers["coordinates"], 0.7
    found = explorer.at(law=law, width=width, scales={"o_proj": 0.0}).scale["lm_head"]
    linear = exact(explorer.tangent, ROWS, {"o_proj": 1e-6, "lm_head": 1.0})
    of_head = np.repeat([0, 1], [4, linear.design.shape[2] - 4])
    grid = np.linspace(np.log(0.02), np.log(20), 120)
    density = {
        "half-normal": lambda s: scipy.stats.halfnorm.logpdf(s, scale=width),
        "half-Cauchy": lambda s: scipy.stats.halfcauchy.logpdf(s, scale=width),
        "log-normal": lambda s: scipy.stats.lognorm.logpdf(s, 1.0, scale=width),
    }[law]

    def value(t: float) -> float:
        scaled = replace(linear, design=linear.design * np.where(of_head, np.exp(t), 1.0))
        return scaled.log_evidence() + density(np.exp(t)) + t

    values = [value(t) for t in grid]
    assert np.log(found) == pytest.approx(grid[np.argmax(values)], abs=1.01 * (grid[1] - grid[0]))


def test_a_change_of_the_settings_compiles_nothing(explorers):
    for explorer in (explorers["coordinates"], explorers["rows"]):
        names = list(explorer.start.scales)
        explorer.at(), explorer.at(law="log-normal")
        with counting() as compiled:
            explorer.at(scales={names[0]: 0.3}, rows=5, layers=[])
            explorer.at(law="half-normal", width=0.5, rows=4)
            explorer.at(scales={names[1]: 0.0}, law="half-Cauchy")
        assert dict(compiled) == {}


def test_what_is_off_leaves_the_base(explorers):
    found = explorers["coordinates"].at(scales={"o_proj": 0.0, "lm_head": 0.0})
    assert found.log_evidence == pytest.approx(found.base_evidence, abs=1e-4)
    np.testing.assert_allclose(found.prediction.probs, found.base.probs, atol=1e-4)
    assert "no change" in found.prior.verdict
    assert found.scores == pytest.approx(found.base_scores, abs=1e-4)


def test_the_page_shows_numbers_pictures_and_rows(explorers):
    explorer = replace(
        explorers["coordinates"], texts=[f"text <{i}> {'long ' * 40}" for i in range(len(NEW))]
    )
    found, before = explorer.at(scales=SCALES), explorer.at(scales={"lm_head": 0.1})
    entropy = found.prediction.entropy
    assert (np.diff(entropy[found.most_uncertain]) <= 0).all()
    page = found.html(before)
    for what in ("<th>base", "<th>before", f"{found.log_evidence:,.1f}", f"{before.log_evidence:,.1f}"):
        assert what in page
    assert f"text &lt;{found.most_uncertain[0]}&gt;" in page
    assert "<script" not in page
    words = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', page)
    assert [text.split(":")[0] for text in words] == [
        "Mean confidence", "Median spread of a contrast", "Reliability by bin"
    ]  # fmt: skip
    curve = bl.metrics.reliability(found.prediction, NEW)
    assert words[2].count("rows") == len(curve.count)
    assert "<th>before" not in found._repr_html_()
    first = found.most_uncertain[0]
    assert f"Row {first}, label {NEW.labels[first]}: p(label) " in page
    assert f"log evidence {found.log_evidence:,.1f}" in repr(found)


def test_pictures_place_points_where_they_belong():
    axes = drawing.Axes((0.0, 2.0), (0.0, 1.0))
    corners = [axes.at(0, 0), axes.at(2, 1)]
    assert corners == [
        (f"{drawing.LEFT:.1f}", f"{drawing.HEIGHT - drawing.BOTTOM:.1f}"),
        (f"{drawing.WIDTH - drawing.RIGHT:.1f}", f"{drawing.TOP:.1f}"),
    ]


def test_what_cannot_be_explored_is_said(explorers, monkeypatch):
    explorer, tangent = explorers["coordinates"], tangent_of(TWO)
    one = replace(ROWS, labels=jnp.zeros(len(ROWS), int))
    mistakes = [
        (lambda: bl.explore(tangent, one, NEW), "at least two classes"),
        (
            lambda: bl.explore(tangent, ROWS, replace(NEW, labels=NEW.labels - 2)),
            "validation rows have no labels",
        ),
        (
            lambda: bl.explore(tangent, ROWS, NEW, texts=["one"]),
            "one for each of the 9 validation rows; got 1",
        ),
        (
            lambda: bl.explore(tangent, ROWS, NEW, scales={"o_proj": 1.0}),
            "one number for each family o_proj, lm_head",
        ),
        (lambda: bl.explore(tangent, ROWS, NEW, scales=-1.0), "of at least 0, which is off; got -1.0"),
        (lambda: explorer.at(scales={"v_proj": 1.0}), "one number for each family"),
        (lambda: explorer.at(layers=[7]), r"layers must be among \(1,\).*got \(7,\)"),
        (lambda: explorer.at(law="half-norml"), "nearest is 'half-normal'"),
        (lambda: explorer.at(width=0.0), "width must be a positive number"),
        (lambda: explorer.at(rows=100), "from 2 to 24; got 100, nearest is 24"),
    ]
    for make, sentence in mistakes:
        with pytest.raises(ValueError, match=sentence) as error:
            make()
        assert "\n" not in str(error.value)
    monkeypatch.setattr("bnlora.assess.explore.explorer.MOST", 10_000)
    with pytest.raises(ValueError, match="use at most .* training and .* validation rows"):
        bl.explore(tangent_of(frames("v_proj", "lm_head", size=8, layers=2)), ROWS, NEW)


def test_the_evidence_of_separable_rows_has_no_maximum_without_a_law():
    tangent = tangent_of(frames("lm_head"))
    rows = tangent.prepare(ROWS)
    positive = np.asarray(rows.features.phi)[:, 0] > 0
    signs = positive[:, np.abs(positive.mean(0) - 0.5).argmin()]  # a large core separates these classes
    separable = replace(rows, labels=jnp.asarray(signs, int))
    explorer = bl.explore(tangent, separable, NEW)
    with pytest.raises(ValueError, match="has no maximum.*half-normal"):
        explorer.at(law="flat")
    assert 1 < explorer.at(law="half-normal").scale["lm_head"] < 20


def test_frames_from_labels_have_no_evidence_to_choose_by():
    made = replace(TWO, label_free=False)
    explorer = bl.explore(tangent_of(made), ROWS, NEW)
    assert explorer.at().log_evidence < 0
    with pytest.raises(ValueError, match="computed from labels"):
        explorer.at(law="flat")


def test_draws_of_the_prior_have_its_spread(explorers):
    found = explorers["coordinates"].at(scales=SCALES)
    np.testing.assert_allclose(found.prior.spread, found.prior_spread[:, 0], rtol=5e-3)
    model = tangent_of(TWO, scale=SCALES)
    drawn = bl.prior_predictive(KEY, model, NEW, num_draws=400)
    np.testing.assert_allclose(drawn.spread, found.prior_spread[:, 0], rtol=5 / np.sqrt(800))
