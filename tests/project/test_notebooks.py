"""Notebooks: scripts and notebooks agree, no outputs are stored, and the assertions in the notebooks pass."""

import functools
import importlib.util
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
from builders.thorough import sample_of

import bnlora as bl

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
every_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored_notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_every_notebook_has_a_script():
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SCRIPTS]
    assert SCRIPTS


@every_notebook
def test_script_and_notebook_agree(script, run):
    stored, expected = stored_notebook(script.with_suffix(".ipynb")), run.paired(script)
    assert cells(stored) == cells(expected), "run `python notebooks/run.py pair`"
    assert stored.metadata == expected.metadata
    nbformat.validate(stored)


@every_notebook
def test_no_outputs_are_stored(script):
    for cell in stored_notebook(script.with_suffix(".ipynb")).cells:
        assert cell.cell_type != "code" or (cell.outputs, cell.execution_count) == ([], None)


def test_execution_through_a_kernel_keeps_the_outputs_before_an_error(run, tmp_path):
    script = tmp_path / "00_sum.py"
    script.write_text(
        "# %% [markdown]\n# Sum\n\n# %%\n1 + 1\n\n# %%\n1 / 0\n\n# %%\n2 + 2\n", encoding="utf-8"
    )
    notebook, problem = run.executed(run.paired(script), tmp_path)
    assert cells(notebook) == cells(run.paired(script))
    assert notebook.cells[1].outputs[0]["data"]["text/plain"] == "2"
    assert notebook.cells[2].outputs[0]["ename"] == "ZeroDivisionError"
    assert "ZeroDivisionError" in problem
    assert notebook.cells[3].outputs == []


def test_progress_bars_leave_no_output(run, tmp_path):
    script = tmp_path / "00_bar.py"
    code = "# %%\nfrom bnlora._util.progress import track\n"
    code += "assert len(list(track(range(3), 3, 'rows', None))) == 3\n"
    script.write_text(code, encoding="utf-8")
    notebook, problem = run.executed(run.paired(script), tmp_path)
    assert (problem, notebook.cells[0].outputs) == ("", [])


def test_unknown_notebook_names_raise(run):
    assert run.scripts(["01"]) == [FOLDER / "01_quickstart.py"]
    with pytest.raises(ValueError, match="no notebook starts with '77'; expected 01_quickstart"):
        run.scripts(["77"])


@pytest.fixture(scope="module")
def shared():
    """Notebooks load one base and run many of the same rows through its lower layers: here, once."""
    known, compute = {}, bl.cache_prefix

    def cache_prefix(model, rows, **options):
        if model.kind != "network":
            return compute(model, rows, **options)
        arrays = tuple(np.asarray(x).tobytes() for x in (rows.tokens, rows.mask, rows.labels))
        case = (model.first_layer, model.trunk.checksum, rows.tokens.shape, arrays)
        if case not in known:
            known[case] = compute(model, rows, **options)
        return known[case]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bl, "load", functools.cache(bl.load))
        patch.setattr(bl, "cache_prefix", cache_prefix)
        yield


LIKE_OTHERS = ("01_quickstart",)
"""Its steps are those of the README's script, which `test_documents.py` runs on the same base."""
LONG = ("08_multiple_choice", "09_medical_triage", "10_prior_on_a_network")
"""They take minutes in the fast mode, to compile: 08 and 09 programs of whole answers, 10 two priors in two
models with three kinds of inference."""
NAMES = [path.stem for path in SCRIPTS]
OFTEN = [name for name in NAMES if name not in LIKE_OTHERS + LONG]


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(NAMES, OFTEN))
@pytest.mark.usefixtures("shared")
def test_notebook_runs_and_its_assertions_pass_in_fast_mode(name, monkeypatch):
    monkeypatch.setenv("BNLORA_FAST", "1")
    runpy.run_path(str(FOLDER / f"{name}.py"))
