"""`bnlora generate`: the texts of `bl.generate`, from prompts or a table, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from builders.commands import WORDS, call, reviews
from datasets import Dataset

import bnlora as bl
from bnlora.app.generate import _fit
from bnlora.data.tables import read_table, write_table

SMALL = ["--steps", "2", "--batch-size", "4", "--rank", "2", "--top-layers", "1"]
PROMPTS = ["the plot", "the film was"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """Folders of a fit to texts, and of one to words that adapts the head."""
    folder = tmp_path_factory.mktemp("generate")
    write_table(reviews(8), folder / "train.csv")
    base = ["--base", tiny_folder, *SMALL]
    texts = ["--task", "texts", "--target", "v_proj"]
    for name, options in {"texts": texts, "words": [*WORDS, "--target", "lm_head"]}.items():
        done = call("fit", folder / "train.csv", "--out", folder / name, *base, *options)
        assert done.exit_code == 0, done.output
    write_table(Dataset.from_dict({"question": PROMPTS}), folder / "prompts.jsonl")
    return folder


OPTIONS = ["--max-new-tokens", 6, "--temperature", 1, "--draws", 3]


@pytest.mark.slow
def test_the_texts_are_those_of_the_library(place):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = call("generate", place / "texts", *prompts, *OPTIONS, "--seed", 4, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["texts"]
    options = {"max_new_tokens": 6, "temperature": 1.0, "num_draws": 3}
    expected = bl.generate(jax.random.key(4), _fit(place / "texts"), PROMPTS, **options)
    assert [row["text"] for row in rows] == list(expected.texts)
    assert [row["prompt"] for row in rows] == PROMPTS
    for name, values in {"entropy": expected.entropy, "epistemic": expected.epistemic}.items():
        means = [values[i, expected.mask[i]].mean() for i in range(2)]
        np.testing.assert_allclose([row[name] for row in rows], means, rtol=1e-6)


def test_prompts_of_a_table_are_written_to_a_table(place):
    table, out = place / "prompts.jsonl", place / "written.csv"
    options = ["--text", "question", "--mixture", "sequence", "--out", out]
    done = call("generate", place / "texts", "--prompts", table, *options, *OPTIONS)
    assert done.exit_code == 0, done.output
    assert "table: " in done.stdout
    rows = read_table(out)
    assert rows["prompt"] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert "epistemic" not in rows.column_names


def test_what_cannot_write_is_refused_in_a_sentence(place):
    done = call("generate", place / "texts")
    assert (done.exit_code, "either as --prompt, once for each" in done.output) == (1, True)
    done = call("generate", place / "words", "--prompt", "the plot")
    assert done.exit_code == 1
    assert "has only the 2 rows of the label words" in " ".join(done.output.split())
