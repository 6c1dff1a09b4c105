"""Faults during a fit or a prediction: nothing that was computed is lost, and the error is one sentence."""

import functools
import io
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import bnlora as bl
from bnlora.infer.svi import exhausted
from bnlora.infer.svi import step as steps
from bnlora.infer.svi.step import Step
from bnlora.program.model import Classifier
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS = tiny_rows(jax.random.key(2), 24)
SITES = bl.select(BASE, ["lm_head"], rank=2)
MODEL = bl.Classifier(BASE, SITES, bl.priors.normal(), label_ids=(3, 5))
ADAM = optax.adam(0.05)
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.\nmore lines"


def fitted(rule=ADAM, family=None, model=MODEL, rows=ROWS, num_steps=20, **options) -> bl.Fit:
    guide = bl.guides.Guide(model.prior, family or bl.guides.mean_field())
    return bl.fit(KEY, model, guide, rows, rule, num_steps=num_steps, batch_size=8, **options)


@functools.cache
def unbroken() -> bl.Fit:
    """The fit without a fault."""
    return fitted()


def assert_same(first: bl.Fit, second: bl.Fit) -> None:
    """Bit by bit."""
    for name in ("params", "last_params", "history"):
        jax.tree.map(np.testing.assert_array_equal, getattr(first, name), getattr(second, name))


WORDS = bl.likelihoods.Words((3, 5))
OUTCOMES = {
    "a value": (
        bl.likelihoods.Regression(WORDS),
        jnp.arange(24.0),
        "values of the training rows must be fin",
    ),
    "a vote": (bl.likelihoods.SoftLabels(WORDS), jnp.ones((24, 2)), "votes of the training rows must be at"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_rows_with_an_outcome_that_is_not_a_number_are_refused_before_the_fit(name):
    likelihood, outcomes, message = OUTCOMES[name]
    model = bl.Classifier(BASE, SITES, bl.priors.normal(), likelihood=likelihood)
    rows = replace(ROWS, outcomes=outcomes.at[(13,) + (0,) * (outcomes.ndim - 1)].set(jnp.nan))
    with pytest.raises(ValueError, match=message):
        fitted(model=model, rows=rows)


DIVERGING = {
    "a flow": {"rule": optax.sgd(1e30), "family": bl.guides.row_shared(hidden=4, blocks=1)},
    "a scale": {"optimisation": bl.Optimisation(scale_optimizer=optax.sgd(1e30), skip_budget=2)},
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_fit_that_diverges_keeps_its_last_finite_state(name):
    options = {"optimisation": bl.Optimisation(skip_budget=2)} | DIVERGING[name]
    with pytest.raises(bl.FitDiverged, match=r"3 of \d+ steps .*; lower the learning rate or") as error:
        fitted(**options)
    fit = error.value.fit
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fit.params))
    assert fit.skipped_steps == 3 < len(fit.history["elbo"]) < 20


def exhausted_after(count: int, monkeypatch) -> None:
    """Let the device run out of memory after this many steps."""
    run = Step.run

    def without_memory(self, *arguments):
        if len(self.steps) >= count:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        return run(self, *arguments)

    monkeypatch.setattr(Step, "run", without_memory)


def test_a_step_without_memory_loses_no_step_and_names_smaller_ones(tmp_path, monkeypatch):
    """The figures are those of `bl.estimate`; with more memory the same call goes on bit for bit."""
    kept = bl.Checkpoints(tmp_path, every=100)
    with monkeypatch.context() as patch:
        exhausted_after(2, patch)
        with pytest.raises(bl.FitOutOfMemory) as error:
            fitted(checkpoints=kept)
    assert isinstance(error.value, MemoryError)
    assert error.value.fit.stopped == "memory"
    assert len(error.value.fit.history["elbo"]) == 2
    text = str(error.value)
    assert text.startswith("the memory is exhausted (Out of memory allocating 70368744177664 bytes); a step ")
    assert text.endswith("(the state after 2 steps is in this error's `fit`)")
    assert "\n" not in text
    size = bl.estimate(BASE, SITES, bl.priors.normal(), batch=(8, ROWS.tokens.shape[1]), num_rows=24)
    assert f"needs {size.temporary / 2**20:,.1f} MiB beside its arguments by bl.estimate" in text
    assert_same(fitted(checkpoints=kept), unbroken())


def test_smaller_steps_are_those_that_take_less():
    rows = {
        ("none", 1): 90,
        ("elementwise", 1): 50,
        ("layers", 1): 40,
        ("elementwise", 4): 20,
        ("layers", 4): 60,
    }
    size = SimpleNamespace(steps=rows, temporary=50)
    assert exhausted._smaller(size, bl.Memory(), "elementwise") == [
        ("accumulate=4", 20),
        ('remat="layers"', 40),
    ]
    assert exhausted._smaller(size, bl.Memory(accumulate=4), "elementwise") == []


def test_rows_of_a_model_without_the_rule_have_an_answer_too():
    """An encoder has no estimate; its error must not hide that of the device."""
    encoder = SimpleNamespace(base=None, sites=None, prior=None, num_classes=2)
    text = exhausted.smaller_step(encoder, None, ROWS, ADAM, bl.Memory(), (8, 1))
    assert text.endswith("lower batch_size, or pass memory=bl.Memory(accumulate=...)")


def test_a_prediction_without_memory_names_a_smaller_one(monkeypatch):
    def without_memory(*_):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    fit = unbroken()
    monkeypatch.setattr(Classifier, "compiled_outputs", without_memory)
    with pytest.raises(MemoryError) as error:
        bl.predict(KEY, fit, ROWS, num_draws=4, batch_size=16, draws_together=2)
    text = str(error.value)
    assert "batch_size=16 and draws_together=2" in text
    assert "pass batch_size=8 or draws_together=1" in text
    (call,) = re.findall(r"bl\.estimate\(.*\)\.prediction", text)
    names = {"bl": bl, "base": BASE, "sites": SITES, "prior": bl.priors.normal()}
    assert eval(call, names) > 0  # the advice is a call that runs


def test_another_error_of_the_device_stays_what_it_is(monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(Step, "run", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitted()


def test_a_clock_that_jumps_by_hours_changes_nothing(monkeypatch):
    """Forwards and backwards, and one that stands still; with the progress bar, which shows the speed."""
    times = iter(np.cumsum(np.resize([3600.0, -7200.0, 5.0, 0.0, 0.0], 500)).tolist())
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    bar = Console(file=io.StringIO(), force_terminal=True)
    assert_same(fitted(console=bar), unbroken())


def test_a_second_interrupt_ends_the_program(tmp_path, monkeypatch):
    """The first one is caught, to keep the state; the second comes while the state is written."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "run", interrupted)
    assert fitted().stopped == "interrupted"
    monkeypatch.setattr("bnlora.infer.svi.resume.Kept.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoints=bl.Checkpoints(tmp_path))
