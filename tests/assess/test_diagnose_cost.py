"""What a page costs: forward passes of one row under one draw, and the bar that counts them."""

import io

import jax
import optax
import pytest
from rich.console import Console

import bnlora as bl
from bnlora._util.finding import Finding
from bnlora._util.progress import OneBar
from bnlora.assess.diagnostics import page as pages
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.sample import is_hopeless
from bnlora.metrics.khat import KHat
from bnlora.program.model import Classifier
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
QUIET = Console(quiet=True)
TRAIN, GIVEN, PRIOR = 64, 32, 32


@pytest.fixture(scope="module")
def fit():
    """Three families under a guide whose weights fail, because it has hardly moved."""
    sites = bl.select(tiny_base(jax.random.key(1), num_layers=1), ["q_proj", "v_proj", "lm_head"], rank=2)
    base = tiny_base(jax.random.key(1), num_layers=1)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=1.0))
    rows = tiny_rows(jax.random.key(2), TRAIN)
    adam = optax.adam(1e-6)
    return bl.fit(
        KEY,
        model,
        guide,
        rows,
        adam,
        optimisation=bl.Optimisation(scale_optimizer=adam),
        num_steps=60,
        batch_size=TRAIN,
    )


@pytest.fixture
def passes(monkeypatch):
    """Passes so far, in a list of one number."""
    total, run = [0], Classifier.compiled_outputs

    def counted(self, adapters, count, batch, together=1):
        total[0] += count * len(batch)
        return run(self, adapters, count, batch, together)

    monkeypatch.setattr(Classifier, "compiled_outputs", counted)
    return total


def given():
    return tiny_rows(jax.random.key(3), GIVEN)


def test_a_page_shares_its_passes(fit, passes):
    """Each set of rows runs once, under as many draws as it needs.

    One set of 400 draws for everything and k-hat of each family took 64 * 400 * 4 + 32 * 400 + 3 * 8 * 400 +
    32 * 401 = 137,632 passes for this page.
    """
    page = bl.diagnose(fit.draw_key, fit, given(), console=QUIET)
    assert page["k-hat"].status == "problem"
    assert (page.num_draws, page.num_used) == (400, pages.FIRST_LOOK)
    assert passes[0] == pages.FIRST_LOOK * (TRAIN + GIVEN + PRIOR) + 2 * 8 * 400 == 10_496


def test_a_given_number_of_draws_is_used_for_all_rows(fit, passes):
    page = bl.diagnose(fit.draw_key, fit, given(), num_draws=40, console=QUIET)
    assert (page.num_draws, page.num_used) == (40, 40)
    assert passes[0] == 40 * (TRAIN + GIVEN) + 41 * PRIOR + 2 * 8 * 40


def test_what_is_costly_runs_on_request_only(fit, passes):
    page = bl.diagnose(fit.draw_key, fit, given(), num_draws=40, console=QUIET)
    finding, before = page["k-hat by family"], passes[0]
    assert (finding.status, "families=True" in finding.remedy) == ("not asked", True)
    assert page.khat.families == {}
    assert (page["restarts"].status, page.restarts) == ("not asked", None)
    full = bl.diagnose(fit.draw_key, fit, given(), num_draws=40, families=True, console=QUIET)
    assert full["k-hat by family"].number is not None
    assert set(full.khat.families) == {"q_proj", "v_proj", "lm_head"}
    assert passes[0] - before == before + 3 * 40 * TRAIN


@pytest.mark.parametrize("options", [{}, {"num_draws": 40, "families": True}])
def test_one_bar_counts_every_pass(fit, monkeypatch, options):
    bars = []

    class Kept(OneBar):
        def __init__(self, console, work):
            super().__init__(console, work)
            bars.append(self)

        def part(self, label, work):
            labels.append(label)
            return super().part(label, work)

    labels: list[str] = []
    monkeypatch.setattr(pages, "OneBar", Kept)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bl.diagnose(fit.draw_key, fit, given(), console=console, **options)
    (task,) = bars[0].bar.tasks
    assert task.completed == pytest.approx(task.total)
    assert labels[0] == "training rows"
    assert {"given rows", "draws of the prior"} <= set(labels)
    assert "training rows" in console.file.getvalue()


def test_draws_are_added_unless_weights_fail_for_certain():
    """Of 32 draws six are in the tail, so that the error of k is (1 + k) / 6^(1/2)."""
    assert not is_hopeless(KHat(0.1, 32))
    assert not is_hopeless(KHat(3.0, 32))
    assert is_hopeless(KHat(11.0, 32))
    assert is_hopeless(KHat(float("inf"), 32))
    assert not is_hopeless(KHat(float("-inf"), 32))
    assert is_hopeless(KHat(2.0, 400))
    assert not is_hopeless(KHat(1.2, 400))  # which side of one it is on is not certain


def test_a_diagnostic_is_one_line_of_the_list(fit, monkeypatch):
    """It is measured, judged, shown, and an attribute of the page."""
    many = Diagnostic(
        name="rows",
        measurement="num_rows",
        measure=lambda exam: len(exam.fit.train),
        judge=lambda n, exam: Finding("rows", "caution", f"{n} rows of {exam.fit.model.kind}", n, 100),
    )
    monkeypatch.setattr(pages, "DIAGNOSTICS", (*pages.DIAGNOSTICS, many))
    page = bl.diagnose(fit.draw_key, fit, given(), num_draws=40, console=QUIET)
    assert page.num_rows == page["rows"].number == TRAIN
    assert "num_rows" in dir(page)
    assert "64 rows of network" in page._repr_html_()
    with pytest.raises(AttributeError, match="no 'rhat'; its measurements are num_steps, bound"):
        assert page.rhat
