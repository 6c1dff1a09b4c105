"""The core prior from the command line: fit, predict, evaluate, refit, and what has no meaning there."""

import json

import numpy as np
import pytest
from builders.commands import WORDS, call, reviews

import bnlora as bl
from bnlora.app.recipe import Recipe
from bnlora.data.tables import read_table, write_table
from bnlora.infer.core.refit import earlier_of

CORE = ["--prior", "core", "--top-layers", 1]
FIT = ["fit", "train.csv", "--out", "new", *WORDS, *CORE]
REFIT = ["refit", "fit", "later.csv", "--out", "new"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with tables and a fit under the core prior."""
    folder = tmp_path_factory.mktemp("core")
    for name, size, seed in (("train", 16, 0), ("later", 8, 1), ("test", 6, 2)):
        write_table(reviews(size, seed), folder / f"{name}.csv")
    base = ["--base", tiny_folder, "--target", "v_proj", "--target", "slope"]
    done = call("fit", folder / "train.csv", "--out", folder / "fit", *base, *WORDS, *CORE)
    assert done.exit_code == 0, done.output
    assert "gain in evidence" in done.output
    assert "bnlora predict" in done.output
    return folder


def test_the_fit_is_that_of_the_library(place, tiny_folder):
    recipe = Recipe.from_folder(place / "fit")
    assert (recipe.prior, recipe.targets) == ("core", ("v_proj", "slope"))
    core = bl.load_core(place / "fit", bl.load(tiny_folder))
    assert len(core.fit.train) == 16


def test_other_commands_read_it(place):
    done = call("predict", place / "fit", place / "test.csv", "--out", place / "out.csv", "--draws", 4)
    assert done.exit_code == 0, done.output
    rows = read_table(place / "out.csv")
    assert all(abs(float(r["probability bad"]) + float(r["probability good"]) - 1) < 1e-6 for r in rows)
    done = call("evaluate", place / "fit", place / "test.csv", "--draws", 4, "--json")
    assert done.exit_code == 0, done.output
    done = call("generate", place / "fit", "--prompt", "the film")
    assert done.exit_code == 1
    assert "Traceback" not in done.output


def refitted(place, name: str, *more: object) -> dict:
    done = call("refit", place / "fit", place / "later.csv", "--out", place / name, *more, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_refit_has_the_old_posterior_as_its_prior(place, tiny_folder):
    base = bl.load(tiny_folder)
    assert refitted(place, "after")["rows"] == 8
    assert refitted(place, "exact", "--kept", place / "train.csv")["rows"] == 24
    old, after = (bl.load_core(place / name, base) for name in ("fit", "after"))
    carried = after.model.prior.program.earlier
    np.testing.assert_allclose(carried.mean, earlier_of(old).mean, atol=1e-5)
    done = call("predict", place / "after", place / "test.csv", "--out", place / "out2.csv", "--draws", 4)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*FIT, "--rank", 4], "--rank has no effect with --prior core"),
        ([*FIT, "--batch-size", 4], "--batch-size has no effect"),
        (["refit", "fit", "later.csv", "--out", "fit"], "already contains a fit"),
        ([*REFIT, "--keep", 2], "keep must be a number from 0"),
        ([*REFIT, "--kept", "train.csv", "--keep", 0.5], "keeping fewer"),
        (["refit", "nothing", "later.csv", "--out", "new"], "contains no recipe.json"),
    ],
)
def test_what_cannot_be_done_is_said(place, words, sentence, monkeypatch, tiny_folder):
    monkeypatch.chdir(place)
    done = call(*words, *(["--base", tiny_folder] if words[0] == "fit" else []))
    assert done.exit_code == 1
    assert sentence in " ".join(done.output.split())
    assert not (place / "new").exists()


def test_a_refit_of_another_prior_is_refused(place, tiny_folder):
    small = ["--steps", 1, "--rank", 1, "--top-layers", 1, "--target", "lm_head", "--prior", "none"]
    done = call("fit", place / "train.csv", "--out", place / "plain", "--base", tiny_folder, *WORDS, *small)
    assert done.exit_code == 0, done.output
    done = call("refit", place / "plain", place / "later.csv", "--out", place / "new")
    assert done.exit_code == 1
    assert "a refit needs a fit of `bnlora fit --prior core`" in " ".join(done.output.split())
