"""Every task of the command line: fit, predict and evaluate on a tiny model, and what it refuses."""

import json

import numpy as np
import pytest
from builders.commands import call
from builders.encoder_folder import write_encoder
from builders.thorough import sample_of
from datasets import Dataset

from bnlora.app.recipe import Recipe
from bnlora.data.tables import read_table, write_table

SMALL = ["--steps", "2", "--batch-size", "4", "--rank", "2", "--top-layers", "1", "--target", "v_proj"]
TEXTS = ["the plot is good", "the film was bad"] * 4
WORDS = ["--word", " bad", "--word", " good"]
TABLES = {
    "choices": (
        {"text": TEXTS, "answers": [["good", "bad"], ["bad", "good film", "is"]] * 4, "label": [0, 2] * 4},
        ["--task", "choices", "--choices", "answers", "--normalise", "tokens"],
        ["probability choice 0", "probability choice 2", "prediction"],
        "accuracy",
    ),
    "grades": (
        {"text": TEXTS, "label": [3, 0] * 4},
        ["--task", "grades", *WORDS],
        ["probability grade 3", "entropy"],
        "ece",
    ),
    "votes": (
        {"text": TEXTS, "label": [[0, 3], [2, 1]] * 4},
        ["--task", "votes", *WORDS],
        ["probability bad", "mutual information"],
        "nll",
    ),
    "values": (
        {"text": TEXTS, "label": [2.5, -1.0] * 4},
        ["--task", "values", *WORDS],
        ["mean", "standard deviation", "5%", "95%"],
        "crps",
    ),
    "texts": (
        {"text": [f" {text}" for text in TEXTS], "before": ["a"] * 8},
        ["--task", "texts", "--prompt", "before"],
        ["log likelihood", "tokens"],
        "perplexity",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", sample_of(TABLES, ["choices", "values"]))
@pytest.mark.parametrize("ending", ["csv"])
def test_from_a_table_to_scores(task, ending, tmp_path, tiny_folder):
    columns, options, names, score = TABLES[task]
    write_table(Dataset.from_dict(columns), tmp_path / f"train.{ending}")
    train, out = tmp_path / f"train.{ending}", tmp_path / "fit"
    done = call("fit", train, "--out", out, "--base", tiny_folder, *options, *SMALL)
    assert done.exit_code == 0, done.output
    # Rows that are read later may have fewer choices than those of the fit.
    write_table(
        Dataset.from_dict({name: values[:1] for name, values in columns.items()}), tmp_path / "new.jsonl"
    )
    done = call("predict", out, tmp_path / "new.jsonl", "--out", tmp_path / "out.csv", "--draws", 2, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 1
    rows = read_table(tmp_path / "out.csv")
    assert set(names) <= set(rows.column_names)
    assert all(np.isfinite(float(rows[name][0])) for name in names if name != "prediction")
    done = call("evaluate", out, train, "--draws", 2, "--json")
    assert done.exit_code == 0, done.output
    assert np.isfinite(json.loads(done.stdout)["metrics"][score]["value"])


@pytest.mark.slow
def test_labels_of_an_encoder(tmp_path):
    """A checkpoint without a head gets a new one, and rows are the texts alone."""
    folder = write_encoder(tmp_path / "body")
    table = Dataset.from_dict({"text": TEXTS, "label": ["good", "bad"] * 4})
    write_table(table, tmp_path / "train.csv")
    options = ["--task", "labels", "--word", "bad", "--word", "good", "--pooling", "mean"]
    small = [*SMALL, "--target", "lm_head"]
    done = call("fit", tmp_path / "train.csv", "--out", tmp_path / "fit", "--base", folder, *options, *small)
    assert done.exit_code == 0, done.output
    assert Recipe.from_folder(tmp_path / "fit").template == "{text}"
    out = tmp_path / "out.csv"
    done = call("predict", tmp_path / "fit", tmp_path / "train.csv", "--out", out, "--draws", 2)
    assert done.exit_code == 0, done.output
    rows = read_table(out)
    assert set(rows["prediction"]) <= {"bad", "good"}
    assert float(rows["probability bad"][0]) + float(rows["probability good"][0]) == pytest.approx(1)


def test_what_a_task_needs():
    with pytest.raises(ValueError, match="the task 'words' takes at least 2 words .*; got"):
        Recipe(())
    with pytest.raises(ValueError, match="the task 'values' takes exactly 2 words"):
        Recipe((" a", " b", " c"), task="values")
    with pytest.raises(ValueError, match="the task 'texts' takes no words"):
        Recipe((" a", " b"), task="texts")
    with pytest.raises(ValueError, match="the task 'choices' and a column of choices go together"):
        Recipe((), task="choices")
    with pytest.raises(ValueError, match="task must be one of .*; got 'value'"):
        Recipe((" a", " b"), task="value")


def test_tasks_without_classes_refuse_what_needs_them(tmp_path, tiny_folder):
    columns, options, _, _ = TABLES["values"]
    write_table(Dataset.from_dict(columns), tmp_path / "train.csv")
    train, out = tmp_path / "train.csv", tmp_path / "fit"
    assert call("fit", train, "--out", out, "--base", tiny_folder, *options, *SMALL).exit_code == 0
    done = call("evaluate", out, train, "--report", tmp_path / "page.html")
    assert done.exit_code == 1
    assert "--report draws classes; the task 'values' has none" in done.output
    done = call("diagnose", out, train)
    assert done.exit_code == 1
    assert "bl.diagnose needs a model of classes; got a model of values" in done.output
