"""Encoders from a folder to every result: rows, logits, posteriors against quadrature, files, refusals."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from builders.encoder_folder import encoder_tokenizer, write_encoder
from datasets import Dataset
from numpyro.infer.util import log_density

import bnlora as bl
from bnlora.program.likelihoods import likelihood_from
from bnlora.testing import tiny_base, tiny_encoder, tiny_rows

KEY = jax.random.key(0)
CLASSES = ["bad", "good"]
LIKELIHOOD = bl.likelihoods.Labels(2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> bl.Base:
    """The body of a BERT with a new head."""
    return bl.load(write_encoder(tmp_path_factory.mktemp("body")), num_labels=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> bl.Base:
    """A BERT with a classification head."""
    folder = tmp_path_factory.mktemp("classifier")
    return bl.load(write_encoder(folder, "BertForSequenceClassification"))


def table(count: int = 16) -> Dataset:
    subjects, ends = ("the plot is", "a very fine film", "the story was"), ("bad", "good")
    texts = [f"{subjects[i % 3]} {ends[i % 2]}" for i in range(count)]
    return Dataset.from_dict({"text": texts, "label": [CLASSES[i % 2] for i in range(count)]})


@pytest.fixture(scope="module")
def data(base) -> bl.TextData:
    splits = {"train": table(), "test": table(4)}
    return bl.text_classification(splits, base, text="text", label="label", classes=CLASSES)


def model_of(base: bl.Base, modules=("q_proj", "v_proj", "lm_head"), prior=None) -> bl.Classifier:
    sites = bl.select(base, list(modules), rank=4)  # of the head too, which has only two classes
    return bl.Classifier(base, sites, prior or bl.priors.normal(), likelihood=LIKELIHOOD)


def test_rows_have_the_tokens_that_the_tokenizer_adds(data):
    """All of them, and none of the padding and truncation that the tokenizer's own file asks for."""
    rows = data.train
    np.testing.assert_array_equal(rows.tokens[0], [2, 4, 5, 6, 10, 3, 0, 0])
    np.testing.assert_array_equal(rows.mask.sum(1)[:3], [6, 7, 6])
    np.testing.assert_array_equal(rows.labels[:4], [0, 1, 0, 1])
    np.testing.assert_array_equal(rows.first, 0)
    assert repr(data) == "TextData(train 16 x 8, test 4 x 8; classes ['bad', 'good'])"
    assert "none" in str(data.overview[1])


def test_a_cut_row_keeps_both_ends(base):
    long = Dataset.from_dict({"text": ["the plot is a very fine story"], "label": [1]})
    given = {"text": "text", "label": None, "classes": CLASSES, "max_length": 5}
    for side, kept in (("right", [2, 4, 5, 6, 3]), ("left", [2, 12, 14, 15, 3])):
        rows = bl.text_classification({"test": long}, base, truncate=side, **given)["test"]
        np.testing.assert_array_equal(rows.tokens[0][:5], kept)
        assert rows.mask.sum() == 5


@pytest.mark.slow
def test_from_a_folder_to_every_result(base, data, tmp_path):
    model = model_of(base)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, data.train, optax.adam(0.05), num_steps=30, batch_size=8)
    assert np.isfinite(fit.history["elbo"]).all()
    prediction = bl.predict(KEY, fit, data["test"], num_draws=8)
    np.testing.assert_allclose(prediction.probs.sum(1), 1.0, rtol=1e-5)
    assert "accuracy" in str(bl.metrics.summary(KEY, prediction, data["test"].labels))
    bl.save_fit(fit, tmp_path / "fit")
    again = bl.load_fit(tmp_path / "fit", model, guide)
    np.testing.assert_array_equal(bl.predict(KEY, again, data["test"], num_draws=8).probs, prediction.probs)
    tree = bl.to_arviz(KEY, fit, data.train, num_draws=4)
    assert "posterior" in tree.children
    assert "labels" in str(model.overview[0])
    with pytest.raises(ValueError, match=r"classes are label words; got Labels\(num_labels=2\)"):
        bl.read_along(KEY, fit, "the plot is good")


@pytest.mark.slow
def test_the_tangent_model_of_a_trained_head(trained, data, tmp_path):
    core = bl.fit_core(
        KEY, trained, data.train, likelihood=LIKELIHOOD, size={"v_proj": 2, "lm_head": 2}, num_steps=4
    )
    assert list(core.frames) == ["v_proj", "lm_head", "slope"]
    bl.save_core(core, tmp_path / "core")
    again = bl.load_core(tmp_path / "core", trained)
    assert again.model.likelihood == LIKELIHOOD
    probs = bl.predict(KEY, core, data["test"], num_draws=4).probs
    np.testing.assert_array_equal(bl.predict(KEY, again, data["test"], num_draws=4).probs, probs)


@pytest.mark.slow
def test_the_tangent_model_of_a_new_head(base, data):
    """Only the head and a bias change its logits to first order, so they are the default."""
    core = bl.fit_core(KEY, base, data.train, likelihood=LIKELIHOOD, num_steps=4)
    assert list(core.frames) == ["lm_head", "bias"]
    with pytest.raises(ValueError, match="new and zero, so 'lm_head' must be among the adapted modules"):
        model_of(base, ["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"\['v_proj', 'slope'\] change no logit to first order"):
        bl.frames(KEY, base, ["v_proj", "slope"], data.train, likelihood=LIKELIHOOD)


@pytest.mark.parametrize("source", ["activations", "weights", "random"])
def test_frames_of_the_head_from_every_source(trained, data, source):
    chosen = bl.frames(KEY, trained, ["lm_head"], data.train, likelihood=LIKELIHOOD, size=2, source=source)
    assert chosen["lm_head"].left.shape[:2] == (1, 2)


def test_second_moments_of_the_head_are_those_of_the_first_token(trained, data):
    """Padding on the left moves the token that the head reads, and nothing else."""
    rows = data.train[:3]
    model = model_of(trained, ["lm_head"])
    chosen = [
        bl.frames(KEY, trained, ["lm_head"], given, likelihood=LIKELIHOOD, size=2, source="activations")
        for given in (rows, shifted(rows))
    ]
    first, second = (frames["lm_head"].energies[1] for frames in chosen)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4 * np.max(first))

    @jax.jit
    def inputs_of(weights):
        module = trained.bind(weights)
        return module.inputs(module.embed(rows.tokens, rows.mask), rows.mask, ["lm_head"], first_layer=0)

    inputs = inputs_of(trained.weights)
    own = np.linalg.svd(np.asarray(inputs["lm_head"][0][:, 0], np.float64))[1] ** 2
    np.testing.assert_allclose(np.ravel(first)[:3], own, rtol=1e-3)
    assert model.num_classes == 2


def shifted(rows: bl.Batch, by: int = 3) -> bl.Batch:
    """The same rows with padding on the left too."""
    pad = ((0, 0), (by, 0))
    return bl.Batch(jnp.pad(rows.tokens, pad, constant_values=7), jnp.pad(rows.mask, pad), rows.labels)


def test_padding_changes_no_logit(base, data):
    model = model_of(base)
    adapters = numpyro.handlers.seed(model.prior, KEY)()
    run = jax.jit(model.logits)
    logits = [run(base.weights, adapters, rows) for rows in (data.train, shifted(data.train))]
    np.testing.assert_allclose(*logits, atol=1e-5)


def line(sites):
    """One number along a fixed direction."""
    s = numpyro.sample("s", dist.Normal(0.0, 2.0))
    fixed = {}
    for name, site in sites.items():
        keys = jax.random.split(jax.random.key(len(name)))
        a, b = (jax.random.normal(k, shape) for k, shape in zip(keys, site.shapes.values(), strict=True))
        fixed[name] = {"a": a, "b": s * b}
    return fixed


@pytest.mark.slow
def test_the_posterior_of_a_head_is_that_of_quadrature(base, data):
    """NUTS on the one position that the head reads, against the logits of the whole model."""
    rows = shifted(data.train)
    model = model_of(base, ["lm_head"], line)
    module = base.module

    @jax.jit
    def log_joint(s):
        adapters = numpyro.handlers.substitute(model.prior, {"s": s})()["lm_head"]
        placed = {"lm_head": {"a": adapters["a"], "b": adapters["b"] * model.sites["lm_head"].scale}}
        log_probs = jax.nn.log_softmax(module(rows.tokens, rows.mask, adapters=placed))
        return log_probs[jnp.arange(16), rows.labels].sum() + dist.Normal(0.0, 2.0).log_prob(s)

    density = jax.jit(lambda s: log_density(model, (base.weights, rows), {}, {"s": s})[0])
    grid = np.linspace(-9, 9, 121)
    log_joints = np.array([float(log_joint(s)) for s in grid])
    for i in (20, 60, 90):
        assert float(density(grid[i])) == pytest.approx(log_joints[i], abs=1e-3)
    weights = np.exp(log_joints - log_joints.max())
    mean = (weights * grid).sum() / weights.sum()
    sd = ((weights * (grid - mean) ** 2).sum() / weights.sum()) ** 0.5
    chains = bl.mcmc.sample_nuts(KEY, model, rows, num_chains=2, num_warmup=100, num_draws=200)
    draws = chains.sites()["s"].ravel()
    # Four standard errors, if at least a tenth of the draws are independent.
    assert abs(draws.mean() - mean) < 4 * sd / (len(draws) / 10) ** 0.5


def test_a_record_gives_the_likelihood_again():
    assert likelihood_from(LIKELIHOOD.record()) == LIKELIHOOD


def test_what_does_not_fit_is_refused():
    encoder, decoder = tiny_encoder(KEY, num_labels=3), tiny_base(KEY)
    sites, prior = bl.select(encoder, ["lm_head"], rank=1), bl.priors.normal()
    cases = {
        "num_labels must be 3, the outputs of the base's classification head; got 2": (encoder, LIKELIHOOD),
        "label words need a base with a language-model head": (encoder, bl.likelihoods.Words((3, 5))),
        "completions need a base with a language-model head": (encoder, bl.likelihoods.Completions(2)),
        "Labels need an encoder with a classification head": (decoder, LIKELIHOOD),
    }
    for said, (base, likelihood) in cases.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            bl.Classifier(base, sites, prior, likelihood=likelihood)
    with pytest.raises(ValueError, match="num_labels must be at least 2; got 1"):
        bl.likelihoods.Labels(1)
    model = bl.Classifier(encoder, sites, prior, likelihood=bl.likelihoods.Labels(3))
    wide = tiny_rows(KEY, 4, vocabulary=60)
    with pytest.raises(ValueError, match="which the model has not: its embedding has 40 rows"):
        model.check_tokens(wide)


def read(base, **options) -> bl.TextData:
    return bl.text_classification(table(), base, text="text", label="label", **options)


def test_words_and_classes_belong_to_their_bases(base, trained, tokenizer):
    decoder = tiny_base(KEY)
    cases = {
        "give classes, the names of the labels, because the base is an encoder; got words": (base, "words"),
        "give classes, the names of the labels, because the base is an encoder; got neither": (base, ""),
        "give words, one token for each class, because the base is a language model; got classes": (
            bl.Base(decoder.name, "llama", decoder.config, decoder.graph, decoder.weights, tokenizer),
            "classes",
        ),
        "give either words, for a language model, or classes, for an encoder; got neither": (tokenizer, ""),
        "reads a token that the tokenizer adds before a text": (tokenizer, "classes"),
    }
    for said, (given, name) in cases.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            read(given, **({name: CLASSES} if name else {}))
    with pytest.raises(ValueError, match="got classes and words"):
        read(tokenizer, words=[" bad", " good"], classes=CLASSES)
    with pytest.raises(ValueError, match="classes must be 2 names, one for each output"):
        read(base, classes=["bad", "fair", "good"])
    with pytest.raises(ValueError, match="classes 'bad' and 'bad ' must differ by more than spaces"):
        read(base, classes=["bad", "bad "])
    with pytest.raises(ValueError, match=r"order of the base's classification head, \['bad', 'good'\]"):
        read(trained, classes=["good", "bad"])
    assert len(read(encoder_tokenizer(), classes=CLASSES).train) == 16


def test_a_folder_without_a_head_asks_for_num_labels(tmp_path: Path):
    folder = write_encoder(tmp_path / "body")
    with pytest.raises(ValueError, match=r"has no classification head; give the number of classes"):
        bl.load(folder)
