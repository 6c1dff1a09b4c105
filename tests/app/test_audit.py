"""`bnlora audit` on an adapter of a tiny model."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from builders.commands import WORDS, call, reviews
from builders.encoder_folder import write_encoder
from scipy.special import log_softmax

import bnlora as bl
from bnlora.app import audit
from bnlora.app.audit import cross_tempered
from bnlora.data.tables import write_table


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with tables and an adapter that is confident at random."""
    folder = tmp_path_factory.mktemp("audit")
    write_table(reviews(24), folder / "test.csv")
    write_table(reviews(12, seed=1), folder / "train.csv")
    base = bl.load(tiny_folder)
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    adapters = {
        name: {f: jax.random.normal(next(keys), shape) for f, shape in site.shapes.items()}
        for name, site in sites.items()
    }
    bl.save_peft(adapters, folder / "adapter", sites=sites, base=base)
    return folder


@pytest.mark.slow
def test_every_method_is_measured_on_the_same_rows(place, tiny_folder, monkeypatch):
    monkeypatch.setattr(audit, "fit_core", partial(bl.fit_core, size={"v_proj": 4}))  # less to compile
    words = ["--data", place / "test.csv", *WORDS, "--base", tiny_folder, "--report", place / "audit.html"]
    done = call("audit", place / "adapter", *words, "--train", place / "train.csv", "--draws", 4, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["methods"]) == {"base", "adapter", "adapter, temperature", "core posterior"}
    scores = {name: method["metrics"] for name, method in result["methods"].items()}
    assert all(method["rows"] == 24 for method in result["methods"].values())
    # A temperature cannot change which class is the most probable; here the adapter is far too confident.
    assert scores["adapter"]["accuracy"] == scores["adapter, temperature"]["accuracy"]
    assert scores["adapter, temperature"]["nll"]["value"] < scores["adapter"]["nll"]["value"]
    html = (place / "audit.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 1
    assert "nll minus the adapter" in html


def test_the_base_is_the_model_without_adapters(place, tiny_folder):
    words = ["--data", place / "test.csv", *WORDS, "--base", tiny_folder, "--report", place / "again.html"]
    result = json.loads(call("audit", place / "adapter", *words, "--json").stdout)
    base = bl.load(tiny_folder)
    data = bl.text_classification(
        reviews(24), base, text="text", label="label", words=[" bad", " good"],
        template="Review: {text}\nSentiment:",
    )  # fmt: skip
    rows = data.train
    logits = base.module(rows.tokens, rows.mask)[np.arange(24), np.asarray(rows.last)][:, data.label_ids]
    expected = bl.metrics.nll(log_softmax(np.asarray(logits, np.float64), axis=1), np.asarray(rows.labels))
    assert result["methods"]["base"]["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-4)


def test_the_temperature_of_a_row_does_not_see_the_row():
    """Changing one label changes the temperature of the other half only."""
    stream = np.random.default_rng(0)
    logits = 8 * stream.standard_normal((1, 40, 2))
    labels = stream.integers(0, 2, 40)
    prediction = bl.Prediction(log_softmax(logits, axis=-1))
    tokens = np.ones((40, 1), int)

    def tempered(labels):
        rows = bl.Batch(tokens, tokens > 0, labels)
        return cross_tempered(jax.random.key(0), prediction, rows).draw_log_probs[0]

    changed = labels.copy()
    changed[7] = 1 - changed[7]
    same = np.isclose(tempered(labels), tempered(changed), atol=1e-6).all(1)
    assert same[7]
    assert same.sum() == 20


def test_errors_are_one_sentence(place, tiny_folder):
    words = ["--data", place / "test.csv", *WORDS, "--base", tiny_folder, "--report", place / "x.html"]
    done = call("audit", place / "nothing", *words)
    assert done.exit_code == 1
    assert "is not an adapter folder" in done.output
    assert not (place / "x.html").exists()


def test_an_adapter_of_an_encoder_with_its_head(tmp_path):
    """The adapter predicts with the head in its folder; the base has none and cannot be measured."""
    folder = write_encoder(tmp_path / "body")
    base = bl.load(folder, num_labels=2)
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2)
    filled = {n: {f: np.full(shape, 0.3) for f, shape in s.shapes.items()} for n, s in sites.items()}
    filled["lm_head"]["b"][:, 0] = -0.3  # the classes differ
    bl.save_peft(filled, tmp_path / "adapter", sites=sites, base=base)
    write_table(reviews(12), tmp_path / "test.csv")
    words = ["--task", "labels", "--word", "bad", "--word", "good", "--base", folder]
    options = ["--data", tmp_path / "test.csv", "--report", tmp_path / "page.html", "--json"]
    done = call("audit", tmp_path / "adapter", *options, *words)
    assert done.exit_code == 0, done.output
    methods = json.loads(done.stdout)["methods"]
    assert set(methods) == {"adapter"}  # which says the same of every row, so that no temperature helps
    assert "no temperature: the negative log-likelihood of these rows has no minimum" in done.stderr
    data = bl.text_classification(reviews(12), base, text="text", label="label", classes=["bad", "good"])
    point = bl.load_peft_posterior(tmp_path / "adapter", base, likelihood=bl.likelihoods.Labels(2))
    probs = bl.predict(jax.random.key(0), point, data.train, num_draws=1).probs
    expected = -np.log(probs[np.arange(12), np.asarray(data.train.labels)]).mean()
    assert methods["adapter"]["metrics"]["nll"]["value"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - np.log(2)) > 1e-3
    done = call("audit", tmp_path / "adapter", *options, *WORDS, "--task", "votes")
    assert done.exit_code == 1
    assert "--task must be 'words' or 'labels'" in done.output
