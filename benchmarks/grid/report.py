"""The tables, tests and targets of the grid, from the stored results of its cells.

Results are read from `benchmarks/results/grid` and then from the folder `grid` of the cache of this machine,
whose cells replace stored ones. `--html` also writes pages with reliability diagrams, risk against coverage,
and NLL against seconds.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import paired, pictures, shown, targets
from benchmarks.cells.gathered import Problem, load, problems
from benchmarks.cells.judged import Judged, judge
from benchmarks.cells.pages import Link, Part, write
from benchmarks.report import RESULTS, Report
from bnlora._util.caching import cache_folder
from bnlora._util.display import Table
from bnlora.plots import RELIABILITY_CAPTION


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows.

    Attributes:
        judged: The problems with their metrics.
        comparisons: Our methods against the rivals.
        draws: Bootstrap draws of the p-values.
        gains: Calibration where LoRA has learned the task.
        leads: Detection and selective accuracy.
        targets: The targets.
    """

    judged: Sequence[Judged]
    comparisons: Sequence[paired.Comparison]
    draws: int
    gains: Sequence[targets.Gain]
    leads: Sequence[targets.Lead]
    targets: Sequence[targets.Target]

    @property
    def problems(self) -> list[Problem]:
        """The problems."""
        return [judged.problem for judged in self.judged]

    @property
    def about_targets(self) -> list[str]:
        """Sentences below the targets."""
        return [text for text in (shown.provisional(self.problems), shown.NOTES["targets"]) if text]

    @property
    def tests(self) -> str:
        """How many tests there are, and the smallest p-value that they can have."""
        number = len(self.comparisons)
        least = 2 / (self.draws + 1)
        return (
            f"{number} comparisons with {self.draws:,} bootstrap draws: the smallest possible p-value is "
            f"{least:.2g}, and {min(1.0, number * least):.2g} after Holm's correction."
        )


def folders(given: Path | None) -> list[Path]:
    """Folders of the results: the given one, or those of the repository and of this machine.

    Raises:
        SystemExit: If the given folder does not exist.
    """
    if given is not None and not given.is_dir():
        raise SystemExit(f"the folder {given} does not exist; `--folder` needs one with Parquet files")
    return [given] if given is not None else [RESULTS / "grid", cache_folder() / "grid"]


def gathered(given: Path | None) -> list[Problem]:
    """The problems of the folders.

    Raises:
        SystemExit: If there are no results, a file cannot be read, or results contradict each other.
    """
    places = folders(given)
    try:
        found = problems(load(places))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if not found:
        raise SystemExit(f"no results of the grid in {' or '.join(map(str, places))}")
    return found


def find(every: Sequence[Problem], draws: int | None, report: Report) -> Findings:
    """Compute all metrics, tests and targets."""
    judged = []
    for problem in every:
        judged.append(judge(problem))
        report.progress(f"metrics of {problem.title} done")
    number = sum(len(paired.pairs(one)) for one in judged)
    draws = draws or paired.draws_needed(number)
    report.progress(f"{number} comparisons with {draws:,} draws")
    compared = paired.compare(judged, draws)
    gained, led = targets.gains(judged), targets.leads(judged)
    return Findings(judged, compared, draws, gained, led, targets.targets(judged, compared, gained, led))


def tables(found: Findings, report: Report) -> None:
    """Write all tables as Markdown."""
    _table(report, shown.overview(found.problems))
    _table(report, shown.targets(found.targets), *found.about_targets)
    for judged in found.judged:
        _table(report, shown.metrics(judged), shown.NOTES["metrics"])
        _table(report, shown.costs(judged.problem), shown.NOTES["costs"])
    _table(report, shown.comparisons(found.comparisons), found.tests, shown.NOTES["paired"])
    _table(report, shown.gains(found.gains), shown.NOTES["gains"])
    _table(report, shown.leads(found.leads), shown.NOTES["paired"])


def _table(report: Report, table: Table, *notes: str) -> None:
    lines = report.table(table.title, table.header)
    for row in table.rows:
        lines.row(*row)
    if notes:
        report.text(table.title, " ".join(notes))


def pages(found: Findings, folder: Path) -> Path:
    """Write the pages; returns the path of the index."""
    tasks = list(dict.fromkeys(problem.task for problem in found.problems))
    files = {task: f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', task.lower())}.html"
             for number, task in enumerate(tasks, start=1)}  # fmt: skip
    for task, file in files.items():
        write(folder, file, f"Benchmark grid: {task}", [Link("All tasks", "index.html"), *_task(found, task)])
    parts: list[Part] = [
        *(Link(task, file) for task, file in files.items()),
        shown.overview(found.problems),
        *(shown.targets(found.targets), *found.about_targets),
        *(shown.gains(found.gains), shown.NOTES["gains"]),
        *(shown.leads(found.leads), shown.NOTES["paired"]),
        *(shown.comparisons(found.comparisons), found.tests, shown.NOTES["paired"]),
    ]
    return write(folder, "index.html", "Benchmark grid", parts)


def _task(found: Findings, task: str) -> list[Part]:
    """The content of the page of a task."""
    parts: list[Part] = []
    for judged in (one for one in found.judged if one.problem.task == task):
        problem = judged.problem
        of = [c for c in found.comparisons if c.problem is problem]
        parts += [f"# {problem.size:,} labelled rows", shown.metrics(judged), shown.NOTES["metrics"]]
        parts += [shown.costs(problem), shown.NOTES["costs"]]
        parts += [shown.comparisons(of), shown.NOTES["paired"]] if of else []
        for name in problem.sets:
            parts += _drawn(judged, name)
    return parts


def _drawn(judged: Judged, name: str) -> list[Part]:
    """The pictures of a set, with their captions."""
    problem = judged.problem
    where = f"{problem.title}, {name}, rows of all seeds"
    drawn = [
        (
            pictures.reliability(problem, name),
            f"{where}, so an ECE is not the mean of the table. {RELIABILITY_CAPTION}",
        ),
        (
            pictures.risk_coverage(problem, name),
            f"{where}. Risk against coverage: error rate among the rows with the highest confidence, by "
            "their share. Lower is better. The first 5 % are left out.",
        ),
        (
            pictures.pareto(judged, name),
            f"{problem.title}, {name}. NLL against seconds to fit, means over seeds. Methods on the line are "
            "beaten by no other in both. Methods that take no time to fit are left out.",
        ),
    ]
    return [(figure, caption) for figure, caption in drawn if figure is not None]


def options(parser: argparse.ArgumentParser) -> None:
    """Where results come from, and where pages go."""
    parser.add_argument("--folder", type=Path, help="read the Parquet files of this folder only")
    parser.add_argument("--draws", type=_positive, help="bootstrap draws of the p-values; as Holm needs")
    parser.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=Path("build/grid"),
        metavar="FOLDER",
        help="also write web pages into this folder (build/grid without a name)",
    )


def _positive(text: str) -> int:
    """A number of draws."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def run(given: argparse.Namespace, report: Report) -> None:
    """Print the tables, and write the pages if asked."""
    found = find(gathered(given.folder), given.draws, report)
    tables(found, report)
    if given.html is not None:
        report.progress(f"pages: {pages(found, given.html)}")
