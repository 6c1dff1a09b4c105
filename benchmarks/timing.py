"""Timing of programs in alternating rounds, with ratios within each round.

The speed of a machine drifts, and other work slows it. Programs that alternate in one process are slowed
equally, so their ratio within a round varies less than either time. The tables report medians and the middle
80 % of rounds, in wall-clock seconds and in CPU seconds summed over all cores. CPU seconds hardly depend on
other work, but include threads that spin while they wait, such as torch's.

`clock` times a block that runs only once, such as a whole fit.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.report import Report

WARM_UP = 2  # uncounted rounds: compilation, and caches of the machine


@dataclass(frozen=True)
class Times:
    """Seconds of the rounds of one program: wall clock, and CPU time summed over all cores."""

    wall: np.ndarray
    cpu: np.ndarray


@dataclass
class Took:
    """Seconds of a block: wall clock, and CPU time summed over all cores."""

    wall: float = float("nan")
    cpu: float = float("nan")


@contextmanager
def clock() -> Iterator[Took]:
    """Time a block; the yielded object has the seconds after the block ends."""
    took, wall, cpu = Took(), time.perf_counter(), time.process_time()
    yield took
    took.wall, took.cpu = time.perf_counter() - wall, time.process_time() - cpu


def in_turn(
    programs: Mapping[str, Callable[[int], Any]], rounds: int, *, warm_up: int = WARM_UP
) -> dict[str, Times]:
    """Time each program in each round; a program is called with the number of the round."""

    def timed(name: str, step: int) -> tuple[float, float]:
        with clock() as took:
            jax.block_until_ready(programs[name](step))
        return took.wall, took.cpu

    return _rounds(list(programs), timed, rounds, warm_up)


def in_turn_of_processes(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Times]:
    """Time commands, each run in a new process until it ends."""

    def timed(name: str, _: int) -> tuple[float, float]:
        wall, before = time.perf_counter(), os.times()
        subprocess.run(commands[name], check=True)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return time.perf_counter() - wall, cpu

    return _rounds(list(commands), timed, rounds, WARM_UP)


def _rounds(
    names: Sequence[str], timed: Callable[[str, int], tuple[float, float]], rounds: int, warm_up: int
) -> dict[str, Times]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for step in range(rounds + warm_up):
        for name in names[:: 1 if step % 2 else -1]:  # alternate the order
            taken[name].append(timed(name, step))
    return {name: Times(*np.array(values[warm_up:]).T) for name, values in taken.items()}


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Median and range of the middle 80 %, as text."""
    low, middle, high = (f"{x:.{digits}f}" for x in np.quantile(values, [0.1, 0.5, 0.9]))
    return f"{middle} ({low} to {high})"


def show(report: Report, title: str, times: Mapping[str, Times], *, unit: str) -> None:
    """A table of the times of each program, and of their ratios to the first program within each round."""
    first, *_ = times.values()
    over = f"over {next(iter(times))}"
    table = report.table(title, ("", f"s a {unit}", "least", "CPU s", over, "in CPU s"))
    for name, t in times.items():
        ratios = ("", "") if t is first else (spread(t.wall / first.wall), spread(t.cpu / first.cpu))
        table.row(name, spread(t.wall, 3), f"{t.wall.min():.3f}", f"{np.median(t.cpu):.3f}", *ratios)
    report.text(title, f"Medians and the middle 80 % of {len(first.wall)} rounds.")
