"""Run the cells of a grid that have no result yet.

A result is one Parquet file of `grid` in the cache folder. A stopped run goes on where it was stopped, and
`python -m benchmarks report` reads what is there. `--save` also writes the results of this machine into
`benchmarks/results/grid`, one file for each task.
"""

import argparse
import difflib
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.cells.grids import GRIDS
from benchmarks.cells.rows import Cell, Result, read, table_of
from benchmarks.cells.running import Executor, in_processes, in_this_process, on_ray, run_all, unfinished
from benchmarks.report import RESULTS, Report
from bnlora._util.caching import cache_folder
from bnlora._util.files import write_whole
from bnlora._util.progress import progress_bar

SAVED = RESULTS / "grid"


def folder() -> Path:
    """Where the results of this machine are."""
    return cache_folder() / "grid"


def options(parser: argparse.ArgumentParser) -> None:
    """The grid, which of its cells, and where they run."""
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--tasks", nargs="*", help="only cells of these tasks")
    parser.add_argument("--methods", nargs="*", help="only cells of these methods")
    parser.add_argument("--seeds", type=int, nargs="*", help="only cells of these seeds")
    parser.add_argument("--workers", type=int, default=1, help="processes; 1 runs in this one")
    parser.add_argument("--ray", action="store_true", help="run on Ray's workers instead")
    parser.add_argument("--address", help="address of a Ray cluster; without one Ray starts here")
    parser.add_argument("--save", action="store_true", help="write results into benchmarks/results/grid")
    parser.add_argument("--list", action="store_true", help="only list the cells that have no result yet")


def run(given: argparse.Namespace, report: Report) -> None:
    """Run, list or save cells."""
    chosen = chosen_cells(GRIDS[given.grid](), given)
    restore(folder())
    waiting = unfinished(chosen, folder())
    report.progress(f"{len(chosen)} cells, of which {len(chosen) - len(waiting)} have a result")
    failed = 0
    if given.list:
        print(*(cell.name for cell in waiting), sep="\n")
    else:
        failed = _run(chosen, len(waiting), executor(given), report)
    if given.save:
        save(folder(), SAVED)
    if failed:
        raise SystemExit(f"{failed} of {len(waiting)} cells failed; run again to try them again")


def chosen_cells(cells: list[Cell], given: argparse.Namespace) -> list[Cell]:
    """The cells of the given tasks, methods and seeds.

    Raises:
        SystemExit: If the grid has no cell of one of them.
    """
    for name in ("task", "method", "seed"):
        wanted, known = getattr(given, f"{name}s"), list(dict.fromkeys(getattr(cell, name) for cell in cells))
        if absent := [value for value in wanted or () if value not in known]:
            near = difflib.get_close_matches(str(absent[0]), map(str, known), n=1, cutoff=0.3) or known
            raise SystemExit(
                f"the grid {given.grid!r} has no {name} {absent[0]!r}; nearest is {near[0]!r} "
                f"of {', '.join(map(str, known))}"
            )
        cells = [cell for cell in cells if wanted is None or getattr(cell, name) in wanted]
    return cells


def executor(given: argparse.Namespace) -> Executor:
    """Where the cells run."""
    if given.ray:
        return on_ray(given.address, given.workers)
    return in_this_process if given.workers == 1 else in_processes(given.workers)


def _run(cells: list[Cell], count: int, execute: Executor, report: Report) -> int:
    failed = 0
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("cells", total=count)
        for outcome in run_all(cells, folder(), execute):
            bar.advance(task)
            if outcome.result is None:
                failed += 1
                report.progress(f"{outcome.cell.name}: failed\n{outcome.error}")
            else:
                report.progress(f"{outcome.cell.name}: {_seconds(outcome.result)}")
    return failed


def _seconds(result: Result) -> str:
    return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in result.seconds.items())


def restore(target: Path) -> None:
    """Make files of the saved results, so that their cells are not run again."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(SAVED.glob("*.parquet")):
        for result in read(path):
            if not (target / result.cell.file).is_file():
                result.write(target)


def save(source: Path, target: Path) -> None:
    """Write all results into one file for each task, in the order of their cells."""
    by_task = defaultdict(list)
    for path in source.glob("*.parquet"):
        for result in read(path):
            by_task[result.cell.task].append(result)
    target.mkdir(parents=True, exist_ok=True)
    for task, results in by_task.items():
        ordered = sorted(results, key=lambda result: (result.cell.size, result.cell.seed, result.cell.name))
        write_whole(
            target / f"{task}.parquet",
            lambda at, rows=ordered: pq.write_table(table_of(rows), at, compression="zstd"),
        )
