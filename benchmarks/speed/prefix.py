"""Memory and time of a fit with and without the prefix cache, on SmolLM2-135M.

Each fit runs in a new process, because the operating system records one memory peak per process.
"""

import argparse
import json
import resource
import subprocess
import sys

import jax
import numpy as np
import optax
from rich.console import Console

import bnlora as bl
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.app.demo import RECIPE
from bnlora.testing import tiny_rows

WHERE = ("memory", "off")


def measure(where: str, given: argparse.Namespace) -> dict[str, float]:
    """Fit in this process: peak MiB above the loaded base, seconds of a step, and total seconds."""
    base = RECIPE.load_base()
    model, guide = RECIPE.build(base, np.array([100, 200]))
    train = tiny_rows(jax.random.key(0), given.rows, length=given.length, vocabulary=49_152)
    before, adam = peak(), optax.adam(1e-3)
    about = {"num_steps": given.steps, "batch_size": given.batch_size, "prefix_cache": where}
    with clock() as took:
        fit = bl.fit(jax.random.key(0), model, guide, train, adam, console=Console(quiet=True), **about)
    return {"peak": peak() - before, "step": float(np.median(fit.step_seconds[1:])), "all": took.wall}


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=WHERE, help="one of the two fits, in this process, as JSON")


def run(given: argparse.Namespace, report: Report) -> None:
    """Run both fits, each in a new process."""
    if given.only:
        print(json.dumps(measure(given.only, given)))
        return
    header = (
        "prefix_cache",
        "peak above the base",
        "a step",
        f"cache and {given.steps} steps, with compiling",
    )
    table = report.table("Prefix cache", header)
    sizes = {"--rows": given.rows, "--length": given.length, "--batch-size": given.batch_size}
    sizes["--steps"] = given.steps
    arguments = [str(x) for pair in sizes.items() for x in pair]
    for where in WHERE:
        command = [sys.executable, "-m", "benchmarks", "prefix", *arguments, "--only", where]
        numbers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        table.row(where, f"{numbers['peak']:,.0f} MiB", f"{numbers['step']:.3f} s", f"{numbers['all']:.1f} s")
