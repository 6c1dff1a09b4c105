"""The benchmarks start, and every number of the documents has a command and a stored table."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from builders.report_tables import section

import bnlora as bl
from benchmarks import entry, tables, timing
from benchmarks.cells.tasks import QUIET
from benchmarks.posterior import nuts
from benchmarks.report import RESULTS, Report, Stored
from bnlora.infer.mcmc.target import target
from bnlora.testing import tiny_base, tiny_rows

BASE = tiny_base(jax.random.key(0), num_layers=2)

ROOT = Path(__file__).parents[2]
NAMES = sorted(entry.names())
TEXTS = [*tables.documents(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("bnlora/**/*.py")]
COMMAND = re.compile(r"`python -m benchmarks ([a-z_]+[^`\n]*)`")


def parser(name: str):
    if name in ("step_torch", "side_by_side"):
        pytest.importorskip("torch")
    return entry.parser_of(name, entry.load(name))


def commands() -> list[str]:
    """Every command line of a benchmark in a document, a docstring or a stored result."""
    texts = [path.read_text(encoding="utf-8") for path in TEXTS]
    found = {match.strip() for text in texts for match in COMMAND.findall(text)}
    stored = {
        Stored.read(path).command.removeprefix("python -m benchmarks ") for path in RESULTS.glob("*.md")
    }
    return sorted(found | stored)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_imported_and_has_options(name):
    assert f"python -m benchmarks {name}" in parser(name).format_help()


@pytest.mark.slow
def test_what_a_device_shows_is_shown_on_a_cpu(capsys):
    assert entry.main(["device", "--size", "tiny", "--rounds", "1", "--draws", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("within 0.05 of the reference") == 3
    for what in ("| xla: a step |", "| xla: prediction, 16 draws |"):
        assert what in shown


def test_a_gradient_is_timed_on_rows_with_and_without_the_cache():
    sites = bl.select(BASE, ["lm_head"], rank=1)
    model = bl.Classifier(BASE, sites, bl.priors.normal(), label_ids=(3, 5))
    rows, report = tiny_rows(jax.random.key(1), 12), Report("python -m benchmarks nuts")
    options = {"sites": None, "given": None, "fix_at": "mean", "console": QUIET}
    made = target(jax.random.key(0), model, rows, **options)
    nuts.trunk(report, made, rows)
    found = {row["rows"]: float(row["ms"]) for row in section(report, "A gradient of one chain")}
    assert list(found) == ["cached rows", "plain rows"]
    assert min(found.values()) > 0


def test_the_list_has_a_line_for_every_benchmark(capsys):
    assert entry.main([]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name, path in entry.names().items():
        (line,) = [x for x in lines if x.startswith(f"{name} ")]
        assert line.endswith(entry.first_line(path))
        assert line.endswith((".", "?"))


def test_listing_imports_no_jax():
    code = "import sys; from benchmarks import entry; entry.main([]); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(SystemExit, match="did you mean kernel"):
        entry.main(["kernl"])


@pytest.mark.parametrize("command", commands())
def test_a_command_in_a_text_is_one_that_runs(command):
    name, *rest = shlex.split(command)
    if name in ("list", "tables"):
        return
    assert name in NAMES
    if rest:
        parser(name).parse_args(rest)


def test_the_commands_of_the_texts_are_found():
    assert {"seeds report", "memory --rounds 4"} <= set(commands())


def test_the_tables_of_the_documents_are_the_stored_ones():
    assert tables.outdated() == []
    assert "<!-- table: seeds/Summary -->" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_a_changed_table_is_noticed_and_mended(tmp_path):
    with Report("python -m benchmarks kernel", store="one", folder=tmp_path) as report:
        report.table("Speed", ("what", "s")).row("a step", "0.1")
        report.text("Speed", "Two rounds.")
    mark = "before\n\n<!-- table: one/Speed -->\n<!-- end -->\n\nbetween\n\n"
    page = tables.filled(2 * mark, folder=tmp_path)
    assert page.count("| a step | 0.1 |\n\nTwo rounds.\n\n`python -m benchmarks kernel` (2") == 2
    assert page.count("between") == 2
    assert tables.filled(page, folder=tmp_path) == page
    assert tables.filled(page.replace("0.1", "0.2"), folder=tmp_path) == page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: absent/Speed -->\n<!-- end -->", "does not exist"),
        ("<!-- table: one/Speed -->\nno end", "needs its own"),
        ("<!-- table: one/Speed -->\n<!-- table: one/Speed -->\n<!-- end -->", "needs its own"),
        ("<!-- table: one/Memory -->\n<!-- end -->", "no table 'Memory'; it has Speed"),
    ],
)
def test_a_mark_without_a_table_is_refused(tmp_path, text, message):
    with Report("python -m benchmarks kernel", store="one", folder=tmp_path) as report:
        report.text("Speed", "fast")
    with pytest.raises(ValueError, match=message):
        tables.filled(text, folder=tmp_path)


def test_a_result_that_is_found_again_keeps_its_date(tmp_path):
    for command in ("kernel", "kernel", "kernel --rounds 3"):
        path = tmp_path / "one.md"
        old = path.read_text(encoding="utf-8").replace("Measured: 2", "Measured: 1") if path.is_file() else ""
        path.write_text(old, encoding="utf-8") if old else None
        with Report(f"python -m benchmarks {command}", store="one", folder=tmp_path) as report:
            report.text("Speed", "fast")
        assert (Stored.read(path).measured[0] == "1") == (bool(old) and command == "kernel")


def test_a_run_that_fails_stores_nothing(tmp_path):
    def run() -> None:
        with Report("python", store="one", folder=tmp_path) as report:
            report.text("Speed", "fast")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rest", [["--store"], ["--store", "mine"], ["--store=mine"], []])
def test_the_stored_command_stores_nothing(rest):
    store = {"--store": "kernel"}.get(rest[-1], "mine") if rest else None
    found = entry.command_of("kernel", ["--rounds", "3", *rest, "--ahead"], store)
    assert found == "python -m benchmarks kernel --rounds 3 --ahead"


def test_programs_take_turns_and_warm_up_is_not_counted():
    order = []
    programs = {name: lambda step, n=name: order.append((n, step)) for name in "ab"}
    times = timing.in_turn(programs, 3, warm_up=1)
    assert order == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert times["a"].wall.shape == times["b"].cpu.shape == (3,)
    assert timing.spread(np.arange(11.0)) == "5.00 (1.00 to 9.00)"


def test_the_summary_is_computed_from_the_stored_predictions(tmp_path, monkeypatch):
    from benchmarks.calibration import seeds

    monkeypatch.setattr(seeds, "folder", lambda: tmp_path)  # no seeds of this machine
    report = Report("python -m benchmarks seeds report")
    seeds.compact(report, seeds.means_of(seeds.finished()))
    stored = Stored.read(RESULTS / "seeds.md").sections["Summary"]
    assert "\n".join(report.sections["Summary"]) == stored
