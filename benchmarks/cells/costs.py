"""What a method costs: seconds relative to LoRA, parameters and memory."""

from collections.abc import Callable

import numpy as np

from benchmarks.cells.gathered import LORA, Problem
from benchmarks.cells.rows import Result


def relative_seconds(problem: Problem, method: str, part: str) -> float:
    """Mean seconds of a method divided by those of `LORA`, over the seeds that both ran on one machine.

    Args:
        problem: Task and size.
        method: The method.
        part: `fit` or `predict`.

    Returns:
        The ratio; NaN if there is no such seed or LoRA took no time.
    """
    ours, lora = problem.results.get(method, {}), problem.results.get(LORA, {})
    both = [
        (ours[seed].seconds[part], lora[seed].seconds[part])
        for seed in ours.keys() & lora.keys()
        if part in ours[seed].seconds and part in lora[seed].seconds and _machine(ours, lora, seed)
    ]
    first, second = np.sum(both, axis=0) if both else (0.0, 0.0)
    return float(first / second) if second > 0 else float("nan")


def _machine(ours: dict[int, Result], lora: dict[int, Result], seed: int) -> bool:
    """Whether both ran on the same machine, whose name both give or neither."""
    return ours[seed].provenance.get("machine") == lora[seed].provenance.get("machine")


def mean_of(problem: Problem, method: str, number: Callable[[Result], float | None]) -> float:
    """Mean over the seeds of a number of a result; NaN if every result lacks it."""
    found = [number(result) for result in problem.results.get(method, {}).values()]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else float("nan")


def fit_seconds(problem: Problem, method: str) -> float:
    """Mean seconds of a fit; NaN if they are unknown."""
    return mean_of(problem, method, lambda result: result.seconds.get("fit"))
