"""Memory and time of a fit with and without the prefix cache: python benchmarks/prefix.py.

Each of the two runs in a process of its own, because the operating system keeps one peak for a process.
"""

import argparse
import resource
import subprocess
import sys
import time

import jax
import numpy as np
import optax
from rich.console import Console

import bnlora as bl
from bnlora.app.demo import RECIPE
from bnlora.testing import tiny_rows

SHOWN = "prefix_cache={}: {:.0f} MiB more than the loaded base at the peak, {:.3f} s a step, {:.1f} s in all"


def measure(where: str, arguments: argparse.Namespace) -> None:
    """Fit in this process and print what it took."""
    base = RECIPE.load_base()
    model, guide = RECIPE.build(base, np.array([100, 200]))
    train = tiny_rows(jax.random.key(0), arguments.rows, length=arguments.length, vocabulary=49_152)
    before, began = peak(), time.perf_counter()
    options = {"num_steps": arguments.steps, "batch_size": arguments.batch_size, "prefix_cache": where}
    fit = bl.fit(
        jax.random.key(0), model, guide, train, optax.adam(1e-3), console=Console(quiet=True), **options
    )
    seconds = time.perf_counter() - began
    print(SHOWN.format(where, peak() - before, np.median(fit.step_seconds[1:]), seconds), flush=True)


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=["memory", "off"])
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments.only, arguments)
        return
    for where in ("memory", "off"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", where], check=True)


if __name__ == "__main__":
    main()
