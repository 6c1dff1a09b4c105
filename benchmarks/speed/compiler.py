"""Compile time and run time of a step at XLA's levels of optimisation, on CPUs.

The steps of a small and of a wide model are compiled once at every level without a cache. The compiled steps
then run in alternation. `bnlora/_util/compilation.py` chooses the level by these numbers.
"""

import argparse

import jax
import numpy as np
import optax

import bnlora as bl
from benchmarks.report import Report
from benchmarks.steps import LEVELS, Started, svi_step
from benchmarks.timing import clock, in_turn, spread
from bnlora.base import random_base
from bnlora.models.decoder_config import DecoderConfig
from bnlora.testing import tiny_base, tiny_rows

WIDE = {"d_model": 576, "d_ff": 1536, "num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
HEADER = ("step", "level", "CPU s to compile", "s a step", "over the default level, in CPU s")


def step_of(base: bl.Base, *, length: int, rank: int) -> Started:
    """The step of a Bayesian fit with 16 rows."""
    rows = tiny_rows(jax.random.key(0), 16, length=length, vocabulary=base.config.vocab_size)
    sites = bl.select(base, ["q_proj", "k_proj", "lm_head"], rank=rank)
    model = bl.Classifier(base, sites, bl.priors.sparse_gp(), label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior, lam_max=0.03)
    return svi_step(jax.random.key(1), model, guide, rows, optax.adam(1e-2), batch_size=16)


def options(parser: argparse.ArgumentParser) -> None:
    """Number of rounds."""
    parser.add_argument("--rounds", type=int, default=20)


def run(given: argparse.Namespace, report: Report) -> None:
    """Compile both steps at each level, then time the compiled steps in alternation."""
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    wide = random_base(jax.random.key(3), DecoderConfig(vocab_size=49_152, tied=True, **WIDE))
    steps = {
        "width 16, 4 layers": step_of(tiny_base(jax.random.key(3)), length=16, rank=2),
        "width 576, 4 layers": step_of(wide, length=32, rank=8),
    }
    table = report.table("Levels of optimisation", HEADER)
    for name, step in steps.items():
        compiled, seconds = {}, {}
        for level in LEVELS:
            lowered = step.lower(level)
            with clock() as took:
                compiled[level] = lowered.compile()
            seconds[level] = took.cpu
        lines = len(lowered.as_text().splitlines())
        report.progress(f"{name}: {lines:,} lines of StableHLO")
        programs = {level: lambda _, run=run, x=step.inputs: run(*x) for level, run in compiled.items()}
        times = in_turn(programs, given.rounds)
        for level, taken in times.items():
            ratio = spread(taken.cpu / times["default"].cpu)
            table.row(name, level, f"{seconds[level]:.1f}", f"{np.median(taken.wall):.3f}", ratio)
