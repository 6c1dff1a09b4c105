"""Steps run several in a call: no result, no stop and no record depends on how many."""

import jax
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.infer.svi import watch
from bnlora.infer.svi.step import CHUNK, Step
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS = tiny_rows(jax.random.key(2), 24)
OTHERS = tiny_rows(jax.random.key(3), 12)
MODEL = bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=2), bl.priors.normal(), label_ids=(3, 5))
LONG = 10.0
"""Seconds between two looks that no call of these fits reaches, so that calls are as long as can be."""


def fitted(num_steps=100, rate=0.05, **options) -> bl.Fit:
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
    return bl.fit(KEY, MODEL, guide, ROWS, optax.adam(rate), num_steps=num_steps, batch_size=8, **options)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of steps in each call of the program."""
    counts, run = [], Step.run

    def counted(self, state, key, rows):
        counts.append(len(rows))
        return run(self, state, key, rows)

    monkeypatch.setattr(Step, "run", counted)
    return counts


def both(monkeypatch, **options) -> tuple[bl.Fit, bl.Fit]:
    """The fit with one step in each call, and with as many as there may be."""
    monkeypatch.setattr(watch, "LOOK", 0.0)
    single = fitted(**options)
    monkeypatch.setattr(watch, "LOOK", LONG)
    return single, fitted(**options)


def assert_same(first: bl.Fit, second: bl.Fit) -> None:
    """Bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    jax.tree.map(np.testing.assert_array_equal, first.last_params, second.last_params)
    jax.tree.map(np.testing.assert_array_equal, first.history, second.history)
    jax.tree.map(np.testing.assert_array_equal, first.validation, second.validation)
    assert (first.stopped, first.best_step) == (second.stopped, second.best_step)
    assert first.skipped_steps == second.skipped_steps


RULES = {
    "no rule": {},
    "validation": {"validation": OTHERS, "early_stopping": bl.EarlyStopping(every=7, patience=100)},
    "patience": {
        "validation": OTHERS,
        "early_stopping": bl.EarlyStopping(every=3, patience=2),
        "rate": 0.5,
    },
    "plateau": {"plateau": bl.Plateau(window=10, tolerance=200.0), "num_steps": 300},
}
ENDS = {"no rule": "steps", "validation": "steps", "patience": "patience", "plateau": "plateau"}


@pytest.mark.parametrize("name", RULES)
def test_the_number_of_steps_in_a_call_changes_no_bit(name, monkeypatch, calls):
    single, several = both(monkeypatch, **RULES[name])
    assert single.stopped == ENDS[name]
    assert_same(single, several)
    alone = len(single.step_seconds)
    assert calls[:alone] == [1] * alone
    assert max(calls[alone:]) > 1


def test_a_call_ends_where_rows_are_evaluated(monkeypatch, calls):
    monkeypatch.setattr(watch, "LOOK", LONG)
    fit = fitted(validation=OTHERS, early_stopping=bl.EarlyStopping(every=7, patience=100), num_steps=24)
    assert calls == [1, 1, 5, 7, 7, 3]
    assert fit.validation["step"].tolist() == [7, 14, 21, 24]


def test_a_plateau_within_a_call_runs_it_again_with_fewer_steps(monkeypatch, calls):
    monkeypatch.setattr(watch, "LOOK", LONG)
    fit = fitted(**RULES["plateau"])
    *_, cut, again = calls
    assert 1 <= again < cut <= CHUNK
    assert sum(calls) - cut == len(fit.step_seconds)


def test_a_fit_stops_at_the_step_that_breaks_the_budget(monkeypatch):
    """Descent with a rate beyond all measure: the third step that is not finite ends the fit."""
    ends = []
    for seconds in (0.0, LONG):
        monkeypatch.setattr(watch, "LOOK", seconds)
        guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
        budget = bl.Optimisation(skip_budget=2)
        with pytest.raises(bl.FitDiverged) as error:
            bl.fit(KEY, MODEL, guide, ROWS, optax.sgd(1e30), num_steps=50, batch_size=8, optimisation=budget)
        ends.append(error.value.fit)
    assert_same(*ends)
    assert ends[0].skipped_steps == 3


def test_steps_by_hand_are_those_of_a_fit(monkeypatch):
    monkeypatch.setattr(watch, "LOOK", LONG)
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
    step, state = bl.svi_step(KEY, MODEL, guide, ROWS, optax.adam(0.05), batch_size=8)
    rows = np.arange(24).reshape(3, 8)
    together = step.run(state, KEY, rows)
    step.steps.cut(0)
    one = state
    for row in rows:
        one = step.run(one, KEY, row[None])
    jax.tree.map(np.testing.assert_array_equal, one, together)
    assert step.num_traces == 1


def test_a_hook_sees_every_step(monkeypatch, calls):
    monkeypatch.setattr(watch, "LOOK", LONG)
    seen = []
    fit = fitted(num_steps=5, on_step=lambda step, params: seen.append(step))
    assert seen == list(range(1, 6))
    assert calls == [1] * 5
    assert len(fit.step_seconds) == 5


def test_an_interrupt_within_a_call_keeps_the_state_before_it(monkeypatch):
    monkeypatch.setattr(watch, "LOOK", LONG)
    run = Step.run

    def interrupted(self, state, key, rows):
        after = run(self, state, key, rows)
        if len(self.steps) > 2:
            raise KeyboardInterrupt  # when the program has returned and nobody has kept its state
        return after

    monkeypatch.setattr(Step, "run", interrupted)
    fit = fitted()
    assert fit.stopped == "interrupted"
    assert len(fit.step_seconds) == len(fit.history["elbo"]) == 2
    monkeypatch.setattr(Step, "run", run)
    short = fitted(num_steps=2)
    jax.tree.map(np.testing.assert_array_equal, fit.params, short.params)
