"""Runs cells: once each, in worker processes, and again where a worker was killed.

A cell that has its file is done. A worker that dies, for want of memory or by a signal, costs the cells that
it had begun. These are started again, at most `ATTEMPTS` times. Workers are processes of this machine, or
those of Ray (the extra `ray`) on many.
"""

import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cells.rows import Cell, Predicted, Result

ATTEMPTS = 3
"""Times that a cell is started if its worker dies."""


class Outcome(NamedTuple):
    """How a cell ended: with a result, or with the text of an error."""

    cell: Cell
    result: Result | None
    error: str = ""


def run_cell(cell: Cell) -> Outcome:
    """Fit and predict a cell. An error of the method is a part of the outcome, so that other cells go on."""
    try:
        return Outcome(cell, computed(cell))
    except Exception:  # noqa: BLE001 - whatever it was, the other cells are still to be computed
        return Outcome(cell, None, traceback.format_exc())


def computed(cell: Cell) -> Result:
    """The result of a cell."""
    import numpy as np  # the modules below import JAX, which the list of a grid does not need

    from benchmarks.cells import tasks
    from benchmarks.cells.methods import METHODS
    from benchmarks.cells.setting import Setting
    from benchmarks.cells.tasks import LAYERS
    from benchmarks.planned import peak_memory
    from benchmarks.timing import clock

    options = dict(cell.options)
    rows = tasks.rows_of(cell.task, cell.size, cell.seed, options.pop("layers", LAYERS))
    setting = Setting(rows, cell.seed, options)
    with clock() as fitting:
        fitted = METHODS[cell.method](setting)
    setting.check_all_read()
    with clock() as predicting:
        predictions = {name: fitted.predict(name) for name in rows.tests}
    own = {"fit": fitting.wall - sum(setting.aside), "predict": predicting.wall}
    return Result(
        cell,
        {
            name: Predicted(np.asarray(rows.tests[name].labels), found.log_probs, found.mutual_information)
            for name, found in predictions.items()
        },
        {part: seconds + fitted.earlier.get(part, 0.0) for part, seconds in own.items()},
        fitted.parameters,
        peak_memory(),
        {**rows.about, **fitted.about},
        provenance(),
    )


def provenance() -> dict[str, str]:
    """Commit, time, machine and versions."""
    import jax

    import bnlora
    from benchmarks.report import processor

    return {
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "bnlora": bnlora.__version__,
    }


def commit() -> str:
    """The commit of this checkout, with a plus if files were changed since; empty outside of a checkout."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "bnlora", "models", "kernels", "benchmarks"
    )
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


Run = Callable[[Cell], Outcome]
Executor = Callable[[Run, Sequence[Cell]], Iterator[Outcome]]


def in_this_process(run: Run, cells: Sequence[Cell]) -> Iterator[Outcome]:
    """One cell after the other, here."""
    return map(run, cells)


def in_processes(workers: int) -> Executor:
    """Worker processes of this machine."""

    def execute(run: Run, cells: Sequence[Cell]) -> Iterator[Outcome]:
        waiting = [*cells]
        attempts: dict[str, int] = {}
        while waiting:
            done = set()
            for outcome in _until_broken(run, waiting, workers, attempts):
                done.add(outcome.cell.name)
                yield outcome
            waiting = [cell for cell in waiting if cell.name not in done]

    return execute


def _until_broken(
    run: Run, cells: Sequence[Cell], workers: int, attempts: dict[str, int]
) -> Iterator[Outcome]:
    """Outcomes until a worker dies. Cells that were being computed then have one attempt less."""
    remaining, running = iter(cells), {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while True:
            try:
                while len(running) < workers and (cell := next(remaining, None)) is not None:
                    attempts[cell.name] = attempts.get(cell.name, 0) + 1
                    running[pool.submit(run, cell)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    del running[future]
                    yield outcome
            except BrokenProcessPool:
                yield from _given_up(running.values(), attempts)
                return


def _given_up(cells: Iterable[Cell], attempts: dict[str, int]) -> Iterator[Outcome]:
    for cell in cells:
        if attempts[cell.name] >= ATTEMPTS:
            yield Outcome(cell, None, f"its worker was killed {ATTEMPTS} times")


def on_ray(address: str | None, workers: int) -> Executor:
    """Workers of Ray, on this machine or on a cluster; Ray starts what a killed worker had begun again.

    Raises:
        SystemExit: If Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise SystemExit("--ray needs Ray: pip install -e '.[ray]'") from error

    def execute(run: Run, cells: Sequence[Cell]) -> Iterator[Outcome]:
        ray.init(**_of_cluster(address) if address else _of_this_machine(workers), logging_level="error")
        remote = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(run)
        running = {remote.remote(cell): cell for cell in cells}
        try:
            while running:
                for done in ray.wait([*running])[0]:
                    yield _outcome(ray, done, running.pop(done))
        finally:
            ray.shutdown()

    return execute


def _of_cluster(address: str) -> dict[str, Any]:
    """Options of Ray for a cluster, to which the checkout is sent."""
    return {"address": address, "runtime_env": {"working_dir": str(Path(__file__).parents[2])}}


def _of_this_machine(workers: int) -> dict[str, Any]:
    """Options of Ray for workers on this machine, which import what this process imports."""
    path = os.pathsep.join(str(Path(place).resolve()) for place in sys.path)
    environment = {"env_vars": {"PYTHONPATH": path}}
    return {"num_cpus": workers, "include_dashboard": False, "runtime_env": environment}


def _outcome(ray: Any, done: Any, cell: Cell) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        return Outcome(cell, None, f"its worker was killed {ATTEMPTS} times: {error}")


def unfinished(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """Cells without a file, those of the same rows together, because they share activations and fits."""
    waiting = [cell for cell in cells if not (folder / cell.file).is_file()]
    order = {cell.name: place for place, cell in enumerate(waiting)}
    return sorted(waiting, key=lambda cell: (cell.task, cell.seed, cell.size, order[cell.name]))


def run_all(
    cells: Iterable[Cell], folder: Path, execute: Executor, run: Run | None = None
) -> Iterator[Outcome]:
    """Compute the cells that have no file; each gets its file as soon as it is computed.

    Args:
        cells: The cells.
        folder: Folder of the files.
        execute: Where the cells run.
        run: Computes a cell; `run_cell` if omitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for outcome in execute(run or run_cell, unfinished(cells, folder)):
        if outcome.result is not None:
            outcome.result.write(folder)
        yield outcome
