"""The fit: what it trains and what it leaves alone, its record, and how it ends."""

import re
from dataclasses import replace
from functools import partial
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders.programs import walk
from builders.thorough import sample_of
from numpyro import handlers
from numpyro.infer.autoguide import AutoNormal
from rich.console import Console

import bnlora as bl
from bnlora.data.batch import CachedActivations
from bnlora.infer.svi.elbo import TERMS, elbo_terms
from bnlora.infer.svi.result import divergence_remedy
from bnlora.infer.svi.step import prepared_step
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1))
TRAIN = tiny_rows(jax.random.key(2), 50)


def make(prior=None, base=BASE, targets=("q_proj",), *, flow=False):
    """A model and guide whose step compiles quickly: one family, and no flow or a small one."""
    sites = bl.select(base, targets, rank=2, layers=[2, 3])
    model = bl.Classifier(base, sites, prior or bl.priors.normal(), label_ids=(3, 5))
    if flow:
        return model, bl.guides.SiteFlow(model.prior, hidden=4, blocks=1)
    return model, bl.guides.Guide(model.prior, bl.guides.mean_field())


def scales_by_descent(rate: float, **options) -> bl.Optimisation:
    return bl.Optimisation(scale_optimizer=optax.sgd(rate), **options)


def run(model, guide, train=TRAIN, optimizer=None, num_steps=6, batch_size=16, **options):
    optimizer = optimizer or optax.adam(1e-2)
    return bl.fit(KEY, model, guide, train, optimizer, num_steps=num_steps, batch_size=batch_size, **options)


@pytest.fixture(scope="module")
def whole():
    """A fit with the prior of the method on two kinds of module."""
    return run(*make(bl.priors.sparse_gp(rows=2, cols=2), targets=("q_proj", "lm_head"), flow=True))


def same_tree(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def test_one_compilation_and_a_base_that_stays_as_it_was():
    base = tiny_base(jax.random.key(1))
    before = jax.tree.map(lambda x: np.array(x), base.weights)
    fit = run(*make(base=base))  # 50 rows in batches of 16: the fourth batch straddles two epochs
    assert fit.num_traces == 1
    jax.tree.map(np.testing.assert_array_equal, before, base.weights)


@pytest.mark.slow
def test_trained_are_the_parameters_of_guide_and_prior_alone(whole):
    guide, prior = (
        {n for n, s in handlers.trace(handlers.seed(f, KEY)).get_trace().items() if s["type"] == "param"}
        for f in (whole.guide, whole.model.prior)
    )
    assert set(whole.params) == guide | prior
    assert whole.num_traces == 1


def test_the_step_forms_no_gradient_of_the_base(whole):
    """No operation of the backward pass has the shape of a frozen kernel beside a batch of rows."""
    model, guide = whole.model, whole.guide
    args = (model.base.weights, TRAIN[:4], 50)
    loss = lambda p: elbo_terms(KEY, p, model, guide, *args)["elbo"]  # noqa: E731
    kernel = model.base.weights["layers"]["down_proj"][...].shape[1:]
    made = [
        equation
        for equation in walk(jax.make_jaxpr(jax.grad(loss))(whole.params).jaxpr)
        if equation.primitive.name == "dot_general"
        and equation.outvars[0].aval.shape in (kernel, kernel[::-1])
    ]
    assert not made


def test_record_has_every_term_of_every_step_and_they_add_up(whole):
    assert set(whole.history) == set(TERMS)
    h = whole.history
    assert len(h["elbo"]) == len(whole.step_seconds) == 6
    np.testing.assert_allclose(h["elbo"], h["data"] - h["inducing_kl"] - h["conditional_kl"], rtol=1e-5)
    assert "6 steps, 0 skipped" in repr(whole)


def test_repr_averages_the_finite_ones_of_the_last_steps(whole):
    history = {name: np.arange(100.0) for name in TERMS}
    assert "mean of the last 50 steps: elbo 74.5, data 74.5" in repr(replace(whole, history=history))
    broken = history | {"data": np.where(np.arange(100) == 99, np.nan, np.arange(100.0))}
    assert "49 finite of the last 50 steps: elbo 74.0, data 74.0" in repr(replace(whole, history=broken))
    empty = {name: np.zeros(0) for name in TERMS}  # of a fit that was interrupted in its first step
    assert repr(replace(whole, history=empty)).endswith("mean of the last 50 steps: none")


@pytest.mark.slow
def test_same_key_same_fit():
    first, second = (run(*make(flow=True)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_bound_rises():
    fit = run(*make(), num_steps=150, optimizer=optax.adam(2e-2))
    assert fit.history["elbo"][-20:].mean() > fit.history["elbo"][:20].mean()


def test_point_estimate_learns_the_task():
    fit = run(
        *make(bl.priors.point(), targets=("q_proj", "lm_head")), num_steps=300, optimizer=optax.adam(2e-2)
    )
    prediction = bl.predict(KEY, fit, TRAIN, num_draws=1)
    assert bl.metrics.accuracy(prediction.log_probs, TRAIN.labels) > 0.9


@pytest.mark.slow
def test_prefix_cache_changes_nothing():
    cached, plain = (run(*make(), prefix_cache=where) for where in ("memory", "off"))
    np.testing.assert_allclose(cached.history["elbo"], plain.history["elbo"], rtol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), cached.params, plain.params
    )
    predictions = [bl.predict(KEY, cached, rows, num_draws=2) for rows in (TRAIN, cached.train)]
    np.testing.assert_allclose(predictions[0].log_probs, predictions[1].log_probs, atol=1e-5)


def test_prefix_cache_says_its_size_and_refuses_to_exceed_the_limit():
    console = Console(record=True, width=120, file=StringIO())
    model, _ = make()
    rows = bl.cache_prefix(model, TRAIN, console=console)
    hidden = rows.cached.hidden
    assert hidden.nbytes == 50 * 8 * 16 * 4
    assert "prefix cache: 50 rows through 2 of 4 layers, 0.0 MiB" in console.export_text()
    assert bl.cache_prefix(model, rows) is rows
    with pytest.raises(ValueError, match="more than the limit of 0 MiB; raise `memory_limit` or fit with"):
        bl.cache_prefix(model, TRAIN, memory_limit=1000)
    # What another model cached is computed again, from the tokens.
    foreign = replace(rows, cached=CachedActivations(0 * hidden, depth=1))
    np.testing.assert_allclose(model.hidden(BASE.weights, foreign), hidden, atol=1e-5)
    np.testing.assert_allclose(bl.cache_prefix(model, foreign).cached.hidden, hidden, atol=1e-5)
    with pytest.raises(ValueError, match="keep only their last position, .*give the rows as they were read"):
        model.hidden(BASE.weights, replace(foreign, whole=False))


def test_nothing_is_cached_where_the_lowest_layer_is_adapted():
    model = bl.Classifier(BASE, bl.select(BASE, ["q_proj"], rank=1), bl.priors.point(), label_ids=(3, 5))
    assert bl.cache_prefix(model, TRAIN) is TRAIN


def test_head_alone_leaves_nothing_of_the_layers_to_run():
    model, guide = make(targets=("lm_head",))
    assert bl.cache_prefix(model, TRAIN).cached.depth == BASE.num_layers
    fit = run(model, guide)
    assert np.isfinite(fit.history["elbo"]).all()


@pytest.mark.slow
def test_the_program_of_a_step_does_not_grow_with_depth():
    def equations(num_layers: int) -> int:
        base = tiny_base(jax.random.key(1), num_layers=num_layers)
        sites = bl.select(base, ("q_proj", "lm_head"), rank=2)
        model = bl.Classifier(base, sites, bl.priors.sparse_gp(rows=2, cols=2), label_ids=(3, 5))
        guide = bl.guides.SiteFlow(model.prior, hidden=4, blocks=1)
        adam = optax.adam(1e-2)
        loop, state = prepared_step(KEY, model, guide, TRAIN, adam, bl.Optimisation(scale_optimizer=adam))
        program = jax.make_jaxpr(loop.traced)(state, KEY, base.weights, TRAIN, jnp.arange(4)).jaxpr
        return sum(1 for _ in walk(program))

    assert equations(2) == equations(5) > 0


def of_both(a, b):
    return {r".*\.a\.V": a, r".*\.b\.V": b}


SCALED = {
    "row_shared": bl.guides.row_shared(hidden=4, blocks=1),
    "full, matrix_normal": of_both(bl.guides.full(), bl.guides.matrix_normal()),
    "blob, low_rank": of_both(bl.guides.blob(), bl.guides.low_rank(rank=1)),
    "ensemble, iaf": of_both(bl.guides.ensemble(size=2), bl.guides.iaf(hidden=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(SCALED, ["full, matrix_normal"]))
def test_scales_have_their_own_optimizer(name):
    model, _ = make(bl.priors.sparse_gp(rows=2, cols=2), targets=("lm_head",))
    guide = bl.guides.Guide(model.prior, SCALED[name])
    rates = jnp.float32(0.0), jnp.float32(0.1)  # arrays, so that both fits are one program
    start, moved = (
        run(
            model,
            guide,
            optimizer=optax.sgd(0.0),
            optimisation=scales_by_descent(rate),
            num_steps=2,
        )
        for rate in rates
    )
    changed = {n for n in moved.params if not same_tree(moved.params[n], start.params[n])}
    assert changed == {n for n in moved.params if n.endswith((".lam", "scale", "_tril"))}
    assert len(changed - {n for n in changed if n.endswith(".lam")}) >= 2
    np.testing.assert_allclose(start.params["lm_head.a.E.q.lam"], 0.01, rtol=1e-5)


@pytest.mark.slow
def test_each_group_is_clipped_to_its_own_norm():
    """Plain gradient descent with rate 1 moves each group by at most the clipping norm."""
    options = {
        "optimizer": optax.sgd(1.0),
        "optimisation": scales_by_descent(1.0),
        "num_steps": 1,
    }
    start = run(
        *make(flow=True),
        optimizer=optax.sgd(0.0),
        optimisation=scales_by_descent(0.0),
        num_steps=1,
    )
    clipped = scales_by_descent(1.0, clip_norm=1e-3)
    fit = run(*make(flow=True), **options | {"optimisation": clipped})
    locations = [n for n in fit.params if n.endswith((".loc", ".flow", ".frame"))]
    moves = {n: jax.tree.map(jnp.subtract, fit.params[n], start.params[n]) for n in locations}
    assert 0.5e-3 < float(optax.tree.norm(moves)) <= 1.0001e-3


def test_validation_picks_the_best_look_and_stops():
    rule = bl.EarlyStopping(every=2, patience=2, num_draws=2)
    options = {"validation": tiny_rows(jax.random.key(5), 20), "early_stopping": rule, "num_steps": 200}
    fit = run(*make(bl.priors.point()), optimizer=optax.adam(0.3), **options)
    losses = fit.validation["nll"]
    assert fit.best_step == fit.validation["step"][np.argmin(losses)]
    assert len(fit.step_seconds) == fit.best_step + 2 * 2 < 200
    assert not same_tree(fit.params, fit.last_params)
    best = replace(fit, params=fit.params)
    prediction = bl.predict(fit.draw_key, best, options["validation"], num_draws=2)
    nll = bl.metrics.nll(prediction.log_probs, options["validation"].labels)
    np.testing.assert_allclose(nll, losses.min(), rtol=1e-4)  # a point estimate has no other draws


@pytest.mark.slow
def test_particles_average_independent_draws():
    model, guide = make()
    fit = run(model, guide, num_steps=1, num_particles=2)

    @partial(jax.jit, static_argnums=1)
    def bound(key, num_particles):
        args = (model, guide, BASE.weights, TRAIN, 50)
        return elbo_terms(key, fit.params, *args, num_particles=num_particles)["elbo"]

    both = [bound(k, 1) for k in jax.random.split(KEY, 2)]
    np.testing.assert_allclose(bound(KEY, 2), np.mean(both), rtol=1e-5)
    assert both[0] != both[1]


@pytest.mark.slow
def test_any_autoguide_fits():
    model, _ = make(bl.priors.normal())
    fit = run(model, AutoNormal(model.prior, init_loc_fn=bl.guides.init_to_base))
    assert np.isfinite(fit.history["elbo"]).all()
    assert bl.predict(KEY, fit, TRAIN[:4], num_draws=3).draw_log_probs.shape == (3, 4, 2)


# Bad input ------------------------------------------------------------------------------------------


class Fragile:
    """A prior whose adapters turn to NaN as soon as an update has moved them far away."""

    def __call__(self, sites):
        adapters = bl.priors.point()(sites)
        return jax.tree.map(lambda x: jnp.where(jnp.abs(x) > 1e3, jnp.nan, x), adapters)


def test_divergence_keeps_the_last_finite_state():
    model, guide = make(Fragile())
    with pytest.raises(
        bl.FitDiverged, match=r"3 of 4 steps gave .* skip_budget=2; lower the learning rate"
    ) as e:
        run(model, guide, optimizer=optax.sgd(1e6), optimisation=bl.Optimisation(skip_budget=2), num_steps=50)
    assert e.value.fit.skipped_steps == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(e.value.fit.params))
    assert len(e.value.fit.history["elbo"]) == 4


def with_weights(base, name, value):
    """The base with one entry of a frozen array replaced."""

    def changed(path, x):
        return x.at[(0,) * x.ndim].set(value) if name in jax.tree_util.keystr(path) else x

    return replace(base, weights=jax.tree_util.tree_map_with_path(changed, base.weights))


def test_a_base_that_is_not_finite_is_no_matter_of_the_rate():
    """Nor do validation rows, whose predictions are not finite either, lose what there is."""
    model, guide = make(base=with_weights(BASE, "down_proj", jnp.nan), targets=("lm_head",))
    rule = bl.EarlyStopping(every=1, num_draws=1)
    with pytest.raises(bl.FitDiverged, match=r"base are not finite, in layers.down_proj; load") as e:
        run(
            model,
            guide,
            validation=TRAIN[:4],
            early_stopping=rule,
            optimisation=bl.Optimisation(skip_budget=2),
        )
    assert "learning rate" not in str(e.value)
    assert list(e.value.fit.validation["nll"]) == [np.inf] * 2
    assert e.value.fit.stopped == "diverged"


def test_the_cause_of_a_divergence_is_looked_for_at_the_start(whole):
    """Terms of the first step, the untouched base, and what of them is not finite."""

    def remedy(fit=whole, skipped=6, **first):
        history = {n: np.concatenate([[first.get(n, 0.0)], np.full(5, np.nan)]) for n in TERMS}
        return divergence_remedy(replace(fit, history=history, skipped_steps=skipped))

    assert remedy(skipped=5) == "lower the learning rate or the prior's scale"
    assert remedy(elbo=-np.inf, data=-np.inf).startswith("the likelihood is not finite at the start although")
    both = remedy(elbo=np.nan, inducing_kl=np.inf, data=np.nan)
    assert both.startswith("inducing_kl and data are not finite at the start, so no learning rate helps")
    assert remedy().startswith("the bound is finite at the start and its gradient is not")
    large = with_weights(BASE, "final_norm", 3e38)
    over = replace(whole, model=whole.model.over(large))
    assert re.search(r"own logits are not finite in \d+ of the first 8 training", remedy(over, elbo=np.nan))
    many = replace(whole, model=whole.model.over(with_weights(BASE, "_", np.inf)))
    assert re.search(r"in final_norm, .*, layers.k_proj and \d more; load it again", remedy(many, skipped=1))


def test_skipped_steps_within_the_budget_are_counted():
    fit = run(
        *make(Fragile()), optimizer=optax.sgd(1e6), optimisation=bl.Optimisation(skip_budget=10), num_steps=4
    )
    assert fit.skipped_steps == 3
    assert "3 skipped" in repr(fit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 51}, "at most the number of training rows; got 51 for 50 rows, nearest is 50"),
        ({"train": TRAIN[:1]}, "at most the number of training rows; got 16 for 1 rows, nearest is 1"),
        ({"train": TRAIN[:0]}, "number of rows must be at least 1; got 0"),
        ({"train": replace(TRAIN, labels=-jnp.ones(50, jnp.int32))}, "training rows have no labels"),
        ({"prefix_cache": "disk"}, r"prefix_cache must be one of \('memory', 'off'\); got 'disk', nearest"),
        ({"early_stopping": bl.EarlyStopping()}, "early_stopping needs validation rows"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        run(*make(), **changes)


@pytest.mark.slow
def test_start_is_where_a_fit_starts():
    """Another key and a step of no length: the parameters are those given, scales and `lam` included."""
    model, guide = make(bl.priors.sparse_gp(rows=2, cols=2), targets=("lm_head",), flow=True)
    first = run(model, guide, num_steps=2)
    still = {
        "optimizer": optax.sgd(0.0),
        "optimisation": scales_by_descent(0.0),
        "init_params": first.params,
    }
    again = bl.fit(jax.random.key(9), model, guide, TRAIN, num_steps=1, batch_size=16, **still)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), again.params, first.params)
    assert again.num_traces == 1


def test_start_of_other_parameters_is_refused():
    model, guide = make(targets=("lm_head",))
    params = run(model, guide, num_steps=1).params
    name = "lm_head.a.q.scale"
    renamed = {n.replace("lm_head.a.q.scale", "lm_head.a.scale"): x for n, x in params.items()}
    for start, message in [
        ({n: x for n, x in params.items() if n != name}, "the start lacks 'lm_head.a.q.scale'; nearest is"),
        (
            {**params, "lm_head.c": 0.0},
            "besides the parameters of this guide and prior, 'lm_head.c'; nearest",
        ),
        ({**params, name: params[name][:, :1, :3]}, r"'lm_head.a.q.scale' must have shape \(1, 2, 16\); got"),
        ({**params, name: -params[name]}, "'lm_head.a.q.scale' must lie inside its constraint"),
        (renamed, "nearest is 'lm_head"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(model, guide, num_steps=1, init_params=start)


@pytest.mark.slow
def test_every_step_is_shown_with_its_parameters():
    seen = []
    fit = run(
        *make(targets=("lm_head",)), num_steps=3, on_step=lambda step, params: seen.append((step, params))
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    assert not same_tree(seen[0][1], seen[1][1])
    jax.tree.map(np.testing.assert_array_equal, seen[-1][1], fit.last_params)
