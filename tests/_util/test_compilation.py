"""Compiled programs: their number, sharing, and that pieces do not change results."""

import copy
import pickle
from functools import partial
from importlib import import_module

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders.compilations import counting
from builders.unfitted import unfitted
from numpyro.infer.util import log_density
from rich.console import Console

import bnlora as bl
from bnlora._util import compilation
from bnlora.assess.prior_draws import draw_prior
from bnlora.infer.svi import step
from bnlora.infer.svi.elbo import initial_parameters
from bnlora.prediction.functions import evaluate, identifiable
from bnlora.program.draws import adapters_at, draw_both
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1))
ROWS = tiny_rows(jax.random.key(2), 40)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def fit():
    """Two families, above a layer that no adapter changes."""
    sites = bl.select(BASE, ["q_proj", "k_proj"], rank=2, layers=[1, 3])
    model = bl.Classifier(BASE, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    return bl.fit(KEY, model, guide, ROWS, optax.adam(1e-2), num_steps=12, batch_size=8, console=QUIET)


@pytest.mark.slow
def test_one_program_for_every_call_and_every_number_of_draws(fit):
    """The five functions share what they run: guide, prior, and the forward pass of each shape of rows."""
    with counting() as first:
        bl.predict(KEY, fit, ROWS, num_draws=70, console=QUIET)
    # Guide, prior at sites, forward pass, the layers below it, and the keys of so many draws.
    assert first.total() <= 5, first
    with counting() as again:
        bl.predict(jax.random.key(1), fit, ROWS, num_draws=70, console=QUIET)
        fit.draws(KEY, 70)
    assert not again, again
    with counting() as tree:
        bl.to_arviz(fit.draw_key, fit, ROWS, num_draws=40)
    assert tree.total() <= 2, tree  # the keys of so many draws
    with counting() as page:
        bl.diagnose(fit.draw_key, fit, ROWS, num_draws=40, console=QUIET)
    # Draws of the prior, divergences, margins of the probe rows, and what makes keys.
    assert page.total() <= 10, page
    with counting() as compared:
        bl.compare(KEY, fit, fit, ROWS, num_draws=40, against="anything", console=QUIET)
    assert compared.total() <= 6, compared


def test_pieces_and_halves_are_the_draws_of_one_program(fit):
    """Two full pieces and a part of one: against the guide and the prior run together, and by themselves."""
    arguments = {"model": fit.model, "guide": fit.guide, "params": fit.params}
    whole, adapters = jax.jit(lambda key: draw_both(key, **arguments, num_draws=70))(KEY)
    draw, got = fit.draws(KEY, 70)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (draw, got), (whole, adapters))
    drawn = fit.draw_adapters(KEY, 70)
    jax.tree.map(np.testing.assert_array_equal, got, drawn)
    # Inside another program, and from a key of the old kind.
    jax.tree.map(close, jax.jit(lambda key: fit.draw_adapters(key, 3))(KEY), fit.draw_adapters(KEY, 3))
    raw = jax.random.key_data(KEY)
    jax.tree.map(np.testing.assert_array_equal, fit.draw_adapters(raw, 3), fit.draw_adapters(KEY, 3))


def test_density_and_adapters_at_given_sites(fit):
    """As of NumPyro's own trace, also where a site is held."""
    draw, _ = fit.draws(KEY, 3)
    held = {
        n: np.broadcast_to(np.asarray(x).mean(0), x.shape) if ".a" in n else x for n, x in draw.sites.items()
    }
    log_prior, parts, adapters = fit.at(held, 3)
    last = {n: jnp.asarray(x[2]) for n, x in held.items()}
    expected = log_density(fit.model.prior, (), {}, {**fit.params, **last})[0]
    np.testing.assert_allclose(log_prior[2], expected, rtol=1e-6)
    np.testing.assert_allclose(log_prior, sum(parts.values()), rtol=1e-6)
    expected = adapters_at(fit.model, fit.params, last)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[2], y, rtol=1e-6), dict(adapters), dict(expected))


def test_draws_of_the_prior_are_those_of_the_prior_program(fit):
    drawn = bl.diagnostics.sample(fit.draw_key, fit, num_draws=25)
    expected = draw_prior(drawn.part(1), fit.model, fit.params, 25)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), drawn.prior_adapters, dict(expected))


def test_small_models_have_one_width_and_others_those_of_their_rows(fit, monkeypatch):
    """Short rows get their own forward pass, in addition to that of all rows."""
    rows, options = tiny_rows(jax.random.key(3), 16, length=16), {"num_draws": 2, "batch_size": 4}
    with counting() as one:
        wide = bl.predict(KEY, fit, rows, console=QUIET, **options)
    monkeypatch.setattr(import_module("bnlora.prediction.predict"), "SMALL", 0)
    with counting() as more:
        narrow = bl.predict(KEY, fit, rows, console=QUIET, **options)
    assert one["jit(_outputs_of_piece)"] == more["jit(_outputs_of_piece)"] == 1
    np.testing.assert_allclose(narrow.draw_log_probs, wide.draw_log_probs, atol=1e-5)


def test_functions_of_many_draws_are_those_of_each(fit):
    """The way through predictions against the functions themselves, one draw after the other."""
    functions, adapters = identifiable(fit.model, ROWS[:3]), fit.draw_adapters(KEY, 5)
    names, values = evaluate(functions, fit.model, adapters, ROWS)
    plain_names, plain = evaluate(lambda *given: functions(*given), fit.model, adapters, ROWS)
    assert names == plain_names
    np.testing.assert_allclose(values, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("total", "multiple", "sizes"), [(70, 1, 32), (5, 1, 32), (5, 4, 32), (70, 3, 30)])
def test_pieces_hold_every_entry_once(total, multiple, sizes):
    found = list(compilation.pieces({"x": np.arange(total)}, multiple=multiple))
    assert {len(piece["x"]) for piece, _ in found} == {sizes}
    counted = np.concatenate([piece["x"][:count] for piece, count in found])
    np.testing.assert_array_equal(counted, np.arange(total))


@pytest.mark.parametrize(("multiple", "size"), [(1, 5), (4, 8)])
def test_few_large_entries_are_not_padded(multiple, size):
    (piece, count), *rest = compilation.pieces(np.arange(5), multiple=multiple, numbers=2**20)
    assert (len(piece), count, rest) == (size, 5, [])


@pytest.mark.parametrize("together", [1, 2])
def test_turns_that_are_not_wanted_are_not_made(together):
    """The loop stops at the count: a turn beyond it would call back."""
    seen = []

    def one(x, shift):
        jax.debug.callback(lambda x: seen.append(float(x)), x)
        return x + shift

    run = jax.jit(lambda x, count: compilation.first_entries(one, x, count, 10.0, together=together))
    got = run(jnp.arange(8.0), 3)
    jax.effects_barrier()
    np.testing.assert_array_equal(got[:3], [10.0, 11.0, 12.0])
    assert sorted(seen) == list(range(-(-3 // together) * together))
    np.testing.assert_array_equal(got[len(seen) :], 0)


class Owner:
    """Something that keeps programs."""

    def __init__(self):
        self.factor = 3.0


def scaled(owner, x):
    return owner.factor * x


def test_a_program_lives_with_its_owner():
    owner = Owner()
    run = compilation.program(owner, scaled)
    assert run(2.0) == 6.0
    assert compilation.program(owner, scaled) is run
    assert compilation.program(Owner(), scaled) is not run
    for again in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert compilation.program(again, scaled) is not run
        assert compilation.program(again, scaled)(2.0) == 6.0


def test_only_the_steps_of_a_long_fit_are_optimised(fit, monkeypatch):
    """The rule of `Step.compiled`, at the last number of steps without and the first with optimisation."""
    if jax.default_backend() != "cpu":
        assert compilation.options() is compilation.options(1) is None
        return
    asked = []
    monkeypatch.setattr(step, "options", lambda level=0: asked.append(level))
    for small, limit in ((10**9, 1000), (0, 60)):
        monkeypatch.setattr(step, "SMALL", small)
        for num_steps in (limit, limit + 1, None):
            step.Step(fit.model, fit.guide, ROWS, lambda params: params, None, 1, num_steps).compiled(8)
    assert [level for level in asked if level is not None] == [0, 0, 0, 1, 0, 1] * 2


def test_jaxs_own_setting_wins():
    if jax.default_backend() != "cpu":
        return

    def level(chosen):
        return compilation.options(chosen)["xla_backend_optimization_level"]

    assert (level(0), level(1)) == (0, 0)  # that of tests
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert (level(0), level(1)) == (0, 1)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_a_fit_compiles_few_programs_beside_its_step():
    """Start values, optimiser and result need one program each, for any number of parameters."""
    sites = bl.select(BASE, ["q_proj", "lm_head"], rank=2)
    model = bl.Classifier(BASE, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    options = {"num_steps": 2, "batch_size": 8, "console": QUIET}
    with counting() as found:
        made = bl.fit(KEY, model, guide, ROWS, optax.adam(1e-2), **options)
    assert found["jit(several)"] == found["jit(start_values)"] == found["jit(constrain)"] == 1, found
    assert found.total() <= 14, found
    assert made.num_traces == 1


@pytest.mark.thorough
def test_chains_that_start_from_a_fit_compile_few_programs():
    """A prior that runs outside of a program compiles each of its operations: 450 for such a run, once."""
    sites = bl.select(BASE, ["q_proj", "k_proj"], rank=2, layers=[1, 3])
    model = bl.Classifier(BASE, sites, bl.priors.sparse_gp(rows=2, cols=2), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    start, constrain = initial_parameters(KEY, model, guide)
    fit = unfitted(model, guide, ROWS, constrain(start))
    jax.clear_caches()
    short = {"num_warmup": 20, "num_draws": 4, "num_chains": 2, "console": QUIET}
    with counting() as found:
        bl.sample_nuts(KEY, model, ROWS, sites=["q_proj"], given=fit, **short)
    assert found.total() < 80, found
