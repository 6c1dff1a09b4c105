"""Parameters as vectors: which optimisers may see them so, and that nothing changes where they do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to

import bnlora as bl
from bnlora.infer.svi import packing
from bnlora.infer.svi.elbo import Constrain, initial_parameters
from bnlora.infer.svi.entrywise import is_entrywise
from bnlora.infer.svi.packing import Loose, Packed
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
TREE = {
    "w.loc": jnp.arange(6.0).reshape(2, 3) - 2.2,
    "w.flow": (jnp.ones((3, 1)), jnp.full((), 0.5)),
    "v.loc": jnp.linspace(-1.0, 1.0, 4),
}


def by_name(first, others):
    """Another rule for one parameter."""

    def labels(tree):
        named = {name: "first" if name == "w.loc" else "others" for name in tree}
        return {name: jax.tree.map(lambda _, n=name: named[n], x) for name, x in tree.items()}

    return optax.multi_transform({"first": first, "others": others}, labels)


def every_other(rule):
    """A rule that holds still every second entry of an array."""

    def update(updates, state, params=None):
        updates, state = rule.update(updates, state, params)
        return jax.tree.map(lambda x: x * (jnp.arange(x.size).reshape(x.shape) % 2), updates), state

    return optax.GradientTransformation(rule.init, update)


def mixing():
    """A rule that moves every array by the first entry of another: nothing of that is a sum or a norm."""

    def update(updates, state, params=None):
        return {
            **updates,
            "w.flow": (updates["w.flow"][0] * updates["w.flow"][1], updates["w.flow"][1]),
        }, state

    return optax.GradientTransformation(lambda _: (), update)


ALIKE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "scheduled": optax.adam(optax.cosine_decay_schedule(1e-2, 100)),
    "decay": optax.adamw(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "lion": optax.lion(1e-3),
    "adagrad": optax.adagrad(1e-3),
    "injected": optax.inject_hyperparams(optax.adam)(1e-3),
    "an array for a rate": optax.sgd(jnp.float32(0.1)),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
    "chain": optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale(-1e-2)),
}
APART = {
    "a norm by array": optax.lars(0.1),
    "a norm by array and adam": optax.lamb(1e-3),
    "a norm of all": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "factors by shape": optax.adafactor(1e-3),
    "a moment by array": optax.novograd(1e-3),
    "noise by shape": optax.noisy_sgd(0.1, key=KEY),
    "one rule by two names": by_name(optax.sgd(0.1), optax.sgd(0.1)),
    "another rate for one": by_name(optax.sgd(0.1), optax.sgd(0.2)),
    "another rule for one": by_name(optax.adam(0.1), optax.sgd(0.1)),
    "decay of matrices": optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    "decay of one": optax.adamw(1e-3, mask={"w.loc": True, "w.flow": (False, False), "v.loc": False}),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "steps that are finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "two loops": optax.lbfgs(),
    "by position": every_other(optax.sgd(0.1)),
    "from entry to entry": mixing(),
}


@pytest.mark.parametrize("rule", ALIKE.values(), ids=ALIKE)
def test_rules_that_treat_every_number_alike_may_see_a_vector(rule):
    """And give on it what they give on the arrays."""
    assert is_entrywise(rule, TREE)
    leaves, structure = jax.tree.flatten(TREE)

    def joined(tree):
        return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])

    tree, vector = TREE, joined(TREE)
    states = rule.init(tree), rule.init(vector)
    for step in range(2):
        gradient = jax.tree.unflatten(structure, [jnp.cos(3 * x + step) for x in leaves])
        updates, first = rule.update(gradient, states[0], tree)
        move, second = rule.update(joined(gradient), states[1], vector)
        tree, vector, states = optax.apply_updates(tree, updates), vector + move, (first, second)
    np.testing.assert_allclose(vector, joined(tree), rtol=1e-6)


@pytest.mark.parametrize("rule", APART.values(), ids=APART)
def test_all_others_see_the_arrays(rule):
    assert not is_entrywise(rule, TREE)


def test_arrays_of_two_types_are_no_vector():
    assert not is_entrywise(optax.sgd(0.1), {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float16)})


def made(prior=None):
    base = tiny_base(jax.random.key(1), num_layers=2)
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2)
    model = bl.Classifier(base, sites, prior or bl.priors.sparse_gp(rows=2, cols=2), label_ids=(3, 5))
    return model, bl.guides.SiteFlow(model.prior, hidden=4, blocks=1)


def layout_of(values, constrain, optimizer=None):
    rules = {"a": optimizer or optax.adam(0.1), "b": optax.adam(0.2)}
    return packing.packing(values, constrain, lambda name: "b" if name.endswith("scale") else "a", rules)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["site flow", "triangular"])
def test_constrained_parameters_and_their_derivatives_are_those_by_name(kind):
    model, guide = made()
    if kind == "triangular":  # a constraint that is no map of single numbers
        guide = bl.guides.Guide(model.prior, bl.guides.full())
    values, constrain = initial_parameters(KEY, model, guide, model.base.weights, tiny_rows(KEY, 1), 1)
    layout = layout_of(values, constrain)
    assert isinstance(layout, Packed)
    assert len(layout.vectors) < len(jax.tree.leaves(values)) / 4
    vectors = layout.pack(values)
    jax.tree.map(np.testing.assert_array_equal, layout.unpack(vectors), values)
    found, wanted = (jax.jit(f)(x) for f, x in ((layout.constrain, vectors), (constrain, values)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)

    def total(tree):
        return sum((i + 1) * jnp.sin(x).sum() for i, x in enumerate(jax.tree.leaves(tree)))

    by_name = jax.jit(jax.grad(lambda x: total(constrain(x))))(values)
    packed = jax.jit(jax.grad(lambda x: total(layout.constrain(x))))(vectors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), layout.unpack(packed), by_name)
    assert isinstance(layout_of(values, constrain, optax.lars(0.1)), Loose)


def test_an_optimiser_has_as_many_operations_for_many_arrays_as_for_few():
    """Three constraints of two optimisers make three vectors, however many arrays there are."""
    positive, real = biject_to(constraints.softplus_positive), biject_to(constraints.real)

    def operations(number):
        values = {f"{i}.{kind}": jnp.ones(i + 1) for i in range(number) for kind in ("loc", "scale", "gain")}
        maps = {n: real if n.endswith("loc") else positive for n in values}
        vectors = layout_of(values, Constrain(maps)).pack(values)
        assert len(vectors) == 3
        rule = optax.adam(1e-2)
        return len(jax.make_jaxpr(rule.update)(vectors, jax.eval_shape(rule.init, vectors)).eqns)

    assert operations(3) == operations(20)


@pytest.mark.slow
def test_a_fit_is_the_same_either_way(monkeypatch):
    model, guide = made()
    rows = tiny_rows(jax.random.key(2), 20)

    def run():
        return bl.fit(KEY, model, guide, rows, optax.adam(1e-2), num_steps=5, batch_size=8)

    packed = run()
    monkeypatch.setattr(packing, "is_entrywise", lambda *_: False)
    loose = run()
    assert list(packed.params) == list(loose.params)
    np.testing.assert_allclose(packed.history["elbo"], loose.history["elbo"], rtol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), packed.params, loose.params
    )
