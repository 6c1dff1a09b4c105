"""Reading along: every prefix is predicted as the text that ends there, and shown without being believed."""

import jax
import numpy as np
import pytest
from builders.html_page import Page
from datasets import Dataset
from rich.console import Console

import bnlora as bl
from bnlora.prediction.predict import Prediction
from bnlora.prediction.reading import Reading, read_along, tokens_of

KEY = jax.random.key(0)
TEMPLATE = "Review: {text}\nSentiment:"
TEXT = "the film was good, the plot bad \N{SLIGHTLY SMILING FACE}"


class Normal:
    """A posterior of independent normal adapters."""

    def __init__(self, model):
        self.model = model

    def draw_adapters(self, key, num_draws):
        shapes = {n: site.shapes for n, site in self.model.sites.items()}
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(key, len(leaves))
        drawn = [
            0.5 * jax.random.normal(k, (num_draws, *shape)) for k, shape in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, drawn)


@pytest.fixture(scope="module")
def posterior(tiny_folder):
    base = bl.load(tiny_folder)
    ids = [base.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (" bad", " good")]
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2, layers=[1])
    return Normal(bl.Classifier(base, sites, bl.priors.normal(), label_ids=ids))


@pytest.fixture(scope="module")
def reading(posterior):
    return read_along(KEY, posterior, TEXT, template=TEMPLATE, num_draws=3, batch_size=4)


def test_prefixes_are_predicted_as_the_truncated_texts(posterior, reading):
    """Each prefix alone, through the reader of data and `predict`."""
    assert "".join(reading.pieces) == TEXT
    assert reading.words == (" bad", " good")
    for t in (0, 2, len(reading.pieces) - 1):
        rows = Dataset.from_dict({"text": ["".join(reading.pieces[: t + 1])]})
        data = bl.text_classification(
            rows,
            posterior.model.base.tokenizer,
            text="text",
            label=None,
            words=[" bad", " good"],
            template=TEMPLATE,
        )
        alone = bl.predict(KEY, posterior, data.train, num_draws=3)
        np.testing.assert_allclose(
            reading.prediction.draw_log_probs[:, t], alone.draw_log_probs[:, 0], atol=1e-5
        )


def test_pieces_end_where_tokens_end(posterior):
    tokenizer = posterior.model.base.tokenizer
    pieces = tokens_of(TEXT, tokenizer, TEMPLATE)
    assert pieces[:3] == ["the", " film", " was"]
    assert pieces[-1].strip() == "\N{SLIGHTLY SMILING FACE}"  # the bytes of one letter are one piece
    assert tokens_of("  good  ", tokenizer, TEMPLATE) == ["  good  "]


def test_bad_input_gets_one_sentence(posterior, reading):
    with pytest.raises(ValueError, match="non-empty string"):
        read_along(KEY, posterior, "  ")
    with pytest.raises(ValueError, match="must contain {text} once"):
        read_along(KEY, posterior, TEXT, template="Review:")
    with pytest.raises(ValueError, match="nearest is 'entropy'"):
        read_along(KEY, posterior, TEXT, by="entropies")
    with pytest.raises(ValueError, match="top must be positive"):
        reading.shaded("entropy", top=0.0)
    untold = Normal(bl.Classifier(bl.Base.random(KEY, posterior.model.base.config),
                                  posterior.model.sites, bl.priors.normal(), label_ids=(3, 5)))  # fmt: skip
    with pytest.raises(ValueError, match="needs a base with a fast tokenizer.*got NoneType"):
        read_along(KEY, untold, TEXT)


HOSTILE = ("<script>alert(1)</script>", ' "quoted"', "\n& [red]so[/red]")


@pytest.fixture(scope="module")
def hostile():
    margin = np.random.default_rng(0).normal(size=(4, 3))
    return Reading(
        HOSTILE, (" bad", " <b>good"), Prediction(-np.logaddexp(0, np.stack([margin, -margin], -1)))
    )


def test_html_shows_every_piece_and_number_and_runs_nothing(hostile):
    page = Page.of(hostile._repr_html_())
    assert "script" not in page.tags
    assert "b" not in page.tags
    spans = [attributes for tag, attributes in page.starts if attributes.get("class") == "piece"]
    found = hostile.prediction
    for t, span in enumerate(spans):
        assert f"entropy {found.entropy[t]:.3f}" in span["title"]
        assert f"mutual information {found.mutual_information[t]:.4f}" in span["title"]
        assert f"= {found.probs[t, 1]:.3f}" in span["title"]
        share = found.mutual_information[t] / found.mutual_information.max()
        assert span["style"] == f"background:rgba(213, 94, 0, {0.7 * share:.3f})"
    assert len(spans) == 3
    for piece in HOSTILE:
        assert piece.strip() in page.text
    assert "mutual information in nats: 0" in page.text


@pytest.mark.parametrize("by", ["mutual_information", "entropy"])
def test_terminals_show_the_text_as_it_is(hostile, by):
    console = Console(width=90, color_system="truecolor", force_terminal=True)
    with console.capture() as captured:
        console.print(hostile.shaded(by, top=0.7))
    plain = Console(width=90, color_system=None)
    with plain.capture() as text:
        plain.print(hostile.shaded(by, top=0.7))
    assert "".join(HOSTILE) in text.get()
    assert f"{by.replace('_', ' ')} in nats: 0" in text.get()
    assert " 0.7" in text.get()
    values = getattr(hostile.prediction, by)
    mixed = [round(255 + (c - 255) * 0.7 * min(values[0] / 0.7, 1.0)) for c in (213, 94, 0)]
    assert "48;2;{};{};{}m".format(*mixed) in captured.get()


def test_a_single_draw_has_no_shade():
    still = Reading(("a",), ("x", "y"), Prediction(np.log([[[0.3, 0.7]]])))
    assert "rgba(213, 94, 0, 0.000)" in still._repr_html_()
    assert repr(still) == "Reading(1 tokens, 1 draws, p(y) = 0.700 after the last)"


def test_with_three_words_the_most_probable_at_the_end_is_shown():
    three = Reading(("a", "b"), ("x", "y", "z"), Prediction(np.log([[[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]])))
    assert three.shown_class == 2
    assert "p(z) = 0.500" in repr(three)
    shown = [" ".join(row[1:4]) for row in three.table.rows]
    assert shown == ["0.600 0.300 0.100", "0.200 0.300 0.500"]
