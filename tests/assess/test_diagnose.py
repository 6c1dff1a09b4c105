"""The page of a fit: quiet about a good one, and right about three kinds of bad ones."""

import copy
import io
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from builders.diagnosed import problem
from rich.console import Console

import bnlora as bl

FULL = {"init_scale": 0.1}


@pytest.fixture(scope="module")
def good():
    given = problem(scale=1.0, rows=400, truth=0.3)
    return given, given.fit(bl.guides.full(**FULL), num_steps=600, rate=0.05)


@pytest.fixture(scope="module")
def page(good):
    given, fit = good
    return bl.diagnose(fit.draw_key, fit, given.others)


def test_a_good_fit_raises_no_alarm(page):
    assert page.passed, page
    assert {f.name: f.status for f in page.findings if f.status != "fine"} == {"restarts": "not asked"}
    assert len({f.name for f in page.findings}) == len(page.findings)


def test_it_prints_in_terminals_and_notebooks(page):
    lines = repr(page).splitlines()
    assert lines[0].startswith(f"Diagnosis from 400 draws: {len(page.findings) - 1} fine, 1 not asked")
    assert max(map(len, lines)) <= 110
    html = page._repr_html_()
    assert html.count("<tr") == len(page.findings)
    assert "<script" not in html
    console = Console(file=io.StringIO(), width=90)
    console.print(page)
    assert "k-hat" in console.file.getvalue()
    with pytest.raises(KeyError, match="no finding 'khat'"):
        page["khat"]


def test_it_survives_copy_and_pickle(page):
    for again in (copy.deepcopy(page), pickle.loads(pickle.dumps(page))):
        assert again.findings == page.findings
        assert again._repr_html_() == page._repr_html_()


def test_the_same_call_gives_the_same_page(good, page):
    given, fit = good
    assert bl.diagnose(fit.draw_key, fit, given.others).findings == page.findings
    other = bl.diagnose(jax.random.key(5), fit, given.others, num_draws=100)
    assert other["k-hat"].number != page["k-hat"].number


def test_restarts_are_held_against_it(good):
    given, fit = good
    again = given.fit(bl.guides.full(**FULL), num_steps=600, rate=0.05, seed=1)
    page = bl.diagnose(fit.draw_key, fit, given.others, restarts=[again])
    assert page["restarts"].status == "fine"


@pytest.mark.parametrize(
    ("num_steps", "decays"),
    [(40, True), pytest.param(100, False, marks=pytest.mark.thorough)],
    ids=["too few steps", "too low a rate"],
)
def test_a_fit_that_has_not_converged(num_steps, decays):
    given = problem(scale=1.0, rows=400, truth=3.0)  # further away than so many steps can go
    fit = given.fit(bl.guides.full(**FULL), num_steps=num_steps, rate=0.01, decays=decays)
    page = bl.diagnose(fit.draw_key, fit, given.others)
    assert page["convergence"].status == "problem", page
    assert "convergence" in page["k-hat"].remedy


def test_a_fit_whose_last_steps_jumped(good):
    """The bound shows no trend; the last step and the weights of its parameters give the jump away.

    The jump is planted: a path at too high a rate is chaotic, so rounding decides where it ends.
    """
    given, fit = good
    jumped = {n: x + 1.0 if n.endswith("loc") else x for n, x in fit.params.items()}  # seven sd
    page = bl.diagnose(fit.draw_key, replace(fit, params=jumped), given.others)
    found = {finding.name for finding in page.problems}
    assert {"last step", "k-hat"} <= found, page
    assert page["last step"].number > 20
    assert page["k-hat"].number > 2
    assert "longer fit" in page["k-hat"].remedy


def test_a_scale_that_has_collapsed(good):
    """Draws that do not differ in float32, of a guide that has a density."""
    given, fit = good
    params = {n: jnp.full_like(x, 1e-30) if n.endswith("tril") else x for n, x in fit.params.items()}
    found = bl.diagnose(fit.draw_key, replace(fit, params=params), given.others, num_draws=25)["k-hat"]
    assert (found.status, "collapsed" in found.sentence) == ("problem", True)


def test_a_prior_that_is_far_too_narrow(good):
    given = problem(scale=1e-3)
    page = bl.diagnose(
        jax.random.key(0), given.fit(bl.guides.full(init_scale=1e-3), num_steps=300, rate=1e-3), given.others
    )
    assert page["prior predictive"].status == "problem", page
    assert "raise the prior's scale" in page["prior predictive"].remedy


def test_a_posterior_that_is_the_prior():
    """Two rows cannot move a prior that is a hundredth of what they ask for."""
    given = problem(scale=0.01, rows=4)
    page = bl.diagnose(
        jax.random.key(0), given.fit(bl.guides.full(init_scale=0.01), num_steps=300, rate=1e-3), given.others
    )
    assert page["learned"].status == "problem", page
    assert page["learned"].number > 0.9


def test_a_posterior_that_fights_a_narrow_prior():
    given = problem(scale=0.02, rows=600, truth=3.0)
    page = bl.diagnose(
        jax.random.key(0), given.fit(bl.guides.full(init_scale=0.02), num_steps=400, rate=0.01), given.others
    )
    assert page["prior and posterior"].status == "problem", page
    assert "raise" in page["prior and posterior"].remedy


def test_a_prior_that_is_far_too_wide():
    given = problem(scale=100.0)
    page = bl.diagnose(
        jax.random.key(0), given.fit(bl.guides.full(init_scale=1.0), num_steps=400, rate=0.3), given.others
    )
    assert page["prior predictive"].status == "caution", page
    assert "confident nonsense" in page["prior predictive"].sentence
    assert "lower the prior's scale" in page["prior predictive"].remedy


def test_a_guide_that_is_too_narrow_for_a_correlated_posterior():
    given = problem(scale=1.0, angle=0.2, rows=400)
    narrow = given.fit(bl.guides.mean_field(**FULL), num_steps=600, rate=0.05)
    page = bl.diagnose(narrow.draw_key, narrow, given.others)
    assert page["convergence"].status == "fine", page
    assert page["k-hat"].status in ("caution", "problem")
    assert "richer family" in page["k-hat"].remedy
    wide = given.fit(bl.guides.full(**FULL), num_steps=600, rate=0.05)
    assert bl.diagnose(wide.draw_key, wide, given.others)["k-hat"].status == "fine"
