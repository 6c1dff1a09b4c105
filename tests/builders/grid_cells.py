"""Cells that cost nothing, for the tests of how cells are run; worker processes import them from here."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from benchmarks.cells.rows import Cell, Predicted, Result
from benchmarks.cells.running import Outcome

MARKS = "BNLORA_TEST_MARKS"
"""Environment variable with the folder in which `run` notes every start of a cell."""


def cell(method: str, seed: int = 0, **options) -> Cell:
    return Cell("task", method, 10, seed, options)


def result(of: Cell) -> Result:
    """Predictions that depend on the seed of the cell."""
    log_probs = np.log(np.random.default_rng(of.seed).dirichlet(np.ones(3), 10))
    predicted = {"here": Predicted(np.arange(10) % 3, log_probs, np.zeros(10))}
    return Result(of, predicted, {"fit": 1.0, "predict": 0.5}, 7, 1000, {"chosen": 2}, {"commit": "abc"})


def starts(of: Cell) -> int:
    """How often a cell was started."""
    return len([*Path(os.environ[MARKS]).glob(f"{of.file}.*")])


def run(of: Cell) -> Outcome:
    """Succeed, fail, or be killed: the first time (`killed once`) or always (`killed`)."""
    count = starts(of)
    (Path(os.environ[MARKS]) / f"{of.file}.{count}").touch()
    if of.method == "killed" or (of.method == "killed once" and count == 0):
        time.sleep(0.2)  # so that the other worker has a cell too
        os.kill(os.getpid(), signal.SIGKILL)
    if of.method == "fails":
        return Outcome(of, None, "ValueError: as asked")
    return Outcome(of, result(of))
