"""How the frozen model runs: what is kept for the backward pass, where it rounds, and steps in parts."""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import adapted
from builders.adapted import adapters_of
from builders.programs import walk
from jax.extend.core import Literal as Constant
from jax.extend.core import jaxprs_in_params

import bnlora as bl
from bnlora._util.checks import check_parts
from bnlora.adapters.sites import HEAD
from bnlora.infer.svi.elbo import TERMS, elbo_terms, initial_parameters
from bnlora.infer.svi.parts import InParts
from bnlora.kernels import api
from bnlora.models.execution import DEFAULT, Execution
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
LAYERS = 12
DEEP = tiny_base(KEY, num_layers=LAYERS)
BASE = tiny_base(KEY, num_layers=3)
ROWS = tiny_rows(jax.random.key(1), 5, length=7)
TRAIN = tiny_rows(jax.random.key(2), 40)
EPS = float(np.finfo(np.float32).eps)
UNIT = 2.0**-8
"""Largest relative error of one rounding to bfloat16, whose significands have eight bits."""
INNER = [name for name in BASE.modules if name != HEAD]


def classifier(base, targets=(*INNER, HEAD), **options) -> bl.Classifier:
    return bl.Classifier(
        base, bl.select(base, targets, rank=2, **options), bl.priors.normal(), label_ids=(3, 5)
    )


def value_and_gradient(model, params, adapters, batch=ROWS):
    return adapted.value_and_gradient(model, params, adapters, batch)


def equations(function, *args, name: str | None = None) -> list:
    return [e for e in walk(jax.make_jaxpr(function)(*args).jaxpr) if name in (None, e.primitive.name)]


def assert_close(got, expected, operations: float, unit: float = EPS) -> None:
    """Equal up to that many roundings of relative size `unit`, as parts of each array's largest value."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= operations * unit * np.abs(y).max()


def test_a_base_that_runs_differently_shares_its_weights():
    other = BASE.running(activations="bfloat16", implementation="xla")
    assert BASE.execution == DEFAULT == Execution()
    assert other.execution == Execution(implementation="xla", activations="bfloat16")
    assert other.running(remat="layers").execution == replace(other.execution, remat="layers")
    assert other.running(activations="float32", implementation=None).execution == DEFAULT
    assert all(map(lambda x, y: x is y, jax.tree.leaves(BASE.weights), jax.tree.leaves(other.weights)))
    assert all(map(lambda x, y: x is y, jax.tree.leaves(BASE.weights), jax.tree.leaves(other.module)))
    assert repr(other).endswith("activations='bfloat16', implementation='xla')")
    assert "activations" not in repr(BASE)


def test_the_chosen_kernel_serves_every_adapted_product(monkeypatch):
    asked, product = [], api.lora_matmul

    def record(*args, implementation, **options):
        asked.append(implementation)
        return product(*args, implementation=implementation, **options)

    monkeypatch.setattr(api, "lora_matmul", record)
    for kernel in ("xla", None):
        model = classifier(BASE.running(implementation=kernel))
        jax.eval_shape(model.logits, BASE.weights, adapters_of(model), ROWS)
        # Seven modules in the loop and in the last layer, and the head.
        assert asked == [kernel] * 15
        asked.clear()


def test_a_conditional_classifier_stays_one_over_another_base():
    model = classifier(BASE)
    values = {"lm_head.a": jnp.ones((1, 2, 16)), "q_proj.a": jnp.ones((3, 2, 16))}
    held = bl.condition(model, values)
    other = held.over(BASE.running(remat="layers"))
    assert type(other) is type(held)
    assert (other.fixed, other.first_layer, other.moving) == (held.fixed, held.first_layer, held.moving)
    assert other.base.execution.remat == "layers"
    assert held.base is BASE


# What the backward pass keeps -----------------------------------------------------------------------


@functools.cache
def of_policy(remat: str):
    """Value and gradient at twelve layers, and the compiled program's temporary memory."""
    model = classifier(DEEP.running(remat=remat))
    compiled = (
        jax.jit(lambda params, a: value_and_gradient(model, params, a))
        .lower(DEEP.weights, adapters_of(model))
        .compile()
    )
    return compiled(DEEP.weights, adapters_of(model)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["elementwise", "attention", "layers"])
def test_running_again_changes_neither_value_nor_gradient(remat):
    got, expected = of_policy(remat)[0], of_policy("none")[0]
    # One rounding per product on the longest path, at most 24 wide, forwards and backwards.
    assert_close(got, expected, 2 * LAYERS * 24)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got))


def kept(remat: str, activations: str = "float32") -> list[jax.ShapeDtypeStruct]:
    """What the backward pass of all layers finds in memory, one entry for each position and layer."""
    model = classifier(DEEP.running(remat=remat, activations=activations))
    adapters = model.sites.place(adapters_of(model))
    adapters.pop(HEAD)

    def run(adapters):
        module = model.base.module
        return module.blocks(
            module.embed(ROWS.tokens), ROWS.mask, first_layer=0, stop=LAYERS, adapters=adapters
        )

    leaves = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(run, a)[1], adapters))
    return [leaf for leaf in leaves if leaf.shape[:2] == (LAYERS, 5)]


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_what_each_policy_keeps(activations):
    layers, attention, products, everything = (
        kept(remat, activations) for remat in ("layers", "attention", "elementwise", "none")
    )
    assert [leaf.shape for leaf in layers] == [(LAYERS, 5, 7, 16)]
    # What enters the layer, then queries, keys, values, attended, gate and up; nobody asks for what left it.
    assert sorted(leaf.shape[-1] for leaf in attention) == [8, 8, 16, 16, 16, 24, 24]
    assert all(leaf.shape[:3] == (LAYERS, 5, 7) and leaf.ndim == 4 for leaf in attention)
    assert {leaf.dtype for leaf in layers + attention} == {jnp.dtype(activations)}
    # Beside these but what attention returns, seven thin x A^T and both products of attention as they come.
    others = [leaf.shape for leaf in products if leaf.shape[:3] != (LAYERS, 5, 7) or leaf.shape[3:] == (2,)]
    assert sorted(others) == [(LAYERS, 5, 2, 4, 2, 7), (LAYERS, 5, 2, 7, 7, 2), *[(LAYERS, 5, 7, 2)] * 7]
    assert len(products) == len(attention) + len(others)
    assert len(everything) > 2 * len(attention)


def test_bfloat16_keeps_less_where_statistics_are_kept_too():
    size = {a: sum(x.size * x.dtype.itemsize for x in kept("none", a)) for a in ("float32", "bfloat16")}
    assert 0.5 < size["bfloat16"] / size["float32"] < 0.75


def test_the_backward_pass_runs_again_what_is_not_kept():
    products = {}
    for remat in ("none", "elementwise", "attention", "layers"):
        model = classifier(BASE.running(remat=remat))
        gradient = functools.partial(value_and_gradient, model)
        products[remat] = len(equations(gradient, BASE.weights, adapters_of(model), name="dot_general"))
    # A layer is traced twice, in the loop and at the top. Run again are two products of attention and seven
    # with A, or (but the last, whose output nobody needs) seven with W and B as well.
    assert products["elementwise"] == products["none"]
    assert products["attention"] - products["none"] == 2 * (2 + 7)
    assert products["layers"] - products["none"] >= 2 * (2 + 7 + 2 * 6)


def test_less_memory_is_taken():
    sizes = [of_policy(remat)[1] for remat in ("layers", "attention", "elementwise", "none")]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("remat", "activations"), [("attention", "float32"), ("layers", "bfloat16")])
def test_draws_may_be_mapped_over(remat, activations):
    base = BASE.running(remat=remat, activations=activations)
    model = classifier(base, ["k_proj", "down_proj", HEAD], layers=[1, 2])
    draws = [adapters_of(model, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
    run = functools.partial(value_and_gradient, model, BASE.weights)
    apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jax.jit(run), draws))
    unit = EPS if activations == "float32" else UNIT
    assert_close(jax.jit(jax.vmap(run))(stacked), apart, 2 * 2 * 24, unit)


# bfloat16 -------------------------------------------------------------------------------------------


HALF = BASE.running(activations="bfloat16")


def test_statistics_head_and_logits_stay_in_float32():
    model = classifier(HALF)

    def log_probs(params, adapters):
        return jax.nn.log_softmax(model.logits(params, adapters, ROWS))

    every = equations(log_probs, BASE.weights, adapters_of(model))
    assert every[-1].outvars[0].aval.dtype == jnp.float32
    statistics = {"reduce_sum", "reduce_max", "exp", "rsqrt", "cos", "sin", "div"}
    found = [e for e in every if e.primitive.name in statistics]
    assert {e.primitive.name for e in found} >= statistics - {"div"}
    assert all(e.invars[0].aval.dtype != jnp.bfloat16 for e in found)
    products = [e for e in every if e.primitive.name == "dot_general"]
    exact = [e.outvars[0].aval.shape for e in products if e.invars[0].aval.dtype == jnp.float32]
    assert sorted(exact) == [(5, 2)] * 3  # the head: W, A and B; two labels, rank 2
    assert all(v.aval.dtype == e.invars[0].aval.dtype for e in products for v in e.invars)


def test_weights_are_rounded_layer_by_layer():
    model = classifier(DEEP.running(activations="bfloat16"))
    every = equations(functools.partial(value_and_gradient, model), DEEP.weights, adapters_of(model))
    made = {(v.aval.shape, v.aval.dtype) for e in every for v in e.outvars}
    half = jnp.dtype(jnp.bfloat16)
    assert ((16, 24), half) in made
    assert not {shape for shape, dtype in made if dtype == half} & {(11, 16, 24), (12, 16, 24)}


EXACT = {"broadcast_in_dim", "concatenate", "dynamic_slice", "gather", "name", "neg", "optimization_barrier"}
EXACT |= {"reshape", "select_n", "slice", "split", "squeeze", "transpose"}


def wide(constant):
    return jnp.asarray(constant, jnp.float32 if jnp.result_type(constant) == jnp.bfloat16 else None)


def with_errors(jaxpr, values, error):
    """Run a program of bfloat16 in float32, with a factor 1 + error(shape) wherever it rounds."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, dict(equation.params)
        inputs = [wide(x.val) if isinstance(x, Constant) else known[x] for x in equation.invars]
        if name == "scan":
            outputs = one_turn(equation, inputs, error)
        elif name == "reduce_precision":  # of what has been rounded already
            outputs = inputs
        elif name != "scatter-add" and (inner := next(jaxprs_in_params(params), None)):
            outputs = with_errors(inner, inputs, error)
        else:
            for key in {"new_dtype", "preferred_element_type"} & set(params):
                params[key] = jnp.dtype(jnp.float32) if params[key] == jnp.bfloat16 else params[key]
            if name == "scatter-add":
                params["update_jaxpr"] = jax.make_jaxpr(jax.lax.add)(0.0, 0.0).jaxpr
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            if equation.outvars[0].aval.dtype == jnp.bfloat16 and name not in EXACT:
                outputs = [x * (1 + error(x.shape)) for x in outputs]
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [wide(x.val) if isinstance(x, Constant) else known[x] for x in jaxpr.outvars]


def one_turn(equation, inputs, error):
    """A loop of one turn; what it scans over and stacks has an axis more outside than in its body."""
    assert equation.params["length"] == 1
    body = next(jaxprs_in_params(equation.params))
    inside = [x.reshape(v.aval.shape) for x, v in zip(inputs, body.invars, strict=True)]
    outputs = with_errors(body, inside, error)
    return [x.reshape(v.aval.shape) for x, v in zip(outputs, equation.outvars, strict=True)]


@pytest.mark.slow
def test_the_errors_of_bfloat16_are_those_of_its_roundings():
    """To first order an output errs by sum_k J_k e_k over all roundings k, each |e_k| <= UNIT.

    For independent errors of mean zero, Hoeffding's inequality gives P(|sum| > 6 UNIT |J|) < 2 exp(-18), less
    than 1e-7. UNIT |J| is the spread of the same program in float32 with an error of UNIT and a random sign
    at every rounding, forwards and backwards, here over 60 runs.
    """
    # Three loops of one turn: the layer below the adapters, and the first adapted one forwards and backwards.
    half, full = (classifier(base, ["q_proj", "up_proj", HEAD], layers=[1, 2]) for base in (HALF, BASE))
    arguments = (BASE.weights, adapters_of(half), ROWS)
    program = jax.make_jaxpr(functools.partial(value_and_gradient, half))(*arguments)
    values, places = [*program.consts, *jax.tree.leaves(arguments)], []

    def none(shape):
        places.append(math.prod(shape))
        return jnp.zeros(shape)

    def rough(key):
        # One draw of all signs: a draw at every place would be most of what is compiled.
        signs = jax.random.rademacher(key, (sum(places),), jnp.float32)
        ends = itertools.accumulate(places)

        def error(shape):
            end = next(ends)
            return UNIT * signs[end - math.prod(shape) : end].reshape(shape)

        return with_errors(program.jaxpr, values, error)

    exact = jax.tree.leaves(jax.jit(functools.partial(value_and_gradient, full))(*arguments))
    assert_close(jax.jit(lambda: with_errors(program.jaxpr, values, none))(), exact, 2 * 3 * 24)
    runs = jax.jit(lambda: jax.lax.map(rough, jax.random.split(KEY, 60)))()
    assert len(places) > 100
    got = jax.tree.leaves(jax.jit(functools.partial(value_and_gradient, half))(*arguments))
    for x, y, many in zip(got, exact, runs, strict=True):
        spread = jnp.sqrt(jnp.square(many - y).mean(0))
        assert x.dtype == jnp.float32
        assert (jnp.abs(x - y) <= 6 * spread).all()
        assert jnp.abs(x - y).max() > 0.1 * spread.max()  # and it is bfloat16 that ran


# Fits -----------------------------------------------------------------------------------------------


def make(base=BASE):
    model = classifier(base, ["q_proj", HEAD], layers=[1, 2])
    return model, bl.guides.Guide(model.prior, bl.guides.mean_field())


@functools.cache
def fit(**options) -> bl.Fit:
    """Six steps of plain gradient descent, whose moves are proportional to the gradient."""
    rate = optax.sgd(1e-2)
    plain = bl.Optimisation(scale_optimizer=rate, clip_norm=1e6)
    return bl.fit(KEY, *make(), TRAIN, rate, optimisation=plain, num_steps=6, batch_size=8, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"num_particles": 2}, marks=pytest.mark.thorough)], ids=["", "particles"]
)
def test_steps_in_parts_are_the_same_steps(options):
    whole, parts = fit(**options), fit(memory=bl.Memory(accumulate=4), **options)
    assert parts.num_traces == whole.num_traces == 1
    # One rounding per product on the longest path, forwards and backwards, and per row of the sum, in each of
    # six steps.
    operations = 6 * (2 * 3 * 24 + 8)
    for name in TERMS:
        assert_close(parts.history[name], whole.history[name], operations)
    assert_close(parts.params, whole.params, operations)
    assert np.ptp(whole.history["data"]) > 1e3 * EPS * np.abs(whole.history["data"]).max()


def bound(parts: int, base=DEEP, rows: int = 16):
    """The bound of a minibatch and its gradient, as a step takes them."""
    model = classifier(base, ["q_proj", HEAD])
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    program = model if parts == 1 else InParts(model, parts)
    params, constrain = initial_parameters(KEY, model, guide)
    batch = TRAIN[:rows]

    def value(params, weights):
        return elbo_terms(KEY, constrain(params), program, guide, weights, batch, 40)["elbo"]

    return jax.value_and_grad(value), (params, base.weights)


@pytest.mark.slow
def test_parts_take_less_memory_and_no_more_products():
    taken, products = {}, {}
    for parts in (1, 4):
        function, arguments = bound(parts)
        compiled = jax.jit(function).lower(*arguments).compile()
        taken[parts] = compiled.memory_analysis().temp_size_in_bytes
        products[parts] = len(equations(function, *arguments, name="dot_general"))
    # Four parts keep a quarter of the activations each; what does not depend on rows is small here.
    assert taken[4] < taken[1] / 2
    assert products[4] == products[1]


def test_parts_are_run_with_layers_again_and_in_bfloat16():
    memory = bl.Memory(accumulate=2, activations="bfloat16", remat="layers")
    parts = fit(memory=memory, prefix_cache="off")
    whole = fit()
    assert parts.num_traces == 1
    assert parts.model.base.execution == DEFAULT
    close = 2 * 3 * 24 * UNIT * np.abs(whole.history["data"]).max()
    np.testing.assert_allclose(parts.history["elbo"], whole.history["elbo"], atol=close)
    assert np.isfinite(bl.predict(KEY, parts, TRAIN[:4], num_draws=2).log_probs).all()


def test_a_fit_in_bfloat16_reaches_nearly_the_same_bound():
    options = {"num_steps": 150, "batch_size": 20, "optimizer": optax.adam(2e-2)}
    whole, half = (
        bl.fit(KEY, *make(), TRAIN, memory=bl.Memory(activations=a), **options) for a in (None, "bfloat16")
    )
    # The same draws and rows: what is left are the errors of rounding, a small part of what was won.
    for name in ("elbo", "data"):
        first, last, other = (
            fit.history[name][part].mean()
            for fit, part in ((whole, slice(10)), (whole, slice(-50, None)), (half, slice(-50, None)))
        )
        assert abs(other - last) < 0.01 * (last - first)


# Bad input ------------------------------------------------------------------------------------------


def test_unknown_ways_to_run_are_refused():
    for changes, message in [
        (
            {"activations": "bf16"},
            r"activations must be one of \('float32', 'bfloat16'\); got 'bf16', nearest",
        ),
        ({"remat": "layer"}, r"remat must be one of .*; got 'layer', nearest is 'layers'"),
        ({"implementation": "xls"}, r"implementation must be one of .*; got 'xls', nearest is 'xla'"),
    ]:
        with pytest.raises(ValueError, match=message):
            BASE.running(**changes)
    with pytest.raises(TypeError, match="remta"):
        BASE.running(remta="layers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "accumulate must divide batch_size=8; got 3, nearest is 4"),
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"activations": "half"}, "activations must be one of .*; got 'half', nearest is"),
        ({"remat": "all"}, "remat must be one of .*; got 'all', nearest is"),
    ],
)
def test_a_fit_refuses_them_too(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(memory=bl.Memory(**changes))


def test_the_nearest_number_of_parts_divides_the_minibatch():
    check_parts("accumulate", 5, 20)
    with pytest.raises(ValueError, match="nearest is 16"):
        check_parts("accumulate", 100, 16)
    with pytest.raises(ValueError, match="nearest is 1$"):
        check_parts("accumulate", 2, 7)
