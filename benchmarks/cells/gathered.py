"""The results of a grid, read from files and grouped by task and number of labelled rows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.cells.rows import Cell, Result, read

BASE, LORA, CAREFUL = "untouched base", "LoRA, 20 epochs", "LoRA, careful"
"""The methods that others are compared with."""

OURS = "core "
"""Start of the name of every method of this library."""


def load(folders: Iterable[Path]) -> list[Result]:
    """All results in the Parquet files of some folders.

    Args:
        folders: Folders in order. If a cell is in several files, the last one wins.

    Returns:
        One result for each cell, in order of the names of the cells.

    Raises:
        ValueError: If a file cannot be read; the message names the file.
    """
    by_name: dict[str, Result] = {}
    for folder in folders:
        for path in sorted(folder.glob("[!.]*.parquet")):  # a leading dot: a run is still writing this file
            by_name |= {result.cell.name: result for result in _read(path)}
    return [by_name[name] for name in sorted(by_name)]


def _read(path: Path) -> list[Result]:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as results of the grid ({reason})") from error


def shown(cell: Cell) -> str:
    """Name of a method in tables; an ablation has its options in brackets."""
    return f"{cell.method} ({', '.join(cell.changes)})" if cell.options else cell.method


@dataclass(frozen=True)
class Problem:
    """All results of one task with one number of labelled rows.

    Attributes:
        task: Name of the task.
        size: Number of labelled rows.
        results: Result by method, as shown, and seed.
    """

    task: str
    size: int
    results: dict[str, dict[int, Result]]

    @property
    def title(self) -> str:
        """Title of a section about this problem."""
        return f"{self.task}, {self.size} rows"

    @property
    def methods(self) -> list[str]:
        """Methods in the order of the tables: base, LoRA, others, ours."""
        return sorted(self.results, key=_place)

    @property
    def ours(self) -> list[str]:
        """Our methods. Ablations are in the tables of metrics only, so that they do not enter the tests."""
        return [
            method
            for method in self.methods
            if method.startswith(OURS) and not any(r.cell.options for r in self.results[method].values())
        ]

    @cached_property
    def sets(self) -> list[str]:
        """Sets of rows; the first is in domain."""
        every = (name for by in self.results.values() for result in by.values() for name in result.predicted)
        return list(dict.fromkeys(every))

    def seeds(self, name: str, *methods: str) -> list[int]:
        """Seeds for which every one of these methods has predictions of a set; in increasing order."""
        having = [
            {seed for seed, result in self.results.get(method, {}).items() if name in result.predicted}
            for method in methods
        ]
        return sorted(set.intersection(*having)) if having else []

    @cached_property
    def labels(self) -> dict[tuple[str, int], np.ndarray]:
        """Labels by set and seed, shape (n,) each."""
        return {
            (name, seed): of.labels
            for by in self.results.values()
            for seed, result in by.items()
            for name, of in result.predicted.items()
        }

    def groups(self, name: str) -> dict[int, int]:
        """Seeds of a set by seed: those with the same rows have the number of the first of them.

        A result has no names of rows. Rows with the same labels in the same order count as the same rows.
        """
        first: dict[bytes, int] = {}
        seeds = sorted(seed for of, seed in self.labels if of == name)
        return {seed: first.setdefault(self.labels[name, seed].tobytes(), seed) for seed in seeds}

    def shared(self, name: str) -> set[int]:
        """Seeds of a set whose rows are also the rows of another seed."""
        groups = self.groups(name)
        return {seed for seed, group in groups.items() if list(groups.values()).count(group) > 1}


def problems(results: Sequence[Result]) -> list[Problem]:
    """Group results by task and size.

    Raises:
        ValueError: If two results of a problem disagree about the set in domain, or about the labels of a
            set under the same seed: their rows differ, so they cannot be compared.
    """
    grouped: dict[tuple[str, int], dict[str, dict[int, Result]]] = {}
    for result in results:
        by_method = grouped.setdefault((result.cell.task, result.cell.size), {})
        by_method.setdefault(shown(result.cell), {})[result.cell.seed] = result
    every = [Problem(task, size, by) for (task, size), by in sorted(grouped.items())]
    for problem in every:
        _check(problem)
    return every


def _check(problem: Problem) -> None:
    results = [result for by in problem.results.values() for result in by.values()]
    for result in results:
        if next(iter(result.predicted), None) != problem.sets[0]:
            raise ValueError(
                f"the first set of all results of {problem.title!r} must be {problem.sets[0]!r}; "
                f"{result.cell.name!r} starts with {next(iter(result.predicted), None)!r}"
            )
        for name, of in result.predicted.items():
            if not np.array_equal(of.labels, problem.labels[name, result.cell.seed]):
                raise ValueError(
                    f"{result.cell.name!r} has other labels in the set {name!r} than other methods with the "
                    "same seed; compute one of them again"
                )


def _place(method: str) -> tuple[int, list[tuple[int, str]]]:
    """Sorting key: kind of the method, then its name with numbers by value."""
    kinds = (method == BASE, method.startswith("LoRA"), not method.startswith(OURS), True)
    parts = re.split(r"(\d+)", method)
    return kinds.index(True), [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
