"""Texts of a generation: what ends them, their pieces, how they are shown, and those of a real model."""

import copy
import json
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from builders.html_page import Page
from builders.written import Drawn
from rich.console import Console

import bnlora as bl
from bnlora.data.assets import fetch_smollm2
from bnlora.prediction.generated import SHOWN, Generation
from bnlora.prediction.generation import generate
from bnlora.prediction.prompts import Pieces, Stops

KEY = jax.random.key(0)
PROMPTS = ["the plot is", "Review: good"]


@pytest.fixture(scope="module")
def base(tiny_folder):
    return bl.load(tiny_folder)


@pytest.fixture(scope="module")
def posterior(base):
    sites = bl.select(base, ["q_proj", "down_proj"], rank=2, layers=[1])
    return Drawn(bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5)))


@pytest.fixture(scope="module")
def free(posterior):
    """Texts that nothing ends."""
    return written(posterior)


def written(posterior, **options):
    return generate(KEY, posterior, PROMPTS, max_new_tokens=12, num_draws=3, temperature=1.0, **options)


def test_prompts_are_tokenised_and_pieces_are_the_text(base, posterior, free):
    ids = [base.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    same = generate(KEY, posterior, ids, max_new_tokens=12, num_draws=3, temperature=1.0)
    np.testing.assert_array_equal(same.tokens, free.tokens)
    assert same.prompts[0] == " ".join(map(str, ids[0]))
    for row in range(2):
        assert free.texts[row] == "".join(free.pieces[row]).replace("<|end|>", "")
        whole = base.tokenizer.decode([*ids[row], *free.tokens[row]])
        assert whole.startswith(PROMPTS[row] + "".join(free.pieces[row]))


@pytest.mark.parametrize("mixture", ["token", "sequence"])
def test_a_stop_token_ends_a_text_and_leaves_the_others(posterior, free, mixture):
    free = free if mixture == "token" else written(posterior, mixture="sequence")
    tokens = free.tokens[0].tolist()
    stop = tokens[4]
    place = tokens.index(stop)
    found = written(posterior, stop=stop, mixture=mixture)
    assert found.lengths[0] == place + 1
    np.testing.assert_array_equal(found.tokens[0, : place + 1], tokens[: place + 1])
    assert found.texts[0] == "".join(free.pieces[0][:place])
    assert found.pieces[0] == free.pieces[0][: place + 1]
    for row, own in enumerate(free.tokens.tolist()):
        end = own.index(stop) + 1 if stop in own else 12
        assert found.lengths[row] == end
        np.testing.assert_allclose(found.log_probs[row, :end], free.log_probs[row, :end], atol=1e-5)
        for numbers in (found.tokens, found.log_probs, found.entropy, found.aleatoric):
            assert not numbers[row, end:].any()
    np.testing.assert_allclose(found.sequence_log_probs[0], free.log_probs[0, : place + 1].sum(), atol=1e-4)


def test_the_end_token_of_the_tokenizer_ends_a_text(base, posterior, free):
    tokenizer = copy.deepcopy(base.tokenizer)
    stop = int(free.tokens[1, 6])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    model = posterior.model.over(replace(base, tokenizer=tokenizer))
    found = generate(KEY, Drawn(model), PROMPTS, max_new_tokens=12, num_draws=3, temperature=1.0)
    assert found.lengths[1] == free.tokens[1].tolist().index(stop) + 1
    assert found.tokens[1, found.lengths[1] - 1] == stop


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_a_text_before_it(posterior, free, streamed):
    """A string that begins in one token and ends in the next; with eight steps at a time and with one."""
    stop = free.pieces[0][2][-1:] + free.pieces[0][3][:1]
    seen = []
    found = written(posterior, stop=[stop, "never"], on_token=seen.append if streamed else None)
    text = "".join(free.pieces[0])
    assert found.texts[0] == text[: text.index(stop)]
    assert stop in "".join(found.pieces[0])
    assert stop not in "".join(found.pieces[0][:-1])
    assert found.lengths[0] == len(found.pieces[0]) <= 4
    assert not found.log_probs[0, found.lengths[0] :].any()
    if streamed:
        assert sum(token.row == 0 for token in seen) == found.lengths[0]


def test_all_texts_that_end_end_the_work(posterior, free):
    """Nothing is written after the last text has ended."""
    stops = [int(row[0]) for row in free.tokens]
    found = written(posterior, stop=stops)
    assert found.tokens.shape == (2, 1)
    assert found.texts == ("", "")


def test_letters_of_several_tokens_have_one_piece(tokenizer):
    letter = "\N{SLIGHTLY SMILING FACE}"
    before = tokenizer("good")["input_ids"]
    pieces = Pieces(tokenizer, before)
    found = [pieces.add(token) for token in tokenizer(f"good {letter} film")["input_ids"][len(before) :]]
    assert "".join(found) == f" {letter} film"
    assert letter in found  # its last byte; the bytes before have no piece
    assert found.count("") == len(letter.encode()) - 1


def test_text_is_cut_at_the_first_of_the_strings():
    stops = Stops((), ("b", "a b"))
    assert stops.cut("xa b") == "x"
    assert stops.cut("x") == "x"
    assert stops.end(["xa", " b"])
    assert not Stops((1,), ()).end(["x"])


HOSTILE = ("<script>alert(1)</script>", ' "quoted"', "\n& [red]so[/red]")


@pytest.fixture(scope="module")
def hostile():
    random = np.random.default_rng(0)
    return Generation(
        prompts=("<b>prompt</b>",), texts=("".join(HOSTILE),), pieces=(HOSTILE,), tokens=np.arange(3)[None],
        mask=np.ones((1, 3), bool), prompt_of=np.zeros(1, int),
        draw_log_probs=-random.uniform(1, 2, (4, 1, 3)), log_probs=-random.uniform(1, 2, (1, 3)),
        aleatoric=random.uniform(1, 2, (1, 3)), epistemic=random.uniform(0, 1, (1, 3)),
    )  # fmt: skip


def test_html_shows_every_piece_and_number_and_runs_nothing(hostile):
    page = Page.of(hostile._repr_html_())
    assert not {"script", "b"} & set(page.tags)
    spans = [attributes for tag, attributes in page.starts if attributes.get("class") == "piece"]
    assert len(spans) == 3
    for t, span in enumerate(spans):
        assert f"probability {np.exp(hostile.log_probs[0, t]):.3f}" in span["title"]
        assert f"entropy {hostile.entropy[0, t]:.3f}" in span["title"]
        assert f"epistemic {hostile.epistemic[0, t]:.4f}; nats" in span["title"]
        share = hostile.epistemic[0, t] / hostile.epistemic.max()
        assert span["style"] == f"background:rgba(213, 94, 0, {0.7 * share:.3f})"
    for piece in (*HOSTILE, "'<b>prompt</b>'"):
        assert piece.strip() in page.text
    assert "epistemic uncertainty of the token in nats: 0" in page.text


def test_terminals_show_the_text_as_it_is(hostile):
    plain = Console(width=90, color_system=None)
    with plain.capture() as text:
        plain.print(hostile.shaded("entropy", top=3.0))
    assert "".join(HOSTILE) in text.get()
    assert "entropy of the token in nats: 0" in text.get()
    assert f"{hostile.entropy.mean():.3f}" in text.get()
    assert f"{hostile.epistemic[0, 1]:.4f}" in repr(hostile.tokens_of(0))


def test_shades_that_are_not_known_are_refused(posterior, hostile):
    own = written(posterior, mixture="sequence")
    assert own.by == "entropy"
    assert "epistemic -" in own._repr_html_()
    assert "text 4 (prompt 1, draw 1)" in own._repr_html_()
    with pytest.raises(ValueError, match="shade by 'entropy', or generate with mixture='token'"):
        own.shaded("epistemic")
    with pytest.raises(ValueError, match="nearest is 'entropy'"):
        hostile.shaded("entropies")
    with pytest.raises(ValueError, match="top must be positive"):
        hostile.shaded("entropy", top=0.0)


def test_long_lists_are_shortened(hostile):
    count = SHOWN + 3
    many = replace(
        hostile, prompts=("p",) * count, texts=hostile.texts * count, pieces=hostile.pieces * count,
        tokens=np.repeat(hostile.tokens, count, 0), mask=np.repeat(hostile.mask, count, 0),
        prompt_of=np.arange(count), draw_log_probs=np.repeat(hostile.draw_log_probs, count, 1),
        **{n: np.repeat(getattr(hostile, n), count, 0) for n in ("log_probs", "aleatoric", "epistemic")},
    )  # fmt: skip
    page = Page.of(many._repr_html_())
    assert sum(attributes.get("class") == "piece" for _, attributes in page.starts) == 3 * SHOWN
    assert "and 3 more texts" in page.text
    assert f"text {count - 1}" in page.text


def test_a_generation_survives_copy_and_pickle(free):
    for again in (copy.deepcopy(free), pickle.loads(pickle.dumps(free))):
        assert repr(again) == repr(free) == "Generation(2 texts of 24 tokens, each by 3 draws)"
        assert again._repr_html_() == free._repr_html_()


REFERENCE = json.loads((Path(__file__).parents[1] / "references" / "generation.json").read_text("utf-8"))
"""Greedy continuations by torch, from `make_generation.py`."""


@cache
def smollm2() -> bl.Base:
    return bl.load(fetch_smollm2())


@pytest.mark.slow
def test_smollm2_continues_as_with_torch():
    """Where logits decide by more than the rounding of `test_parity` (4e-4); adapters are zero or absent."""
    base = smollm2()
    assert min(row["margin"] for row in REFERENCE) > 2e-3
    prompts = [row["prompt"] for row in REFERENCE]
    found = generate(KEY, base, prompts, max_new_tokens=32)
    for row, expected in enumerate(REFERENCE):
        assert found.tokens[row, : found.lengths[row]].tolist() == expected["tokens"]
    assert found.texts[0].startswith(" Paris.")
    assert not found.texts[0].endswith("<|im_end|>")
    assert found.pieces[0][-1] == "<|im_end|>"
