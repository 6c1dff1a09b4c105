"""Paired timing for the benchmarks: several programs run in turn, and their ratio is taken round by round.

A machine whose speed drifts, or that has other work, slows whatever runs at that moment. Programs that take
turns in one process, in alternating order, are slowed alike, so that the ratio within a round is steadier
than either time. Reported are medians and the middle 80 % of rounds.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from bnlora.display import Table

Seconds = Mapping[str, np.ndarray]

WARM_UP = 2  # rounds that are not counted: compilation, and caches of the machine


def in_turn(programs: Mapping[str, Callable[[int], Any]], rounds: int) -> Seconds:
    """Seconds of each program in each round; a program is called with the number of the round."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for step in range(rounds + WARM_UP):
        for name in list(programs)[:: 1 if step % 2 else -1]:  # neither is always first
            began = time.perf_counter()
            jax.block_until_ready(programs[name](step))
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[WARM_UP:]) for name, values in seconds.items()}


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Median, and the range of the middle 80 %."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def show(title: str, seconds: Seconds, *, unit: str) -> None:
    """Print a table: each program's time, and its ratio to the first one's of the same round."""
    first = next(iter(seconds))
    rows = tuple(
        (name, spread(s), f"{s.min():.3f}", "" if name == first else spread(s / seconds[first]))
        for name, s in seconds.items()
    )
    header = ("", f"s a {unit}", "least", f"over {first}")
    Console(width=110).print(Table(title, header, rows))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{len(seconds[first])} rounds; load of the last 1, 5 and 15 minutes: {load}", flush=True)
