"""A classifier over a quantised base: what its steps keep, and all of the library on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders.adapted import adapters_of
from builders.thorough import sample_of

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.models.execution import Remat
from bnlora.testing import tiny_base, tiny_rows

KEY, ADAM = jax.random.key(0), optax.adam(0.02)
STORAGE = ("bfloat16", "int8", "4bit")
LAYERS = 6
DEEP = tiny_base(KEY, num_layers=LAYERS)
BASE = tiny_base(KEY, num_layers=2)
TRAIN, TEST = tiny_rows(jax.random.key(1), 24), tiny_rows(jax.random.key(2), 8)


@functools.cache
def base_of(weights: str) -> bl.Base:
    return BASE.stored(weights)


def classifier(base, targets=("v_proj", HEAD), **options) -> bl.Classifier:
    return bl.Classifier(
        base, bl.select(base, targets, rank=2, **options), bl.priors.normal(), label_ids=(3, 5)
    )


def guide_of(model) -> bl.guides.Guide:
    return bl.guides.Guide(model.prior, bl.guides.mean_field())


@functools.cache
def fit_of(weights: str) -> bl.Fit:
    model = classifier(base_of(weights), layers=[1])
    return bl.fit(KEY, model, guide_of(model), TRAIN, ADAM, num_steps=6, batch_size=8)


# What a step keeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", sample_of(STORAGE, ["4bit"]))
@pytest.mark.parametrize(
    "remat", sample_of(["none", "elementwise", "attention", "layers"], ["none", "layers"])
)
def test_no_policy_keeps_a_dequantised_matrix(weights, remat: Remat):
    """What the backward pass finds has the stored stacks, and none in floating point."""
    base = DEEP.stored(weights).running(remat=remat)
    model = classifier(base, [name for name in base.modules if name != HEAD])
    adapters = model.sites.place(adapters_of(model))
    kernels = {shape for name, shape in base.modules.items() if name != HEAD}

    def run(adapters, weights):
        module, rows = base.bind(weights), TRAIN[:3]
        return module.blocks(
            module.embed(rows.tokens), rows.mask, first_layer=0, stop=LAYERS, adapters=adapters
        )

    found = jax.eval_shape(lambda a, w: jax.vjp(lambda a: run(a, w), a)[1], adapters, base.weights)
    stacks = [x for x in jax.tree.leaves(found) if x.ndim == 3 and x.shape[1:] in kernels]
    assert all(x.dtype in (jnp.int8, jnp.bfloat16) for x in stacks)  # the stored ones, not copies
    assert len(stacks) == (0 if weights == "4bit" else len(kernels_of(base)))


def kernels_of(base) -> list[str]:
    return [name for name in base.modules if name != HEAD]


@functools.cache
def temporary(storage: str, layers: int) -> int:
    """Temporary memory of the gradient's program."""
    base = tiny_base(KEY, num_layers=layers).stored(storage).running(remat="layers")
    model = classifier(base, ["q_proj"])

    def loss(adapters, weights):
        return model.logits(weights, adapters, TRAIN[:2]).sum()

    program = jax.jit(jax.grad(loss)).lower(adapters_of(model), base.weights).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("weights", sample_of(STORAGE, ["4bit"]))
def test_the_program_of_a_step_holds_one_matrix_at_a_time(weights):
    """Its temporary memory does not grow with the layers, beyond what it keeps in any type of the weights."""
    per_layer = [(temporary(s, 12) - temporary(s, 4)) / 8 for s in ("float32", weights)]
    assert per_layer[1] <= per_layer[0] + 256  # a matrix of a layer has 1,024 bytes and more


# The library on it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", sample_of(STORAGE, ["4bit"]))
def test_predictions_are_those_of_the_rounded_weights_in_float32(weights):
    """The same numbers as floats in a float32 base: the type in memory changes nothing else."""
    fit = fit_of(weights)
    got = bl.predict(KEY, fit, TEST, num_draws=4)
    module = base_of(weights).module
    floats = {name: np.asarray(module.kernels(name, range(2))) for name in kernels_of(BASE)}
    single = BASE.module
    for name, kernels in floats.items():
        single.layers[name][...] = jnp.asarray(kernels)
    table = jnp.asarray(module.head_rows(range(BASE.config.vocab_size)))
    single.embedding[...] = table
    same = bl.Base.from_module(single, name="random")
    model = classifier(same, layers=[1])
    adapters = fit.draw_adapters(jax.random.key(7), 4)
    expected = jax.jit(model.outputs_by_draw)(same.weights, adapters, TEST)
    found = jax.jit(fit.model.outputs_by_draw)(fit.model.base.weights, adapters, TEST)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert got.log_probs.shape == (8, 2)


@pytest.mark.parametrize("weights", sample_of(STORAGE, ["4bit"]))
def test_a_fit_caches_saves_and_is_refused_elsewhere(weights, tmp_path):
    fit = fit_of(weights)
    assert fit.train.cached.hidden.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fit.params))
    bl.save_fit(fit, tmp_path)
    same = classifier(BASE.stored(weights), layers=[1])  # made again
    again = bl.load_fit(tmp_path, same, guide_of(same))
    assert again.best_step == fit.best_step
    for other in {"float32", *STORAGE} - {weights}:
        model = classifier(base_of(other), layers=[1])
        with pytest.raises(ValueError, match=r"was made with a base other than Base\('random'"):
            bl.load_fit(tmp_path, model, guide_of(model))


@pytest.mark.parametrize("weights", ["4bit", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_tangent_model_and_all_of_the_core(weights, tmp_path):
    base = base_of(weights)
    core = bl.fit_core(
        KEY, base, TRAIN, label_ids=(3, 5), size={"v_proj": 2}, targets=["v_proj", "slope"], num_steps=5
    )
    assert np.isfinite(core.fit.history["elbo"]).all()
    tangent = core.model
    prepared = tangent.prepare(TRAIN)
    # The offset of the tangent model is the network's logits, computed by other code.
    plain = classifier(base, ["v_proj"])
    zeros = jax.tree.map(jnp.zeros_like, adapters_of(plain))
    logits = np.asarray(jax.jit(plain.logits)(base.weights, zeros, TRAIN))
    offset = np.asarray(prepared.features.offset)
    np.testing.assert_allclose(
        offset - offset.mean(-1, keepdims=True), logits - logits.mean(-1, keepdims=True), atol=1e-5
    )
    bl.save_core(core, tmp_path)
    assert bl.load_core(tmp_path, base).fit.best_step == core.fit.best_step
    with pytest.raises(ValueError, match="base"):
        bl.load_core(tmp_path, BASE)


@pytest.mark.parametrize("source", ["weights", "activations", "jacobian"])
def test_frames_of_a_quantised_base(source):
    options = {"label_ids": (3, 5), "size": 1, "source": source}
    bases = (base_of("4bit"), BASE)
    chosen, near = (bl.frames(KEY, base, ["v_proj", HEAD], TRAIN, **options) for base in bases)
    assert chosen.num_coordinates == near.num_coordinates


@pytest.mark.thorough
def test_chains_on_the_head():
    model = classifier(base_of("int8"), [HEAD])
    chains = bl.sample_nuts(KEY, model, TRAIN, num_warmup=20, num_draws=10, num_chains=2)
    assert bl.predict(KEY, chains, TEST, num_draws=8).log_probs.shape == (8, 2)


def test_options_of_a_run_work_on_it():
    """Parts, bfloat16 activations and completions, which read all rows of the head."""
    model = classifier(base_of("4bit"))
    short = bl.Memory(accumulate=2, activations="bfloat16", remat="none")
    fit = bl.fit(KEY, model, guide_of(model), TRAIN, ADAM, num_steps=2, batch_size=8, memory=short)
    assert np.isfinite(fit.history["elbo"]).all()
    logits, exact = (
        jax.jit(lambda weights, base=base: base.bind(weights)(TEST.tokens, TEST.mask))(base.weights)
        for base in (base_of("int8"), BASE)
    )
    assert logits.shape == exact.shape
    assert 0 < np.abs(logits - exact)[np.asarray(TEST.mask)].max() < 0.5 * np.abs(exact).max()
