"""Files of the commands: disk space is checked first, a second folder is used on failure, changed recipes."""

import errno
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from bnlora.app import cli, kept, predicting, recipe
from bnlora.app.outcome import ExitCode
from bnlora.app.recipe import Recipe, Schedule
from bnlora.data.tables import read_table, write_table
from bnlora.infer.svi.step import Step

RUN = CliRunner()
OPTIONS = ["--word", " bad", "--word", " good", "--steps", "2", "--batch-size", "4", "--rank", "2"]
OPTIONS += ["--top-layers", "1", "--target", "lm_head", "--prior", "normal", "--json"]


def call(*words):
    return RUN.invoke(cli.app, [str(word) for word in words])


def plain(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with a table and a fit."""
    folder, stream = tmp_path_factory.mktemp("kept"), random.Random(0)
    rows = [f"the {stream.choice(['plot', 'film'])} is {['bad', 'good'][i % 2]}" for i in range(8)]
    write_table(Dataset.from_dict({"text": rows, "label": [i % 2 for i in range(8)]}), folder / "rows.csv")
    done = call("fit", folder / "rows.csv", "--out", folder / "fit", "--base", tiny_folder, *OPTIONS)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusing(write, *places, code=errno.ENOSPC):
    """Wrap a function that writes: at these places the disk is full."""

    def wrapped(*arguments, **options):
        if any(isinstance(place, Path) and place in places for place in arguments):
            raise OSError(code, os.strerror(code))
        return write(*arguments, **options)

    return wrapped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "rows.csv", "--out", "rows.csv", *OPTIONS], "'rows.csv' cannot be written (File exists)"),
        (["fit", "rows.csv", "--out", "rows.csv/fit", *OPTIONS], "cannot be written (Not a directory)"),
        (["predict", "fit", "rows.csv", "--out", "rows.csv/out.csv"], "cannot be written (File exists)"),
        (["evaluate", "fit", "rows.csv", "--report", "fit"], "'fit' is a folder; give the name of a file"),
        (["demo", "--report", "fit"], "'fit' is a folder; give the name of a file"),
    ],
)
def test_a_path_that_cannot_be_written_raises_before_the_work(place, monkeypatch, words, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Recipe, "load_base", lambda self: pytest.fail("the work began"))
    monkeypatch.setattr(cli, "run_demo", lambda **_: pytest.fail("the work began"))
    done = call(*words)
    assert done.exit_code == ExitCode.BAD_INPUT, done.output
    assert message in plain(done.output)
    assert (place / "rows.csv").is_file()


def test_too_little_disk_space_raises_before_the_fit(place, tiny_folder, monkeypatch):
    def fsync(number):
        if os.fstat(number).st_size > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Schedule, "fit", lambda *_, **__: pytest.fail("the fit began"))
    done = call("fit", place / "rows.csv", "--out", place / "new", "--base", tiny_folder, *OPTIONS)
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "which needs 0.2 MiB (No space left on device); choose another folder" in plain(done.output)
    assert not (place / "new").exists()


def test_results_that_cannot_be_written_go_to_the_cache_folder(place, tiny_folder, cache, monkeypatch):
    out, table, page = place / "new", place / "out.csv", place / "page.html"
    monkeypatch.setattr(kept, "save_fit", refusing(kept.save_fit, out))
    done = call("fit", place / "rows.csv", "--out", out, "--base", tiny_folder, *OPTIONS)
    assert done.exit_code == ExitCode.BAD_INPUT
    elsewhere = Path(json.loads(done.stdout)["folder"])
    assert cache in elsewhere.parents
    message = (
        f"error: '{out}' cannot be written (No space left on device); the result is in '{elsewhere}' instead"
    )
    assert message in plain(done.stderr)
    monkeypatch.setattr(predicting, "write_pieces", refusing(predicting.write_pieces, table))
    done = call("predict", elsewhere, place / "rows.csv", "--out", table, "--draws", 2, "--json")
    assert done.exit_code == ExitCode.BAD_INPUT
    assert len(read_table(json.loads(done.stdout)["table"])) == 8
    monkeypatch.setattr(cli, "write", refusing(cli.write, page))
    done = call("evaluate", elsewhere, place / "rows.csv", "--report", page, "--draws", 2, "--json")
    assert done.exit_code == ExitCode.BAD_INPUT
    assert Path(json.loads(done.stdout)["report"]).read_text().startswith("<!")


def test_the_report_of_the_demonstration_goes_to_the_cache_folder(cache, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    comparison = SimpleNamespace(lora=SimpleNamespace(stopped="steps"), core=SimpleNamespace(fit=FITTED))
    monkeypatch.setattr(cli, "run_demo", lambda **_: comparison)
    monkeypatch.setattr(cli, "demo_page", lambda *_: "<!doctype html>")
    monkeypatch.setattr(cli, "demo_tables", lambda *_: [])
    monkeypatch.setattr(cli, "comparison_result", lambda _, place: {"report": str(place)})
    monkeypatch.setattr(cli, "write", refusing(cli.write, page, code=errno.EROFS))
    done = call("demo", "--report", page, "--json")
    assert done.exit_code == ExitCode.BAD_INPUT
    place = Path(json.loads(done.stdout)["report"])
    assert cache in place.parents
    assert place.read_text() == "<!doctype html>"
    assert f"'{page}' cannot be written (Read-only file system); the result is in" in plain(done.stderr)


FITTED = SimpleNamespace(stopped="steps")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
def test_a_fit_without_memory_keeps_what_it_has(steps, place, tiny_folder, monkeypatch):
    """After some steps there are a fit and its checkpoint; before the first step there is nothing."""
    run, out = Step.run, place / f"without-memory-{steps}"

    def without_memory(self, *arguments):
        if len(self.steps) >= steps:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return run(self, *arguments)

    command = ["fit", place / "rows.csv", "--out", out, "--base", tiny_folder, *OPTIONS, "--steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", without_memory)
        done = call(*command)
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "error: the memory is exhausted (Out of memory); a step of batch_size=4" in plain(done.stderr)
    if not steps:
        assert not out.exists()
        return
    assert json.loads(done.stdout)["stopped"] == "memory"
    again = call(*command, "--resume")
    assert json.loads(again.stdout)["steps"] == 4, again.stderr


def test_a_changed_recipe_raises(place, tiny_folder, tmp_path):
    shutil.copytree(place / "fit", tmp_path / "fit")
    path = tmp_path / "fit" / recipe.FILE
    written = json.loads(path.read_text())
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    path.write_text(json.dumps(written | {"base": str(moved), "truncate": "left"}))  # entries that may change
    table = ["--out", tmp_path / "out.csv", "--draws", 2]
    assert call("predict", tmp_path / "fit", place / "rows.csv", *table).exit_code == 0
    for name, value in {"words": [" good", " bad"], "template": "{text}", "scale_b": 1.0}.items():
        path.write_text(json.dumps(written | {name: value}))
        done = call("predict", tmp_path / "fit", place / "rows.csv", *table)
        assert done.exit_code == ExitCode.BAD_INPUT
        message = f"recipe.json must have {name}={written[name]!r}, the value of the fit; got {value!r}"
        assert plain(message) in plain(done.output)
