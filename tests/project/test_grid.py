"""The grid: every cell once, nothing lost to a killed worker, every method on rows of both kinds."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from builders import grid_cells
from builders.grid_cells import cell, starts
from builders.thorough import sample_of
from scipy.special import logsumexp

import bnlora as bl
from benchmarks import entry
from benchmarks.cells import running, tasks
from benchmarks.cells.grids import GRIDS, MINIMUM
from benchmarks.cells.methods import METHODS
from benchmarks.cells.rows import Cell, read, table_of
from benchmarks.cells.setting import Setting
from benchmarks.cells.tasks import TASKS, Rows
from benchmarks.grid import run as command
from bnlora.testing import tiny_base, tiny_rows


@pytest.fixture
def marks(tmp_path, monkeypatch):
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv(grid_cells.MARKS, str(folder))
    return folder


def done(cells, folder, execute) -> dict[str, str]:
    """The error of every cell by method, empty where there was none."""
    outcomes = running.run_all(cells, folder, execute, run=grid_cells.run)
    return {outcome.cell.method: outcome.error for outcome in outcomes}


def test_what_is_stored_is_what_is_read(tmp_path):
    made = grid_cells.result(cell("a", 3, rank=4, size={"v_proj": 8}))
    (found,) = read(made.write(tmp_path))
    assert found.cell == made.cell
    assert (found.seconds, found.parameters, found.peak_bytes) == ({"fit": 1.0, "predict": 0.5}, 7, 1000)
    assert (found.about, found.provenance) == ({"chosen": 2}, {"commit": "abc"})
    stored, exact = found.predicted["here"], made.predicted["here"]
    np.testing.assert_array_equal(stored.labels, exact.labels)
    np.testing.assert_allclose(logsumexp(stored.log_probs, axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(stored.log_probs, exact.log_probs, rtol=2e-3, atol=2e-3)
    again = table_of([found]).to_pylist()
    assert again == table_of(read(found.write(tmp_path / "..")))[:1].to_pylist()


def test_cells_that_differ_have_different_files():
    cells = [cell("a"), cell("a", 1), cell("b"), cell("a", rank=1), cell("a", rank="1"), cell("a", x=[1, 2])]
    cells += [cell("a", x="1, 2"), cell("a-b"), cell("a b"), replace(cell("a"), size=11)]
    assert len({c.file for c in cells}) == len(cells)


def test_a_cell_is_computed_once(tmp_path, marks):
    cells = [cell("a"), cell("b"), cell("fails")]
    errors = done(cells, tmp_path, running.in_this_process)
    assert errors == {"a": "", "b": "", "fails": "ValueError: as asked"}
    assert done(cells, tmp_path, running.in_this_process) == {"fails": "ValueError: as asked"}
    assert [starts(c) for c in cells] == [1, 1, 2]


def test_cells_of_the_same_rows_follow_one_another(tmp_path):
    cells = [Cell(task, m, 5, seed) for m in ("b", "a") for seed in (1, 0) for task in ("y", "x")]
    order = running.unfinished(cells, tmp_path)
    assert [(c.task, c.seed, c.method) for c in order[:4]] == [
        ("x", 0, "b"), ("x", 0, "a"), ("x", 1, "b"), ("x", 1, "a")
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path, marks):
    cells = [cell("a"), cell("killed once"), *(cell(f"c{i}") for i in range(4)), cell("killed")]
    errors = done(cells, tmp_path, running.in_processes(2))
    assert errors.pop("killed") == "its worker was killed 3 times"
    assert errors == {c.method: "" for c in cells[:-1]}
    assert starts(cells[1]) == 2
    assert starts(cells[-1]) == running.ATTEMPTS
    assert len([*tmp_path.glob("*.parquet")]) == len(cells) - 1
    assert not [*tmp_path.glob(".*")]


@pytest.mark.thorough
def test_a_killed_worker_of_ray_loses_nothing(tmp_path, marks):
    pytest.importorskip("ray")
    cells = [cell("a"), cell("killed once"), cell("b")]
    errors = done(cells, tmp_path, running.on_ray(None, 2))
    assert errors == {"a": "", "killed once": "", "b": ""}
    assert starts(cells[1]) == 2
    assert done(cells, tmp_path, running.on_ray(None, 2)) == {}


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_has_known_tasks_and_methods(name):
    cells = GRIDS[name]()
    assert len({c.file for c in cells}) == len(cells)
    assert {c.task for c in cells} <= TASKS.keys()
    assert {c.method for c in cells} <= METHODS.keys()


def test_the_minimal_grid_is_that_of_the_protocol():
    assert len(GRIDS["minimum"]()) == 3 * 5 * len(MINIMUM) == 180
    assert {c.seed for c in GRIDS["minimum"]()} == {3, 4, 5, 6, 7}  # 0 to 2 are for development
    text = (entry.HERE / "protocol.md").read_text(encoding="utf-8")
    assert [m for m in MINIMUM if m not in text] == []


BASE = tiny_base(jax.random.key(1), num_layers=3)


def words() -> Rows:
    train, here, there = (tiny_rows(jax.random.key(seed), count) for seed, count in ((2, 28), (3, 8), (4, 6)))
    likelihood = bl.likelihoods.Words((3, 5))
    return Rows(BASE, likelihood, train, {"here": here, "there": there}, ("v_proj", "lm_head"), 2, {})


def taught(rows: Rows) -> Rows:
    """The same rows; the base's own answers are their labels, so that noise makes predictions worse."""

    def answered(batch):
        base = replace(rows, tests={"all": batch})
        labels = METHODS["untouched base"](Setting(base, 0, {})).predict("all").probs.argmax(1)
        return replace(batch, labels=jax.numpy.asarray(labels))

    tests = {name: answered(batch) for name, batch in rows.tests.items()}
    return replace(rows, train=answered(rows.train), tests=tests, made={})


@pytest.fixture(scope="module")
def rows():
    return words()


@pytest.fixture
def of_rows(rows, monkeypatch):
    monkeypatch.setattr(tasks, "rows_of", lambda *_: rows)


OPTIONS = {
    "LoRA, 3 epochs": {"rank": 2},
    "MAP": {"rank": 2, "epochs": 1, "scales": [1.0, 0.1]},
    "deep ensemble": {"rank": 2, "epochs": 1, "size": 2},
    "TFB": {"rank": 2, "epochs": 2, "tolerance": 0.05},
} | {name: {"size": {"v_proj": 2}, "draws": 4} for name in METHODS if name.startswith("core")}
OPTIONS["core MAP"] = {"size": {"v_proj": 2}}
OPTIONS["core network"] |= {"epochs": 1}


@pytest.mark.slow
@pytest.mark.parametrize("method", sample_of(METHODS, ("untouched base", "LoRA, careful", "core Gaussian")))
def test_a_method_predicts_both_sets(method, rows, of_rows, monkeypatch):
    if method == "TFB":  # it refuses rows on which any noise is an improvement
        monkeypatch.setattr(tasks, "rows_of", lambda *_: taught(rows))
    options = OPTIONS.get(method, {} if method == "untouched base" else {"rank": 2, "epochs": 1})
    outcome = running.run_cell(Cell("words", method, 28, 0, options))
    assert not outcome.error
    found = outcome.result
    assert [(name, p.log_probs.shape) for name, p in found.predicted.items()] == [
        ("here", (8, 2)), ("there", (6, 2))
    ]  # fmt: skip
    for p in found.predicted.values():
        np.testing.assert_allclose(logsumexp(p.log_probs, axis=1), 0.0, atol=1e-5)
    assert found.seconds["fit"] > 0
    assert found.seconds["predict"] > 0
    assert (found.parameters == 0) == (method == "untouched base")


def test_what_is_shared_is_made_once_and_counted_in_each_cell(of_rows, rows):
    options = {"size": {"v_proj": 2}, "draws": 4}
    cell_of = Cell("words", "core Laplace", 28, 1, options)
    first = running.run_cell(cell_of).result
    made = dict(rows.made)
    again = running.run_cell(cell_of).result
    assert rows.made == made
    (core,) = (value for name, (value, _) in made.items() if name.startswith("core") and "v_proj" in name)
    least = sum(core.fit.seconds[part] for part in ("frames", "features", "scales by evidence", "Laplace"))
    assert min(first.seconds["fit"], again.seconds["fit"]) >= least > 0
    np.testing.assert_array_equal(first.predicted["here"].log_probs, again.predicted["here"].log_probs)


def test_a_source_of_noise_is_the_only_one(of_rows):
    """Predictions by the inducing matrix alone and by the conditional noise alone share a fit and differ."""
    found = {}
    for source in ("both", "inducing", "conditional"):
        options = {"rank": 2, "epochs": 1, "draws": 3, "noise": source}
        found[source] = running.run_cell(Cell("words", "Bayesian-LoRA, published", 28, 0, options)).result
    assert len({result.about["elbo"] for result in found.values()}) == 1
    information = {source: found[source].predicted["here"].mutual_information.max() for source in found}
    assert min(information.values()) > 0
    assert len(set(information.values())) == 3


@pytest.mark.slow
def test_scales_by_validation_are_one_number_for_all_families(of_rows):
    options = {"size": {"v_proj": 2}, "draws": 4, "source": "weights", "scales_by": "validation"}
    result = running.run_cell(Cell("words", "core Laplace", 28, 3, options)).result
    scales = result.about["scales"]
    assert set(scales) == {"v_proj", "slope"}
    assert len(set(scales.values())) == 1


def test_options_of_what_is_shared_are_read_by_every_cell(of_rows):
    for method in ("LoRA, 20 epochs", "LoRA, 20 epochs"):  # the second finds the fit of the first
        assert not running.run_cell(Cell("words", method, 28, 2, {"rank": 1})).error


def test_an_option_that_no_method_reads_is_an_error(of_rows):
    outcome = running.run_cell(Cell("words", "untouched base", 28, 0, {"rnak": 2}))
    assert outcome.result is None
    assert "does not read the options ['rnak']" in outcome.error


def test_the_command_lists_runs_and_saves(tmp_path, monkeypatch, capsys, marks):
    monkeypatch.setattr(command, "folder", lambda: tmp_path / "cells")
    monkeypatch.setattr(command, "SAVED", tmp_path / "saved")
    monkeypatch.setattr(running, "run_cell", grid_cells.run)
    monkeypatch.setitem(GRIDS, "smoke", lambda: [cell("a"), cell("b", 1)])
    assert entry.main(["run", "smoke", "--list"]) == 0
    assert capsys.readouterr().out == "task, a, 10 rows, seed 0\ntask, b, 10 rows, seed 1\n"
    assert entry.main(["run", "smoke", "--save", "--seeds", "1"]) == 0
    assert [r.cell for r in read(tmp_path / "saved" / "task.parquet")] == [cell("b", 1)]
    for file in (tmp_path / "cells").glob("*"):
        file.unlink()
    assert entry.main(["run", "smoke", "--list"]) == 0  # from what is saved
    assert capsys.readouterr().out == "task, a, 10 rows, seed 0\n"


def test_what_a_grid_does_not_have_gets_the_nearest():
    with pytest.raises(SystemExit, match="has no method 'core Laplas'; nearest is 'core Laplace'"):
        entry.main(["run", "minimum", "--methods", "core Laplas"])
    with pytest.raises(SystemExit, match="has no seed 0; nearest is 3"):
        entry.main(["run", "minimum", "--seeds", "0"])
