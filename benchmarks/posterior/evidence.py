"""Laplace's evidence against bridge sampling on the demonstration's rows.

The scales chosen by `fit_core` are multiplied by five factors. For each factor, NUTS in the coordinates of
Laplace's Gaussian draws from the exact posterior of the tangent model, and bridge sampling gives its log
evidence. The table tests the value and the maximiser of Laplace's approximation.
"""

import argparse

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.data import drawn, pool
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.infer.core.fit import fit_core

FACTORS = (0.35, 0.6, 1.0, 1.7, 2.8)


def top(values: list[float]) -> float:
    """Maximiser of the parabola through the three middle points, as a function of the log factor."""
    square, linear, _ = np.polyfit(np.log(FACTORS[1:4]), values[1:4], 2)
    return float(np.exp(-linear / (2 * square)))


def options(parser: argparse.ArgumentParser) -> None:
    """Number of rows, and draws of NUTS."""
    parser.add_argument("--rows", type=int, default=560)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=300)


def run(given: argparse.Namespace, report: Report) -> None:
    """Both evidences at every factor."""
    quiet = Console(quiet=True)
    found = pool(["movies"], console=quiet)
    train, _ = drawn(found, given.seed, labelled=given.rows)
    key = jax.random.key(given.seed)
    core = fit_core(key, found.base, train, label_ids=found.label_ids, num_steps=1, console=quiet)
    report.progress(str(core.scales))
    header = (
        "factor",
        "Laplace",
        "bridge sampling",
        "standard error",
        "Laplace less bridge",
        "divergences",
        "s",
    )
    table = report.table("Log evidence", header)
    both: dict[str, list[float]] = {"Laplace": [], "bridge sampling": []}
    nuts = {"num_warmup": given.warmup, "num_draws": given.draws, "target_acceptance": 0.8}
    for factor in FACTORS:
        scale = {name: factor * value for name, value in core.scales.values.items()}
        tangent = core.model.with_prior(bl.priors.core(core.frames, scale=scale))
        gaussian = bl.laplace(tangent, core.fit.train)
        with clock() as took:
            chains = bl.sample_nuts(key, tangent, core.fit.train, mass=gaussian, console=quiet, **nuts)
            exact = bl.log_evidence(key, chains, num_draws=8000)
        values = gaussian.log_evidence, exact.value
        for kept, value in zip(both.values(), values, strict=True):
            kept.append(value)
        cells = [f"{x:.2f}" for x in (*values, exact.stderr, values[0] - values[1])]
        divergences = int(chains.stats["divergent"].sum())
        table.row(factor, *cells, divergences, f"{took.wall:.0f}")
    tops = (f"{top(values):.2f} ({name})" for name, values in both.items())
    report.text(
        "Log evidence", f"Parabolas through the middle three have their tops at {' and '.join(tops)}."
    )
