"""The commands on a tiny model: output, files, error messages and exit codes."""

import csv
import json
import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pyarrow as pa
import pytest
import typer
from builders.commands import RUN, WORDS, call, reviews

import bnlora
from bnlora.app import cli, options, recipe
from bnlora.app.outcome import ExitCode, as_json, require_free, with_columns
from bnlora.app.printing import reporting
from bnlora.app.recipe import Recipe, Schedule
from bnlora.app.tasks import column_names
from bnlora.data.tables import read_table, write_table
from bnlora.infer.svi.checkpoint import RECORD, load_fit
from bnlora.testing import tiny_base

SMALL = ["--steps", "3", "--batch-size", "4", "--rank", "2", "--top-layers", "1", "--target", "lm_head"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with tables and a fit."""
    folder = tmp_path_factory.mktemp("work")
    write_table(reviews(12), folder / "train.csv")
    write_table(reviews(8, seed=1), folder / "test.jsonl")
    done = call("fit", folder / "train.csv", "--out", folder / "fit", "--base", tiny_folder, *WORDS, *SMALL)
    assert done.exit_code == 0, done.output
    assert "3, 0 skipped" in done.output
    assert "bnlora predict" in done.output
    return folder


def test_fit_writes_its_recipe(place, tiny_folder):
    saved = Recipe.from_folder(place / "fit")
    assert saved.words == (" bad", " good")
    assert saved.base == str(tiny_folder)
    assert saved.template == "Review: {text}\nSentiment:"
    base = saved.load_base()
    data = saved.read(reviews(4), base, text="text", label="label")
    assert len(load_fit(place / "fit", *saved.build(base, data.label_ids)).step_seconds) == 3


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_predict_adds_columns_to_the_table(place, ending):
    done = call(
        "predict", place / "fit", place / "test.jsonl", "--out", place / f"out.{ending}", "--draws", 4
    )
    assert done.exit_code == 0, done.output
    rows = read_table(place / f"out.{ending}")
    assert rows["text"][:] == reviews(8, seed=1)["text"][:]
    for row in rows:
        assert float(row["probability bad"]) + float(row["probability good"]) == pytest.approx(1)
        assert (row["prediction"] == "good") == (float(row["probability good"]) > 0.5)
        assert 0 <= float(row["mutual information"]) <= float(row["entropy"])


def test_predict_needs_no_labels(place):
    write_table(reviews(3).remove_columns("label"), place / "bare.csv")
    done = call("predict", place / "fit", place / "bare.csv", "--out", place / "bare-out.csv", "--draws", 2)
    assert done.exit_code == 0, done.output


def test_predict_keeps_the_columns_of_a_table_in_another_encoding(place):
    """A CSV file as written by a spreadsheet, with a column named like a new one and arbitrary values."""
    rows = [["Id", "text", "prediction", "note"], ["007", "the film was good", "NA", 'null, "é"'],
            ["a1", "None", "", "1.50"]]  # fmt: skip
    with (place / "old.CSV").open("w", newline="", encoding="cp1252") as file:
        csv.writer(file, lineterminator="\r\n").writerows(rows)
    options = ["--out", place / "old-out.CSV", "--draws", 2, "--encoding", "cp1252", "--prefix", "new "]
    done = call("predict", place / "fit", place / "old.CSV", *options)
    assert done.exit_code == 0, done.output
    with (place / "old-out.CSV").open(newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    assert [row[:4] for row in written] == rows
    added = ["probability bad", "probability good", "entropy", "mutual information", "prediction"]
    assert written[0][4:] == [f"new {name}" for name in added]
    assert written[1][8] in ("bad", "good")


def test_overwrite_replaces_columns_and_prefix_keeps_them():
    table = pa.table({"entropy": ["mine", "mine"], "text": ["a", "b"]})
    names = column_names(Recipe((" bad", " good")))
    assert names == ["probability bad", "probability good", "entropy", "mutual information", "prediction"]
    with pytest.raises(
        ValueError, match=r"already has columns \['entropy'\]; .*--prefix 'new '.*--overwrite"
    ):
        require_free(table.column_names, names, "")
    require_free(table.column_names, names, "new ")
    extended = with_columns(table, {"entropy": [0.5, 0.25], "prediction": ["good", "bad"]})
    assert extended.column_names == ["text", "entropy", "prediction"]
    assert extended["entropy"].to_pylist() == [0.5, 0.25]
    kept = with_columns(table, {"entropy": [0.5, 0.25]}, prefix="new ")
    assert kept.column_names == ["entropy", "text", "new entropy"]


def test_export_writes_adapters_and_a_card(place):
    done = call(
        "export", place / "fit", place / "test.jsonl", "--out", place / "peft", "--draws", 2, "--json"
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["nll"]) == {"posterior", "mean"}
    for folder in (result["mean"], *result["draws"]):
        assert (place / folder / "adapter_model.safetensors").is_file()
    assert "library_name: peft" in (place / "peft" / "README.md").read_text()


def test_errors_name_the_line_of_the_file(place):
    (place / "odd.csv").write_text('text,label\n"two\nlines",bad\n\ngood,ugly\n')
    done = call("evaluate", place / "fit", place / "odd.csv")
    assert done.exit_code == 1
    assert f"error: label 'ugly' in line 5 of {str(place / 'odd.csv')!r} is neither" in done.output


def test_ambiguous_labels_need_the_option_labels_are(place, tiny_folder, monkeypatch):
    """Words 1 and 0 with labels 0 and 1; the recipe of the fit contains the option."""
    read, calls = Recipe.read, []

    def read_and_stop(self, *args, **options):
        calls.append((self, read(self, *args, **options)))
        raise ValueError("enough")

    monkeypatch.setattr(Recipe, "read", read_and_stop)
    command = ["fit", place / "train.csv", "--out", place / "digits", "--base", tiny_folder]
    command += ["--word", "1", "--word", "0", "--template", "{text}"]
    refused = call(*command).output
    assert f"label '0' in line 2 of {str(place / 'train.csv')!r} could be the word '0', class 1" in refused
    assert "--labels-are" in refused
    for kind, labels in (("words", [1, 0]), ("integers", [0, 1])):
        assert "enough" in call(*command, "--labels-are", kind).output
        saved, data = calls.pop()
        np.testing.assert_array_equal(data.train.labels, labels * 6)
        saved.save(place)
        assert Recipe.from_folder(place).labels_are == kind
    assert (
        "enough" in call("evaluate", place / "fit", place / "test.jsonl", "--labels-are", "integers").output
    )
    assert calls.pop()[0].labels_are == "integers"


def test_evaluate_prints_the_metrics_and_writes_a_page(place):
    page = place / "reports" / "page.html"
    done = call("evaluate", place / "fit", place / "test.jsonl", "--draws", 2, "--report", page)
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    assert "95% interval" in done.output
    assert "data:image/png;base64," in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "nowhere", "test.jsonl"], "'nowhere' contains no recipe.json"),
        (["predict", "fit", "tset.jsonl"], "there is no file 'tset.jsonl'; the nearest is 'test.jsonl'"),
        (["predict", "fit", "test.jsonl", "--out", "out.txt"], "must end in one of"),
        (["predict", "fit", "test.jsonl", "--out", "./test.jsonl"], "is the input table"),
        (["evaluate", "fit", "test.jsonl", "--report", "test.jsonl"], "is the input table"),
        (["evaluate", "fit", "test.jsonl", "--report", "."], "'.' is a folder; give the name of a file"),
        (["demo", "--report", "train.csv/page.html"], "cannot be written"),
        (["predict", "fit", "taken.csv"], "already has columns ['prediction']; use --prefix"),
        (
            ["predict", "fit", "cafe.csv"],
            "byte 0xe9 on line 2 is not valid in it; set the encoding of the file with",
        ),
        (["evaluate", "fit", "test.jsonl", "--encoding", "latin-9x"], "'latin-9x' is not known"),
        (["evaluate", "fit", "test.jsonl", "--text", "txt"], "no column 'txt'; its columns are"),
        (
            ["evaluate", "fit", "test.jsonl", "--label", "text"],
            "is neither an integer from 0 to 1 nor one of",
        ),
        (["fit", "train.csv", "--out", "fit", *WORDS], "'fit' already contains a fit"),
        (
            ["fit", "train.csv", "--out", "new", "--word", " bad", "--word", " superb"],
            "must be a single token",
        ),
        (
            ["fit", "train.csv", "--out", "new", "--base", "tinny", *WORDS],
            "there is no file or folder 'tinny'",
        ),
        (["fit", "train.csv", "--out", "new", *WORDS, "--target", "q_prj"], "nearest names: "),
        (["fit", "train.csv", "--out", "new", *WORDS, "--rank", "0"], "must be at least 1; got 0"),
        (["fit", "train.csv", "--out", "new", *WORDS, "--rank", "99"], "must be at most"),
        (["fit", "train.csv", "--out", "new", *WORDS, "--lam-max", "2"], "lam_max <= 1"),
        (
            ["fit", "train.csv", "--out", "new", *WORDS, "--max-length", "5"],
            "than 5 tokens (first: line 2 of 'train.csv',",
        ),
    ],
)
def test_an_error_is_reported_in_one_sentence(place, tiny_folder, monkeypatch, words, message):
    monkeypatch.chdir(place)
    (place / "taken.csv").write_text("text,prediction\ngood,bad\n")
    (place / "cafe.csv").write_bytes(b"text\ncaf\xe9\n")
    base = ["--base", tiny_folder] if words[0] == "fit" and "--base" not in words else []
    done = call(*words, *base)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert done.output.startswith("error: ")
    assert "Traceback" not in done.output
    assert not (place / "new").exists()
    assert read_table(place / "test.jsonl")["text"][:] == reviews(8, seed=1)["text"][:]


def test_a_diverged_fit_is_saved(place, tiny_folder):
    options = ["--prior", "none", "--learning-rate", "1e30", *SMALL, "--steps", "30"]
    paths = ["--out", place / "wild", "--base", tiny_folder, "--json"]
    done = call("fit", place / "train.csv", *paths, *WORDS, *options)
    assert done.exit_code == ExitCode.DIVERGED == 3
    assert "lower the learning rate" in done.stderr.replace("\n", " ")
    assert json.loads(done.stdout)["stopped"] == "diverged"
    assert json.loads((place / "wild" / RECORD).read_text())["stopped"] == "diverged"
    assert call("predict", place / "wild", place / "test.jsonl", "--out", place / "w.csv").exit_code == 0


def test_an_interrupted_fit_is_saved_and_has_its_exit_code(place, tiny_folder, monkeypatch):
    def interrupt(step, params):
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "Schedule", partial(InterruptedSchedule, interrupt))
    options = ["--out", place / "half", "--base", tiny_folder, "--json", *WORDS, *SMALL]
    done = call("fit", place / "train.csv", *options)
    assert done.exit_code == ExitCode.INTERRUPTED == 130
    assert json.loads(done.stdout)["stopped"] == "interrupted"
    assert json.loads((place / "half" / RECORD).read_text())["stopped"] == "interrupted"
    monkeypatch.setattr(cli, "Schedule", Schedule)
    again = call("fit", place / "train.csv", *options)
    assert again.exit_code == ExitCode.BAD_INPUT
    assert "contains an interrupted fit; go on with --resume, or remove it" in again.stderr
    other = call("fit", place / "train.csv", *options, "--resume", "--seed", "1")
    assert "holds checkpoints of another fit (key: [0, 0], now [0, 1])" in other.stderr
    ended = call("fit", place / "train.csv", *options, "--resume")
    assert json.loads(ended.stdout)["stopped"] == "steps"
    kept = call("fit", place / "train.csv", *options, "--resume")
    assert "contains a fit that has ended; leave out --resume" in kept.stderr
    assert sorted(path.name for path in (place / "half").iterdir()) == sorted(
        path.name for path in (place / "fit").iterdir()
    )


class InterruptedSchedule(Schedule):
    """A schedule with a callback that simulates Ctrl-C."""

    def __init__(self, on_step, *args, **options):
        super().__init__(*args, **options)
        object.__setattr__(self, "on_step", on_step)

    def fit(self, *args, **options):
        return super().fit(*args, **options, on_step=self.on_step)


def test_an_interrupt_outside_a_fit_prints_no_result(place, monkeypatch):
    def predict(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "predict", predict)
    done = call("evaluate", place / "fit", place / "test.jsonl", "--json")
    assert (done.exit_code, done.stdout) == (ExitCode.INTERRUPTED, "")


def test_standard_output_is_only_json(place):
    out = place / "machine.csv"
    done = call("predict", place / "fit", place / "test.jsonl", "--out", out, "--draws", 4, "--json")
    result = json.loads(done.stdout)
    assert (result["table"], result["rows"], result["draws"]) == (str(out), 8, 4)
    predicted = read_table(out)["prediction"][:]
    assert result["predicted"] == {word: predicted.count(word) for word in ("bad", "good")}
    done = call("evaluate", place / "fit", place / "test.jsonl", "--draws", 4, "--json")
    accuracy = json.loads(done.stdout)["metrics"]["accuracy"]
    correct = [row["prediction"] == ["bad", "good"][int(row["label"])] for row in read_table(out)]
    assert accuracy["value"] == sum(correct) / 8
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]


def test_diagnose_reports_that_three_steps_have_not_converged(place):
    done = call("diagnose", place / "fit", place / "test.jsonl", "--draws", 40, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    statuses = {finding["name"]: finding["status"] for finding in result["findings"]}
    assert statuses["convergence"] == "problem"
    assert result["passed"] == ("problem" not in statuses.values())


def test_json_has_null_for_numbers_that_are_not_finite():
    assert json.loads(as_json({"a": {"b": float("nan")}, "c": 1.5})) == {"a": {"b": None}, "c": 1.5}


def test_wrong_usage_and_the_version_have_their_exit_codes():
    assert call("fit", "--colour", "red").exit_code == ExitCode.USAGE == 2
    assert call("fit", "t.csv", "--out", "x", *WORDS, "--prior", "sparse").exit_code == ExitCode.USAGE
    done = call("--version")
    assert (done.exit_code, done.stdout) == (0, f"bnlora {bnlora.__version__}\n")


COMMANDS = "demo fit predict evaluate diagnose refit audit generate export serve monitor".split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("bnlora fit --target q", {"q_proj"}),
        ("bnlora fit --prior ", {"core", "sparse-gp", "normal", "none"}),
        ("bnlora ", set(COMMANDS)),
    ],
)
def test_a_shell_completes_commands_and_values(words, offered):
    request = {
        "_BNLORA_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = RUN.invoke(cli.app, [], env=request, prog_name="bnlora")
    assert set(done.stdout.split()) == offered


def test_completion_offers_the_modules_of_the_models():
    assert set(options.MODULES) == set(tiny_base(jax.random.key(0)).modules)


@pytest.mark.slow
def test_a_pipe_gets_plain_lines_and_only_json(place):
    """In a separate process whose output is not a terminal."""
    words = ["evaluate", place / "fit", place / "test.jsonl", "--draws", "2", "--json"]
    run = [sys.executable, "-m", "bnlora", *words]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 8
    assert not {"\x1b", "\r"} & set(done.stdout + done.stderr)
    assert len(done.stderr.splitlines()) <= 3, done.stderr


def test_help_names_every_command_and_option():
    text = call("--help").output
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        assert call(command, "--help").exit_code == 0


def test_recipes_of_another_version_and_unknown_priors_raise(tmp_path):
    (tmp_path / recipe.FILE).write_text('{"words": [" bad", " good"], "colour": "red"}')
    with pytest.raises(ValueError, match="is not a recipe of this version .*colour"):
        Recipe.from_folder(tmp_path)
    with pytest.raises(ValueError, match="got 'sparse_gp', nearest is 'sparse-gp'"):
        Recipe((" bad", " good"), prior="sparse_gp")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (bnlora.HostLost("process 1 ended"), ExitCode.LOST),
        (ValueError("a wrong row"), ExitCode.BAD_INPUT),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=["lost", "bad input", "interrupted"],
)
def test_an_error_has_its_exit_code_and_one_sentence(error, code, capsys):
    with pytest.raises(typer.Exit) as ended, reporting():
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr().err.count("\n") == 1
