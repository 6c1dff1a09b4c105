"""Verdicts on approximations that are wrong in a known way, and `bl.compare` end to end on a tiny model."""

from dataclasses import dataclass, replace
from html import escape

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.assess import sbc
from bnlora.assess.comparison import Draws, UncertifiedReference, compare_draws, khat
from bnlora.assess.prior_draws import draw_prior
from bnlora.prediction.functions import log_likelihood
from bnlora.prediction.predict import Prediction
from bnlora.testing import tiny_base, tiny_rows

RANDOM = np.random.default_rng
NAMES = ("margin", "norm", "other")


def independent(values):
    return Draws(NAMES, values[None], "independent")


def chains(random, draws=1500, r=0.5):
    """Four chains of standard normals whose neighbours have correlation r."""
    values = random.normal(size=(4, draws, 3))
    for t in range(1, draws):
        values[:, t] = r * values[:, t - 1] + (1 - r**2) ** 0.5 * values[:, t]
    return Draws(NAMES, values, "chains")


def predictions(random, *, shift=0.0, scale=1.0):
    margin = np.linspace(-2, 2, 12) + shift + scale * random.normal(size=(300, 12))
    return Prediction(-np.logaddexp(0, np.stack([margin, -margin], -1)))


@pytest.fixture(scope="module")
def reference():
    return chains(RANDOM(0))


def held(reference, values, prediction=None):
    pair = None if prediction is None else (prediction, predictions(RANDOM(1)))
    return compare_draws(jax.random.key(2), independent(values), reference, predictions=pair)


@pytest.fixture(scope="module")
def right(reference):
    return held(reference, RANDOM(3).normal(size=(1000, 3)), predictions(RANDOM(4)))


def test_a_right_approximation_is_told_from_nothing(right):
    assert right.differences == ()
    for piece in (
        "means: no difference detected at level 0.01, this aspect's share (largest",
        "would be missed half of the time",
        "spread: no difference detected at level 0.01, this aspect's share (",
        "the joint law of the functions: no difference detected at level 0.01, this aspect's share (MMD p",
        "predictions: no difference detected at level 0.01, this aspect's share (mean total",
        "epistemic uncertainty: no difference detected at level 0.01, this aspect's share (mean",
        "k-hat: none, no density",
        "no difference detected at level 0.05 for these functions, rows and number of draws",
    ):
        assert piece in right.verdict


def test_a_narrow_approximation_is_said_to_be_narrow(reference):
    found = held(reference, 0.6 * RANDOM(5).normal(size=(1000, 3)), predictions(RANDOM(6), scale=0.3))
    assert set(found.differences) == {"spread", "joint law", "predictions", "epistemic"}
    assert "means: no difference detected" in found.verdict
    assert found.moments.ratio == pytest.approx(0.6, rel=0.1)
    assert f"spread is {np.median(found.moments.ratio):.2f} of the reference by median" in found.verdict
    assert "(3 of 3 functions differ)" in found.verdict
    assert "epistemic uncertainty differs" in found.verdict


def test_a_shift_is_found_where_it_is(reference):
    found = held(reference, RANDOM(7).normal(size=(1000, 3)) + np.array([0.0, -0.5, 0.0]))
    assert found.differences == ("means", "joint law")
    assert "means differ in 1 of 3 functions, most in norm by -0." in found.verdict
    assert "predictions" not in found.verdict


def test_dependence_alone_is_found_by_the_joint_tests(reference):
    values = RANDOM(8).normal(size=(1000, 3))
    values[:, 2] = 0.8 * values[:, 0] + 0.6 * values[:, 2]
    assert held(reference, values).differences == ("joint law",)


@pytest.mark.slow
def test_false_alarms_come_as_rarely_as_promised():
    """Right approximations, 100 times: the share with any difference, up to 3.5 standard errors."""
    random = RANDOM(9)
    made = [
        compare_draws(
            jax.random.key(seed), *(independent(random.normal(size=(60, 3))) for _ in range(2)), level=0.2
        )
        for seed in range(100)
    ]
    assert np.mean([bool(m.differences) for m in made]) <= 0.2 + 3.5 * (0.2 * 0.8 / 100) ** 0.5


def test_tables_and_frames_hold_the_same_numbers(right):
    text = repr(right)
    for piece in ("approximation: 1000 independent draws", "4 chains of 1500 draws", *right.sentences):
        assert piece in text
    assert f"{right.size} against {right.size} draws" in text
    frame = right.to_dataframe()
    np.testing.assert_array_equal(frame["difference"], right.moments.shift)
    np.testing.assert_array_equal(frame["W1_null"], right.transport.marginal_null)
    assert list(frame.index) == list(NAMES)
    measures = right.to_dataframe("measures")
    assert measures.loc["squared MMD", "p_value"] == right.kernel.p_value
    assert measures.loc["total variation, mean of rows", "null"] == pytest.approx(
        right.predictive.total_variation_null.mean()
    )
    assert right.functions_table.rows[1][0] == "norm"
    page = right._repr_html_()
    assert all(escape(finding.sentence) in page for finding in right.findings)
    with pytest.raises(ValueError, match="must be 'functions' or 'measures'; got 'rows'"):
        right.to_dataframe("rows")


def test_khat_is_said_but_decides_nothing(reference):
    bad, good = (
        khat(3 * RANDOM(10).exponential(size=1000), np.zeros(1000)),
        khat(np.zeros(1000), np.zeros(1000)),
    )
    values = RANDOM(3).normal(size=(1000, 3))
    found = compare_draws(jax.random.key(2), independent(values), reference, khat=bad)
    assert "exceeds 0.67" in found.verdict
    assert found.differences == ()
    assert (
        "is at most 0.67"
        in compare_draws(jax.random.key(2), independent(values), reference, khat=good).verdict
    )


def test_a_point_is_compared_too(reference):
    found = held(reference, np.zeros((200, 3)))
    assert found.moments.ratio == pytest.approx(0)
    assert "spread is 0.00 of the reference by median" in found.verdict


def test_constant_functions_are_left_out_and_said():
    def with_fixed(draws):
        fixed = np.full((*draws.values.shape[:2], 1), 0.1)  # whose standard deviation is not zero in doubles
        return Draws((*NAMES, "fixed"), np.concatenate([draws.values, fixed], axis=2), draws.kind)

    reference, posterior = chains(RANDOM(0)), independent(RANDOM(3).normal(size=(1000, 3)))
    found = compare_draws(jax.random.key(2), with_fixed(posterior), with_fixed(reference))
    plain = compare_draws(jax.random.key(2), posterior, reference)
    assert found.names == NAMES
    assert found.constant == ("fixed",)
    assert "left out, constant under the reference: fixed" in repr(found)
    np.testing.assert_array_equal(found.to_dataframe(), plain.to_dataframe())
    only = Draws(("fixed",), np.full((4, 100, 1), 0.1), "chains")
    with pytest.raises(ValueError, match="a function that varies .*: fixed"):
        compare_draws(jax.random.key(2), only, only)


def test_a_level_beyond_one_is_refused(reference):
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\); got 5"):
        compare_draws(jax.random.key(0), reference, reference, level=5)


# From here on: a tiny model. Its head alone is adapted, so that resampled prior draws are exact.
BASE = tiny_base(jax.random.key(1), num_layers=1)
ROWS = tiny_rows(jax.random.key(2), 6)
MODEL = bl.Classifier(
    BASE, bl.select(BASE, ["lm_head"], rank=1), bl.priors.normal(scale=1.0), label_ids=(3, 5)
)
KEY = jax.random.key(3)


@dataclass(frozen=True)
class Passed:
    passed: bool = True
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Stored draws that call themselves a run of MCMC."""

    adapters: dict
    certificate: Passed | None = Passed()
    num_chains: int = 4
    model: bl.Classifier = MODEL

    def stored_adapters(self):
        return self.adapters


@dataclass(frozen=True)
class Stored:
    """A posterior that hands out its draws in order, spread by a factor."""

    adapters: dict
    factor: float = 1.0
    model: bl.Classifier = MODEL

    def draw_adapters(self, key, num_draws):
        scaled = {"a": self.adapters["lm_head"]["a"], "b": self.factor * self.adapters["lm_head"]["b"]}
        return {"lm_head": jax.tree.map(lambda x: x[:num_draws], scaled)}


@pytest.fixture(scope="module")
def exact():
    """Two independent sets of exact draws."""
    infer = sbc.importance_inference(MODEL, num_particles=30_000, num_draws=800, num_together=1000)
    return [jax.jit(infer)(jax.random.key(seed), BASE.weights, ROWS) for seed in (0, 1)]


@pytest.mark.slow
def test_exact_draws_agree_with_exact_draws(exact):
    """At a level that one seed in a thousand would miss: at 5 % it would be one in twenty."""
    found = bl.compare(KEY, Stored(exact[0]), Run(exact[1]), ROWS, level=1e-3)
    assert found.differences == ()
    assert found.other == "reference"
    assert found.khat is None
    assert found.names == (
        "log_likelihood", *(f"margin[{i}]" for i in range(6)), "norm[lm_head]"
    )  # fmt: skip
    assert found.reference.values.shape == (4, 200, 8)
    assert found.posterior.values.shape == (1, 400, 8)
    margins = [MODEL.logits(BASE.weights, jax.tree.map(lambda x: x[7], exact[1]), ROWS) @ jnp.array([-1, 1])]
    np.testing.assert_allclose(found.reference.values[0, 7, 1:7], margins[0], atol=1e-5)
    again = bl.compare(KEY, Stored(exact[0]), Run(exact[1]), ROWS, level=1e-3)
    assert again.verdict == found.verdict


def test_contracted_draws_are_found_narrow(exact):
    found = bl.compare(KEY, Stored(exact[0], factor=0.6), Run(exact[1]), ROWS)
    assert {"means", "spread", "epistemic"} <= set(found.differences)
    frame = found.to_dataframe()
    assert frame.loc["margin[0]", "sd_ratio"] == pytest.approx(0.6, rel=0.25)


def test_a_fit_has_a_khat_and_a_point_has_none(exact):
    guides = (
        bl.guides.Guide(MODEL.prior, bl.guides.mean_field()),
        bl.guides.Guide(MODEL.prior, bl.guides.delta()),
    )
    fits = [bl.fit(KEY, MODEL, g, ROWS, optax.adam(0.05), num_steps=60, batch_size=6) for g in guides]
    bayes, point = (bl.compare(KEY, made, Run(exact[1]), ROWS, num_draws=100) for made in fits)
    assert bayes.khat is not None
    assert bayes.khat.num_draws == 100
    assert "k-hat" in bayes.verdict
    assert point.khat is None
    assert "k-hat: none, no density" in point.verdict
    assert "spread" in point.differences


def test_khat_weights_are_those_of_the_model(exact):
    """With the prior itself for a guide the weights are the likelihood at draws of the prior."""
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
    made = bl.fit(KEY, MODEL, guide, ROWS, optax.adam(0.05), num_steps=1, batch_size=6)
    made = replace(made, guide=lambda *_: MODEL.prior(), params={})
    found = bl.compare(KEY, made, Run(exact[1]), ROWS, num_draws=1000).khat

    def weigh(drawn):
        return log_likelihood(MODEL, BASE.weights, drawn, ROWS)

    log_weights = jax.lax.map(weigh, draw_prior(jax.random.key(9), MODEL, {}, 1000))
    expected = khat(np.asarray(log_weights), np.zeros(1000))
    assert found.passed
    assert expected.passed
    assert found.value == pytest.approx(expected.value, abs=0.15)


def test_an_uncertified_run_is_refused(exact):
    failed = Passed(False, ("R-hat of margin[0] is 1.2, above 1.01: run longer chains",))
    with pytest.raises(UncertifiedReference, match=r"margin\[0\] is 1.2, above 1.01: run longer chains\. Or"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1], certificate=failed), ROWS)
    with pytest.raises(UncertifiedReference, match="this Run has no certificate: check the run first"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1], certificate=None), ROWS)
    with pytest.raises(UncertifiedReference, match="this Stored has no certificate"):
        bl.compare(KEY, Stored(exact[0]), Stored(exact[1]), ROWS)


def test_against_anything_nothing_is_called_a_reference(exact):
    for other in (Stored(exact[1]), Run(exact[1], certificate=None)):
        found = bl.compare(KEY, Stored(exact[0], 0.5), other, ROWS, num_draws=200, against="anything")
        assert "other posterior" in found.verdict
        assert "reference" not in repr(found)
        assert "reference" not in repr(found.functions_table)


def test_functions_may_be_given(exact):
    def functions(weights, adapters, batch):
        return {"first": adapters["lm_head"]["a"][0, 0, 0]}

    found = bl.compare(KEY, Stored(exact[0]), Run(exact[1]), ROWS, functions=functions)
    assert found.names == ("first",)

    def vectors(weights, adapters, batch):
        return {"all": adapters["lm_head"]["a"][0, 0]}

    with pytest.raises(ValueError, match=r"must be a scalar, shape \(\); 'all' has shape \(16,\)"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1]), ROWS, functions=vectors)


def test_bad_input_is_refused(exact):
    other = bl.Classifier(BASE, MODEL.sites, bl.priors.normal(), label_ids=(3, 6))
    with pytest.raises(ValueError, match=r"same sites and label words.*"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1], model=other), ROWS)
    with pytest.raises(ValueError, match="against must be one of .*; got 'nothing', nearest is 'anything'"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1]), ROWS, against="nothing")
    with pytest.raises(ValueError, match="at least 20 draws on each side .* draw more"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1]), ROWS, num_draws=12)
    with pytest.raises(ValueError, match="expected 7 chains of one length; got 800 draws in all"):
        bl.compare(KEY, Stored(exact[0]), Run(exact[1], num_chains=7), ROWS)
