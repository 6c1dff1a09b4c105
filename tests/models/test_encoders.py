"""Encoders: activations and logits of torch, padding, adapters, tangent features, and what is refused.

Tolerances of the comparisons with torch are those of `test_parity.py`: ten times torch's own rounding.
"""

import json
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.families import (
    REFERENCES,
    adapters_of,
    base_of,
    close,
    reference,
    rows_of,
    tangent_features_are_the_jacobian,
)
from datasets import Dataset
from transformers import AutoConfig

import bnlora as bl
from bnlora.base import Base
from bnlora.data.assets import fetch_minilm
from bnlora.infer.mcmc.target import _read_token
from bnlora.models import families
from bnlora.models.encoder_config import EncoderConfig
from bnlora.models.loading import Checkpoint, read_checkpoint

LIKELIHOOD = bl.likelihoods.Labels(3)
KINDS = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}
every_encoder = pytest.mark.parametrize("name", sorted(reference.ENCODERS))


def tokens_of(name: str) -> np.ndarray:
    return reference.tiny_tokens(reference.ENCODERS[name])


def run(base: Base, tokens, mask=None, *, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """Activations after the last layer and logits, under other weights where some are given."""
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    weights = base.weights if weights is None else weights
    return tuple(map(np.asarray, _both(base)(weights, jnp.asarray(tokens), jnp.asarray(mask))))


@cache
def _both(base: Base):
    @jax.jit
    def both(weights, tokens, mask):
        module = base.bind(weights)
        hidden = module.embed(tokens, mask)
        return module.blocks(hidden, mask, first_layer=0, stop=base.num_layers), module(tokens, mask)

    return both


@every_encoder
def test_tiny_models_give_the_stored_activations_and_logits(name):
    content = json.loads((REFERENCES / f"{name}.json").read_text(encoding="utf-8"))
    hidden, logits = run(base_of(name), tokens_of(name))
    limit = 10 * content["rounding"]
    assert limit < 1e-3 * np.abs(content["logits"]).max()
    assert np.abs(hidden[:, ::6] - np.array(content["hidden"])).max() <= limit
    assert np.abs(logits - np.array(content["logits"])).max() <= limit


@every_encoder
def test_tiny_models_give_the_activations_and_logits_of_torch(name):
    """Rows with padding on the right and on the left; torch reads the head in the first column."""
    pytest.importorskip("torch")
    config, tokens = reference.ENCODERS[name], tokens_of(name)
    mask = np.ones(tokens.shape, bool)
    mask[0, :5] = mask[1, 18:] = False
    model = reference.torch_encoder(config, reference.encoder_tensors(config))
    expected, _ = reference.torch_outputs(model, tokens, mask)
    alone = [
        reference.torch_outputs(model, row[real][None])[1][0] for row, real in zip(tokens, mask, strict=True)
    ]
    rounding = json.loads((REFERENCES / f"{name}.json").read_text(encoding="utf-8"))["rounding"]
    hidden, logits = run(base_of(name), tokens, mask)
    assert np.abs(hidden - expected)[mask].max() <= 10 * rounding
    assert np.abs(logits - np.stack(alone)).max() <= 10 * rounding


@every_encoder
def test_a_configuration_that_transformers_wrote_is_the_same(name):
    config = reference.ENCODERS[name]
    written = AutoConfig.for_model(**config).to_dict() | {"architectures": config["architectures"]}
    read = families.ENCODERS[name].read_config
    assert read(config) == read(json.loads(json.dumps(written)))
    assert read(config).label_names == ("bad", "fair", "good")


@every_encoder
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_what_stands_in_it_change_nothing(name, side):
    base, tokens = base_of(name), tokens_of(name)
    wide = np.full((2, 30), 7)
    where = slice(6, None) if side == "left" else slice(0, 24)
    wide[:, where] = tokens
    mask = np.zeros(wide.shape, bool)
    mask[:, where] = True
    close(run(base, wide, mask)[1], run(base, tokens)[1], 1e-5)


def body_of(name: str, kind: str, tensors: dict) -> tuple[dict, Base]:
    config = reference.ENCODERS[name] | {"architectures": [kind]}
    module = families.build(Checkpoint(config, tensors, None), num_labels=4)
    return config, Base.from_module(module, name=name, family=name)


def without_head(name: str) -> dict:
    tensors = reference.encoder_tensors(reference.ENCODERS[name])
    return {n: x for n, x in tensors.items() if not n.startswith("classifier")}


def test_the_body_of_a_bert_keeps_its_pooling_layer_and_gets_a_zero_head():
    tensors = {n.removeprefix("bert."): x for n, x in without_head("bert").items()}
    config, base = body_of("bert", "BertModel", tensors)
    _, logits = run(base, tokens_of("bert"))
    np.testing.assert_array_equal(logits, np.zeros((2, 4)))
    assert base.config.pooled
    assert base.config.new_head
    assert "4 labels (new, zero), pooling 'pooler'" in str(base.overview[0])
    pytest.importorskip("torch")
    model = reference.torch_encoder(config, tensors)
    (_, expected), rounding = reference.rounded(model, tokens_of("bert"))
    assert np.abs(pooled(base, tokens_of("bert")) - expected).max() <= 10 * rounding


def pooled(base: Base, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The input of the head at the first real token."""
    hidden = jnp.asarray(run(base, tokens, mask)[0])
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    inputs = base.module.inputs(hidden, jnp.asarray(mask), ["lm_head"], first_layer=base.num_layers)[
        "lm_head"
    ]
    return np.asarray(inputs[0])[np.arange(len(tokens)), mask.argmax(1)]


@cache
def minilm() -> Base:
    return bl.load(fetch_minilm(), num_labels=2)


@pytest.mark.slow
def test_minilm_gives_the_stored_activations():
    content = json.loads((REFERENCES / "minilm.json").read_text(encoding="utf-8"))
    tokens = np.array([minilm().tokenizer(reference.SENTENCE).input_ids])
    assert tokens[0].tolist() == content["tokens"]
    hidden, logits = run(minilm(), tokens)
    limit = 10 * content["rounding"]
    expected = np.array(content["hidden"])
    assert limit < 1e-3 * np.abs(expected).max()
    assert np.abs(hidden[0][list(reference.POSITIONS)][:, ::4] - expected).max() <= limit
    assert np.abs(pooled(minilm(), tokens) - np.array(content["pooled"])).max() <= limit
    np.testing.assert_array_equal(logits, np.zeros((1, 2)))


@pytest.mark.slow
def test_minilm_gives_the_sentence_embeddings_of_torch():
    """Rows of different lengths as the reader pads them; embeddings are means of real tokens."""
    pytest.importorskip("torch")
    sentences = [reference.SENTENCE, "A film.", "The last half hour is among the best; I would see it again."]
    table = Dataset.from_dict({"text": sentences})
    given = {"text": "text", "label": None, "classes": ["bad", "good"]}
    rows = bl.text_classification({"test": table}, minilm(), **given)["test"]
    tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
    checkpoint = read_checkpoint(fetch_minilm())
    model = reference.torch_encoder(checkpoint.config, dict(checkpoint.tensors))
    expected = [
        reference.torch_outputs(model, row[real][None]) for row, real in zip(tokens, mask, strict=True)
    ]
    rounding = json.loads((REFERENCES / "minilm.json").read_text(encoding="utf-8"))["rounding"]
    hidden, _ = run(minilm(), tokens, mask)
    for row, real, (states, _) in zip(hidden, mask, expected, strict=True):
        assert np.abs(row[real].mean(0) - states[0].mean(0)).max() <= 10 * rounding
        assert np.abs(row[real] - states[0]).max() <= 10 * rounding
    assert (
        np.abs(pooled(minilm(), tokens, mask) - np.concatenate([r for _, r in expected])).max()
        <= 10 * rounding
    )


@every_encoder
def test_a_masked_language_model_gives_its_body_without_a_pooling_layer(name):
    """The language-model head is not read, and the new head reads the first token itself."""
    tensors = {n: x for n, x in without_head(name).items() if "pooler" not in n}
    others = {"cls.predictions.bias": np.zeros(61), "bert.embeddings.position_ids": np.arange(48)[None]}
    if name == "roberta":
        others = {"lm_head.bias": np.zeros(61), "lm_head.dense.weight": np.zeros((32, 32))}
    _, base = body_of(name, KINDS[name], tensors | others)
    assert not base.config.pooled
    close(run(base, tokens_of(name))[0], run(base_of(name), tokens_of(name))[0], 1e-6)
    hidden = jnp.ones((1, 3, 32))
    inputs = base.module.inputs(hidden, jnp.ones((1, 3), bool), ["lm_head"], first_layer=base.num_layers)
    np.testing.assert_array_equal(inputs["lm_head"][0], hidden)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_new_head_can_read_the_mean_of_the_real_tokens(name):
    """At every position, also of activations that are cached; a pooling layer is then not read."""
    config = reference.ENCODERS[name] | {"architectures": [KINDS[name]]}
    module = families.build(Checkpoint(config, without_head(name), None), num_labels=3, pooling="mean")
    module.lm_head[...] = base_of(name).module.lm_head[...]
    base = Base.from_module(module, name=name, family=name)
    rows = rows_of(base)
    plain, _ = run(base_of(name), rows.tokens, rows.mask)
    mean = np.stack([row[real].mean(0) for row, real in zip(plain, np.asarray(rows.mask), strict=True)])
    hidden, logits = run(base, rows.tokens, rows.mask)
    close(hidden, np.broadcast_to(mean[:, None], hidden.shape), 1e-5)
    close(logits, mean @ np.asarray(module.lm_head[...]).T, 1e-5)
    assert not base.config.pooled
    sites = bl.select(base, ["lm_head"], rank=2)
    model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=LIKELIHOOD)
    drawn = {"lm_head": {f: x for f, x in adapters_of(base)["lm_head"].items()}}
    prepared = model.prepare(rows)
    expected = adapted(base, drawn, rows)
    logits = jax.jit(model.logits)
    for given in (rows, prepared, _read_token(prepared, LIKELIHOOD)):
        close(logits(base.weights, drawn, given), expected)
    inputs = base.module.inputs(prepared.cached.hidden, rows.mask, ["lm_head"], first_layer=3)["lm_head"][0]
    close(inputs[:, 5], mean, 1e-5)


def test_pooling_must_fit_the_checkpoint():
    config = reference.ENCODERS["bert"]
    whole = Checkpoint(config, reference.encoder_tensors(config), None)
    with pytest.raises(ValueError, match="pooling is for a new classification head, .* got 'mean'"):
        families.build(whole, pooling="mean")
    tensors = {n: x for n, x in without_head("bert").items() if "pooler" not in n}
    bare = Checkpoint(config | {"architectures": ["BertModel"]}, tensors, None)
    with pytest.raises(
        ValueError, match="pooling='pooler' needs a pooling layer, and the checkpoint has none"
    ):
        families.build(bare, num_labels=2, pooling="pooler")
    with pytest.raises(ValueError, match="pooling must be one of .* got 'men', nearest is 'mean'"):
        families.build(bare, num_labels=2, pooling="men")
    decoder = reference.FAMILIES["qwen2"]
    with pytest.raises(ValueError, match="pooling is for encoders"):
        families.build(Checkpoint(decoder, reference.family_tensors(decoder), None), pooling="mean")


def test_old_names_of_gains_and_biases_are_read():
    tensors = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in reference.encoder_tensors(reference.ENCODERS["bert"]).items()
    }
    module = families.build(Checkpoint(reference.ENCODERS["bert"], tensors, None))
    np.testing.assert_array_equal(module.embedding_norm[...], base_of("bert").module.embedding_norm[...])


def adapted(base: Base, adapters: dict, rows: bl.Batch) -> np.ndarray:
    """Logits of the whole model with adapters."""
    program = jax.jit(lambda weights, adapters: base.bind(weights)(rows.tokens, rows.mask, adapters=adapters))
    return np.asarray(program(base.weights, adapters))


@every_encoder
def test_adapters_are_changes_of_the_kernels(name):
    base, rows = base_of(name), rows_of(base_of(name))
    adapters, module = adapters_of(base), base.module
    for inner in base.config.layer_modules:
        change = np.einsum("lor,lri->lio", adapters[inner]["b"], adapters[inner]["a"])
        module.layers[inner][...] = module.layers[inner][...] + change
    change = np.matmul(adapters["lm_head"]["b"][0], adapters["lm_head"]["a"][0])
    module.lm_head[...] = module.lm_head[...] + change
    changed = Base.from_module(module, name=name).weights
    close(adapted(base, adapters, rows), run(base, rows.tokens, rows.mask, weights=changed)[1])


@every_encoder
def test_a_classifier_reads_the_logits_of_the_whole_model(name):
    """With the layers below the adapters cached, and the last layer at one position only."""
    base = base_of(name)
    rows, adapters = rows_of(base), adapters_of(base)
    sites = bl.select(base, ["q_proj", "v_proj", "down_proj", "lm_head"], rank=2, layers=[1, 2])
    model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=LIKELIHOOD)
    drawn = {n: {f: x[1:] if n != "lm_head" else x for f, x in adapters[n].items()} for n in sites}
    scaled = {n: {"a": p["a"], "b": p["b"] / sites[n].scale} for n, p in drawn.items()}
    got = jax.jit(model.logits)(base.weights, scaled, model.prepare(rows))
    whole = {n: {f: x.at[0].set(0) if n != "lm_head" else x for f, x in adapters[n].items()} for n in sites}
    close(got, adapted(base, whole, rows))


@every_encoder
def test_tangent_features_are_the_jacobian(name):
    """The derivative of the whole model's logits in the entries of three kernels, the head's among them."""
    base = base_of(name)
    sites = bl.select(base, ["v_proj", "up_proj", "lm_head"], rank=1, layers=[2])
    model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=LIKELIHOOD)
    tangent_features_are_the_jacobian(model, rows_of(base, 2), lambda logits: logits)


@every_encoder
def test_inputs_are_those_of_the_modules(name):
    """The input of the head is what its rows multiply at the position that it reads."""
    base, rows = base_of(name), rows_of(base_of(name))

    @jax.jit
    def inputs_of(weights):
        module, modules = base.bind(weights), ["lm_head", "q_proj"]
        return module.inputs(module.embed(rows.tokens, rows.mask), rows.mask, modules, first_layer=0)

    inputs, module = inputs_of(base.weights), base.module
    first = np.asarray(inputs["lm_head"][0])[np.arange(len(rows)), np.asarray(rows.first)]
    expected = run(base, rows.tokens, rows.mask)[1]
    close(first @ np.asarray(module.lm_head[...]).T + np.asarray(module.lm_head_bias[...]), expected)
    assert inputs["q_proj"].shape == (3, 4, 16, 32)


CHANGES = {
    "a decoder": ({"is_decoder": True}, "BERT models with 'is_decoder' are not supported"),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        "BERT models must have absolute positions; got 'relative_key'",
    ),
    "another activation": ({"hidden_act": "mish"}, "the activation 'mish' is not supported here"),
    "heads that do not divide": ({"num_attention_heads": 5}, "d_model must be a multiple of num_heads"),
    "no width": ({"hidden_size": None}, "the model configuration lacks the keys ['hidden_size']"),
    "another head": ({"id2label": {"0": "a"}}, "classifier.weight (3, 32) instead of (1, 32)"),
    "another class": (
        {"architectures": ["BertForTokenClassification"]},
        "the architecture ['BertForTokenClassification'] is not supported",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_broken_configurations_are_refused(case):
    change, said = CHANGES[case]
    config = reference.ENCODERS["bert"]
    checkpoint = Checkpoint(config | change, reference.encoder_tensors(config), None)
    with pytest.raises(ValueError, match=re.escape(said)):
        families.build(checkpoint)


def test_all_tensors_that_do_not_fit_are_named_at_once():
    tensors = reference.encoder_tensors(reference.ENCODERS["bert"])
    del tensors["bert.pooler.dense.weight"], tensors["bert.encoder.layer.1.attention.self.query.weight"]
    tensors["classifier.more"] = np.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing: .*layer\.1\.attention.*pooler.*unexpected: classifier.more"
    ):
        families.build(Checkpoint(reference.ENCODERS["bert"], tensors, None))


def test_a_tensor_under_two_names_is_refused():
    tensors = reference.encoder_tensors(reference.ENCODERS["bert"])
    tensors["pooler.dense.weight"] = tensors["bert.pooler.dense.weight"]
    with pytest.raises(ValueError, match="the same tensor under two names"):
        families.build(Checkpoint(reference.ENCODERS["bert"], tensors, None))


def test_num_labels_must_fit_the_checkpoint():
    config = reference.ENCODERS["bert"]
    whole = Checkpoint(config, reference.encoder_tensors(config), None)
    body = Checkpoint(config | {"architectures": ["BertForMaskedLM"]}, without_head("bert"), None)
    decoder = reference.FAMILIES["qwen2"]
    assert families.build(whole, num_labels=3).config.num_labels == 3
    with pytest.raises(ValueError, match="num_labels must be omitted or 3, the outputs of the .* got 2"):
        families.build(whole, num_labels=2)
    with pytest.raises(
        ValueError, match=r"has no classification head; give .*num_labels=2\), or load a Bert"
    ):
        families.build(body)
    with pytest.raises(ValueError, match="num_labels must be"):
        families.build(body, num_labels=0)
    with pytest.raises(
        ValueError, match="num_labels is for encoders .* a qwen2 model has a language-model head"
    ):
        families.build(Checkpoint(decoder, reference.family_tensors(decoder), None), num_labels=2)


def test_a_row_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="rows must have at most 48 tokens, for the model has no more pos"):
        base_of("roberta").module(jnp.zeros((1, 49), int))


def test_impossible_sizes_are_refused():
    sizes = {"vocab_size": 4, "d_model": 4, "d_ff": 4, "num_layers": 1, "num_heads": 2, "num_labels": 2}
    with pytest.raises(ValueError, match="num_labels"):
        EncoderConfig(**sizes | {"num_labels": 0})
    with pytest.raises(ValueError, match="position_offset"):
        EncoderConfig(**sizes, position_offset=-1)
