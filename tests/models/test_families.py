"""Every family through what the library needs of a model: ranges of layers, positions, adapters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders.families import (
    adapters_of,
    base_of,
    close,
    reference,
    rows_of,
    tangent_features_are_the_jacobian,
)
from builders.thorough import sample_of

import bnlora as bl
from bnlora.base import Base
from bnlora.kernels.quantised import table_rows
from bnlora.models import families
from bnlora.models.loading import Checkpoint

KEY = jax.random.key(0)
LABELS = (3, 5, 11)
every_family = pytest.mark.parametrize("name", sample_of(reference.FAMILIES, ["gemma3", "gpt2"]))


def logits_of(base: Base, weights, rows: bl.Batch, adapters=None) -> np.ndarray:
    """Logits at every position, in one program for all weights of a base."""
    return np.asarray(_logits(base)(weights, rows.tokens, rows.mask, adapters))


@cache
def _logits(base: Base):
    return jax.jit(
        lambda weights, tokens, mask, adapters: base.bind(weights)(tokens, mask, adapters=adapters)
    )


@every_family
def test_adapters_are_changes_of_the_kernels(name):
    base, adapters = base_of(name), adapters_of(base_of(name))
    rows = rows_of(base)
    got = logits_of(base, base.weights, rows, adapters)

    @jax.jit
    def expected(weights, adapters):
        module = base.bind(weights)
        for inner in base.config.layer_modules:
            a, b = adapters[inner]["a"], adapters[inner]["b"]
            module.layers[inner][...] = module.layers[inner][...] + jnp.einsum("lor,lri->lio", b, a)
        change = adapters["lm_head"]["b"][0] @ adapters["lm_head"]["a"][0]
        # The embedding must not move with the head.
        hidden = module.blocks(
            module.embed(rows.tokens, rows.mask), rows.mask, first_layer=0, stop=base.num_layers
        )
        head = module.embedding if module.lm_head is None else module.lm_head
        head[...] = head[...] + change
        return module.head(hidden)

    close(got[rows.mask], expected(base.weights, adapters)[rows.mask])


@every_family
def test_a_classifier_reads_the_logits_of_the_whole_model(name):
    """With the layers below the adapters cached, and the last layer at one position only."""
    base = base_of(name)
    rows, adapters = rows_of(base), adapters_of(base)
    sites = bl.select(base, ["q_proj", "v_proj", "down_proj", "lm_head"], rank=2, layers=[1, 2])
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=LABELS)
    drawn = {n: {f: x[1:] if n != "lm_head" else x for f, x in adapters[n].items()} for n in sites}
    drawn["lm_head"]["b"] = drawn["lm_head"]["b"][:, jnp.array(LABELS)]
    scaled = {n: {"a": p["a"], "b": p["b"] / sites[n].scale} for n, p in drawn.items()}
    got = jax.jit(model.logits)(base.weights, scaled, model.prepare(rows))
    whole = {n: {f: x.at[0].set(0) if n != "lm_head" else x for f, x in adapters[n].items()} for n in sites}
    expected = logits_of(base, base.weights, rows, whole)[np.arange(len(rows)), np.asarray(rows.last)]
    close(got, expected[:, LABELS])


@pytest.mark.slow
@every_family
def test_tangent_features_are_the_jacobian(name):
    """The derivative of the whole model's logits in the entries of two kernels."""
    base = base_of(name)
    rows = rows_of(base, 2)
    sites = bl.select(base, ["v_proj", "up_proj"], rank=1, layers=[2])
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=LABELS)
    tangent_features_are_the_jacobian(
        model, rows, lambda logits: logits[jnp.arange(2), rows.last][:, jnp.array(LABELS)]
    )


@pytest.mark.parametrize("name", sample_of(["qwen2", "gemma3"], ["gemma3"]))
def test_from_a_fit_to_a_file_and_back(name, tmp_path):
    base = base_of(name)
    rows = rows_of(base, 8)
    model = bl.Classifier(
        base, bl.select(base, ["q_proj", "lm_head"], rank=2, layers=[2]), bl.priors.normal(), label_ids=LABELS
    )
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, rows, optax.adam(0.01), num_steps=3, batch_size=4)
    prediction = bl.predict(KEY, fit, rows, num_draws=3)
    bl.save_fit(fit, tmp_path / "fit")
    again = bl.load_fit(tmp_path / "fit", model, guide)
    np.testing.assert_array_equal(bl.predict(KEY, again, rows, num_draws=3).probs, prediction.probs)


@pytest.mark.parametrize("name", ["gemma3"])
def test_chains_on_a_head(name):
    base = base_of(name)
    model = bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.normal(), label_ids=LABELS)
    rows = rows_of(base, 8)
    chains = bl.mcmc.sample_nuts(KEY, model, rows, num_chains=2, num_warmup=20, num_draws=20)
    assert np.isfinite(bl.predict(KEY, chains, rows, num_draws=4).log_probs).all()


def test_a_row_beyond_the_learned_positions_is_refused():
    base = base_of("gpt2")
    with pytest.raises(ValueError, match="rows must have at most 48 tokens, for the model has no more pos"):
        base.module(jnp.zeros((1, 49), int))


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_fused_modules_are_not_written_for_peft(name, tmp_path):
    base = base_of(name)
    sites = bl.select(base, ["q_proj"], rank=2, layers=[2])
    adapters = {"q_proj": {"a": jnp.ones((1, 2, 32)), "b": jnp.zeros((1, 32, 2))}}
    with pytest.raises(ValueError, match=f"adapters of '{name}' models cannot be written for peft"):
        bl.save_peft(adapters, tmp_path, sites=sites, base=base)


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "4bit"])
@every_family
def test_weights_are_read_into_other_types_as_they_are_converted(name, storage):
    """Tensor by tensor out of the checkpoint, or from the model in float32: the same numbers."""
    config = reference.FAMILIES[name]
    tensors = reference.family_tensors(config)
    read = families.build(Checkpoint(config, tensors, None), storage)
    converted = base_of(name).stored(storage)
    own = Base.from_module(read, name=name, family=converted.family)
    assert own.storage == converted.storage == storage
    jax.tree.map(np.testing.assert_array_equal, own.weights, converted.weights)
    # A quantised layer runs as the float32 matrices that it stands for.
    module, plain, rows = own.module, base_of(name).module, rows_of(own)
    for kernel in own.config.layer_modules:
        plain.layers[kernel][...] = module.kernels(kernel, range(own.num_layers))
    everything = np.arange(own.config.vocab_size)
    plain.embedding[...] = table_rows(module.embedding.get_value(), everything, jnp.float32)
    if plain.lm_head is not None:
        plain.lm_head[...] = module.head_rows(everything)
    got = logits_of(own, own.weights, rows)
    expected = logits_of(base_of(name), Base.from_module(plain, name=name).weights, rows)
    close(got[rows.mask], expected[rows.mask])
