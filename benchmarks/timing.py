"""One way to time: programs take turns, and their ratio is taken round by round.

A machine whose speed drifts, or that has other work, slows whatever runs at that moment. Programs that take
turns in one process, in alternating order, are slowed alike, so that the ratio within a round is steadier
than either time. Reported are medians and the middle 80 % of rounds, by the clock and in seconds of all cores
together; the latter hardly feels other work, but counts threads that spin while they wait, as torch's do.

What runs only once, such as a whole fit, is timed by `clock`.
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

WARM_UP = 2  # rounds that are not counted: compilation, and caches of the machine


@dataclass(frozen=True)
class Times:
    """What the rounds of one program took, in seconds: by the clock, and of all cores together."""

    wall: np.ndarray
    cpu: np.ndarray


@dataclass
class Took:
    """What a block took, in seconds: by the clock, and of all cores together."""

    wall: float = float("nan")
    cpu: float = float("nan")


@contextmanager
def clock() -> Iterator[Took]:
    """Seconds of one block, which stand in what this yields once the block has ended."""
    took, wall, cpu = Took(), time.perf_counter(), time.process_time()
    yield took
    took.wall, took.cpu = time.perf_counter() - wall, time.process_time() - cpu


def in_turn(
    programs: Mapping[str, Callable[[int], Any]], rounds: int, *, warm_up: int = WARM_UP
) -> dict[str, Times]:
    """Times of each program in each round; a program is called with the number of the round."""

    def timed(name: str, step: int) -> tuple[float, float]:
        with clock() as took:
            jax.block_until_ready(programs[name](step))
        return took.wall, took.cpu

    return _rounds(list(programs), timed, rounds, warm_up)


def in_turn_of_processes(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Times]:
    """Times of commands that each run in a process of their own, to its end."""

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
        for name in names[:: 1 if step % 2 else -1]:  # neither is always first
            taken[name].append(timed(name, step))
    return {name: Times(*np.array(values[warm_up:]).T) for name, values in taken.items()}


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Median, and the range of the middle 80 %."""
    low, middle, high = (f"{x:.{digits}f}" for x in np.quantile(values, [0.1, 0.5, 0.9]))
    return f"{middle} ({low} to {high})"


def show(report: Report, title: str, times: Mapping[str, Times], *, unit: str) -> None:
    """A table of each program's times, and of its ratios to the first one's of the same round."""
    first, *_ = times.values()
    over = f"over {next(iter(times))}"
    table = report.table(title, ("", f"s a {unit}", "least", "CPU s", over, "in CPU s"))
    for name, t in times.items():
        ratios = ("", "") if t is first else (spread(t.wall / first.wall), spread(t.cpu / first.cpu))
        table.row(name, spread(t.wall, 3), f"{t.wall.min():.3f}", f"{np.median(t.cpu):.3f}", *ratios)
    report.text(title, f"Medians and the middle 80 % of {len(first.wall)} rounds.")
