"""The last layer at the wanted positions alone, against running it everywhere and picking them afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.programs import walk
from builders.thorough import sample_of

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.data.batch import Batch
from bnlora.testing import tiny_base

BASE = tiny_base(jax.random.key(0), num_layers=3)
INNER = [name for name in BASE.modules if name != HEAD]
LENGTHS = np.array([8, 3, 1, 6, 5])
LABELS = jnp.array([0, 1, 1, 2, 0])
# One rounding per product on the longest path, three layers of 24 products at the widest, relative to the
# largest value; a gradient takes that path forwards and backwards.
EPS = 3 * 24 * float(np.finfo(np.float32).eps)
SIDES = ["left", "right", "both", "gap"]


def rows(side: str) -> Batch:
    """Five rows of one to eight real tokens in ten columns; "gap" has a hole within each row."""
    first = {"left": 10 - LENGTHS, "right": 0 * LENGTHS, "both": (10 - LENGTHS) // 2, "gap": 10 - LENGTHS}[
        side
    ]
    columns = np.arange(10)[None, :]
    mask = (columns >= first[:, None]) & (columns < (first + LENGTHS)[:, None])
    if side == "gap":
        mask[:, 8] = False
    tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, BASE.config.vocab_size)
    return Batch(tokens, jnp.asarray(mask), LABELS)


@functools.cache
def classifier(first_layer: int) -> bl.Classifier:
    """Adapters on every module of the layers from `first_layer` upwards, and on the head."""
    targets = [HEAD] if first_layer == BASE.num_layers else [*INNER, HEAD]
    sites = bl.select(BASE, targets, rank=2, layers=range(min(first_layer, 2), 3))
    assert sites.first_layer == first_layer
    return bl.Classifier(BASE, sites, bl.priors.normal(), label_ids=(3, 5, 9))


def adapters_of(model: bl.Classifier, *, seed: int = 0, b_scale: float = 0.5) -> dict:
    generator, scale = np.random.default_rng(seed), {"a": 0.5, "b": b_scale}
    return {
        name: {
            f: scale[f] * jnp.asarray(generator.normal(size=s), jnp.float32) for f, s in site.shapes.items()
        }
        for name, site in model.sites.items()
    }


def picked_afterwards(model: bl.Classifier, params, adapters, batch: Batch) -> jax.Array:
    """The logits from all layers at all positions."""
    placed, module = model.sites.place(adapters), BASE.bind(params)
    head, hidden = placed.pop(HEAD, None), model.hidden(params, batch)
    top = module.blocks(hidden, batch.mask, first_layer=model.sites.first_layer, stop=3, adapters=placed)
    columns = jnp.arange(batch.mask.shape[1])[None, :]
    last = jnp.max(jnp.where(batch.mask, columns, -1), axis=1)  # -1, the last column, for a row of padding
    final = jax.vmap(lambda row, i: row[i])(top, last)
    return module.head(final, rows=jnp.asarray(model.label_ids), adapter=head)


def both(model: bl.Classifier, adapters, batch: Batch, function=lambda f: f) -> tuple:
    """`function` of the logits as functions of the adapters, new and old, in one compiled program each."""

    def run(logits):
        return jax.jit(lambda params, a, rows: function(lambda a: logits(params, a, rows))(a))(
            BASE.weights, adapters, batch
        )

    return run(model.logits), run(functools.partial(picked_afterwards, model))


def assert_close(got, expected, *, factor: float = 1.0) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= factor * EPS * np.abs(y).max()


def value_and_gradient(logits):
    def log_likelihood(adapters):
        return jnp.take_along_axis(jax.nn.log_softmax(logits(adapters)), LABELS[:, None], axis=1).sum()

    return jax.value_and_grad(log_likelihood)


# All layers, some, the last one, and the head alone; the ends are enough where time counts.
FIRST_LAYERS = [0, pytest.param(1, marks=pytest.mark.thorough), pytest.param(2, marks=pytest.mark.slow), 3]
ENDS = [0, pytest.param(2, marks=pytest.mark.slow), 3]


@pytest.mark.parametrize("side", sample_of(SIDES, ["left", "gap"]))
@pytest.mark.parametrize("first_layer", FIRST_LAYERS)
def test_logits_and_gradients_are_those_of_all_positions(first_layer, side):
    model, batch = classifier(first_layer), rows(side)
    adapters = adapters_of(model)
    assert_close(*both(model, adapters, batch))
    (value, gradient), (old_value, old_gradient) = both(model, adapters, batch, value_and_gradient)
    assert_close(value, old_value)
    assert_close(gradient, old_gradient, factor=2)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("first_layer", FIRST_LAYERS)
def test_cached_activations_give_the_same(first_layer):
    model, batch = classifier(first_layer), rows("both")
    adapters = adapters_of(model)
    prepared = bl.cache_prefix(model, batch)
    assert (prepared.cached is None) == (first_layer == 0)
    assert_close(model.logits(BASE.weights, adapters, prepared), model.logits(BASE.weights, adapters, batch))


@pytest.mark.parametrize("first_layer", ENDS)
def test_a_row_of_padding_alone_is_as_before(first_layer):
    model, batch = classifier(first_layer), rows("right")
    batch = Batch(batch.tokens, batch.mask.at[1].set(False), batch.labels)
    adapters = adapters_of(model)
    (value, gradient), old = both(model, adapters, batch, value_and_gradient)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))
    assert_close((value, gradient), old, factor=2)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("first_layer", ENDS)
def test_zero_b_is_the_base_bit_for_bit(first_layer, wrap):
    model, batch = classifier(first_layer), rows("both")
    at, ids = (
        jnp.argmax(jnp.where(batch.mask, jnp.arange(10)[None], -1), axis=1),
        jnp.asarray(model.label_ids),
    )

    def plain(params):
        module = BASE.bind(params)
        final = module.blocks(
            model.hidden(params, batch), batch.mask, first_layer=first_layer, stop=3, at=at[:, None]
        )
        return module.head(final[:, 0], rows=ids)

    zero = adapters_of(model, b_scale=0.0)
    got = wrap(lambda params, a: model.logits(params, a, batch))(BASE.weights, zero)
    assert np.array_equal(got, wrap(plain)(BASE.weights))


@pytest.mark.parametrize("first_layer", [0, pytest.param(2, marks=pytest.mark.thorough), 3])
def test_draws_of_adapters_may_be_mapped_over(first_layer):
    model, batch = classifier(first_layer), rows("left")
    draws = [adapters_of(model, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
    mapped, old = both(model, stacked, batch, jax.vmap)
    assert_close(mapped, old)
    assert_close(mapped, jnp.stack([model.logits(BASE.weights, one, batch) for one in draws]))
    gradients = both(model, stacked, batch, lambda f: jax.vmap(value_and_gradient(f)))
    assert_close(*gradients, factor=2)


def test_derivatives_forwards_are_those_of_all_positions():
    model, batch = classifier(0), rows("both")
    adapters, direction = adapters_of(model), adapters_of(model, seed=1)
    assert_close(*both(model, adapters, batch, lambda f: lambda a: jax.jvp(f, (a,), (direction,))), factor=2)


def test_several_positions_in_any_order():
    batch, at = rows("both"), jnp.array([[7, 0, 7], [4, 5, 9], [5, 1, 4], [0, 9, 3], [2, 6, 8]])
    adapters = classifier(0).sites.place(adapters_of(classifier(0)))
    adapters.pop(HEAD)
    hidden = BASE.module.embed(batch.tokens)
    run = functools.partial(BASE.module.blocks, hidden, batch.mask, first_layer=0, stop=3, adapters=adapters)
    assert_close(run(at=at), jnp.take_along_axis(run(), at[:, :, None], axis=1))


def products(first_layer: int) -> list[tuple[int, ...]]:
    """Shapes of all matrix products of the logits, from cached activations."""
    model, batch = classifier(first_layer), bl.cache_prefix(classifier(first_layer), rows("right"))
    jaxpr = jax.make_jaxpr(lambda p, a: model.logits(p, a, batch))(BASE.weights, adapters_of(model)).jaxpr
    return [e.outvars[0].aval.shape for e in walk(jaxpr) if e.primitive.name == "dot_general"]


def test_only_keys_and_values_of_the_last_layer_see_all_positions():
    # Five rows, ten columns; keys and values have width 8, their adapters rank 2.
    assert sorted(shape for shape in products(2) if 10 in shape[:2]) == [(5, 10, 2)] * 2 + [(5, 10, 8)] * 4
    assert {shape[:2] for shape in products(2) if len(shape) == 3 and 10 not in shape} == {(5, 1)}


def test_with_the_head_alone_no_layer_runs():
    assert set(products(3)) == {(5, 3), (5, 2)}
