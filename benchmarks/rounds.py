"""Paired timing for the benchmarks: several programs run in turn, and their ratio is taken round by round.

A machine whose speed drifts, or that has other work, slows whatever runs at that moment. Programs that take
turns in one process, in alternating order, are slowed alike, so that the ratio within a round is steadier
than either time. Reported are medians and the middle 80 % of rounds, by the clock and in seconds of all cores
together; the latter hardly feels other work, but counts threads that spin while they wait, as torch's do.
"""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from bnlora._util.display import Table

WARM_UP = 2  # rounds that are not counted: compilation, and caches of the machine


@dataclass(frozen=True)
class Times:
    """What the rounds of one program took, in seconds: by the clock, and of all cores together."""

    wall: np.ndarray
    cpu: np.ndarray


def in_turn(
    programs: Mapping[str, Callable[[int], Any]], rounds: int, *, warm_up: int = WARM_UP
) -> dict[str, Times]:
    """Times of each program in each round; a program is called with the number of the round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for step in range(rounds + warm_up):
        for name in list(programs)[:: 1 if step % 2 else -1]:  # neither is always first
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(programs[name](step))
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Times(*np.array(values[warm_up:]).T) for name, values in taken.items()}


def in_turn_of_processes(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Times]:
    """Times of commands that each run in a process of their own, to its end."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for step in range(rounds + WARM_UP):
        for name in list(commands)[:: 1 if step % 2 else -1]:
            wall, before = time.perf_counter(), os.times()
            subprocess.run(commands[name], check=True)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            taken[name].append((time.perf_counter() - wall, cpu))
    return {name: Times(*np.array(values[WARM_UP:]).T) for name, values in taken.items()}


def spread(values: np.ndarray) -> str:
    """Median, and the range of the middle 80 %."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def show(title: str, times: Mapping[str, Times], *, unit: str) -> None:
    """Print a table: each program's times, and its ratios to the first one's of the same round."""
    first, *_ = times.values()
    rows = tuple(
        (name, spread(t.wall), f"{t.wall.min():.3f}", f"{np.median(t.cpu):.3f}")
        + (("", "") if t is first else (spread(t.wall / first.wall), spread(t.cpu / first.cpu)))
        for name, t in times.items()
    )
    header = ("", f"s a {unit}", "least", "CPU s", f"over {next(iter(times))}", "in CPU s")
    Console(width=130).print(Table(title, header, rows))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{len(first.wall)} rounds; load of the last 1, 5 and 15 minutes: {load}", flush=True)
