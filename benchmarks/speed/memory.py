"""Memory and time of a step at SmolLM2-135M's sizes, with every layer adapted.

Weights are random, which affects neither. Memory is that of the compiled step without its arguments, as
reported by the compiler. The steps alternate in one process.
"""

import argparse

import jax
import numpy as np
import optax

import bnlora as bl
from benchmarks.report import Report
from benchmarks.steps import svi_step
from benchmarks.timing import in_turn, spread
from bnlora.base import random_base
from bnlora.models.decoder_config import DecoderConfig
from bnlora.testing import tiny_rows

SIZES = {"d_model": 576, "d_ff": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
WAYS = [
    {},
    {"accumulate": 4},
    {"remat": "none"},
    {"remat": "attention"},
    {"remat": "layers"},
    {"remat": "layers", "accumulate": 4},
    {"activations": "bfloat16"},
    {"activations": "bfloat16", "remat": "layers", "accumulate": 4},
]


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=SIZES["num_layers"])


def run(given: argparse.Namespace, report: Report) -> None:
    """Compile every variant of the step, then time them in alternation."""
    size, sizes = given.batch_size, SIZES | {"num_layers": given.layers}
    base = random_base(jax.random.key(0), DecoderConfig(vocab_size=49_152, tied=True, **sizes))
    train = tiny_rows(jax.random.key(1), size, length=given.length, vocabulary=49_152)
    sites = bl.select(base, list(base.modules), rank=8)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(100, 200))
    guide, adam = bl.guides.Guide(model.prior, bl.guides.mean_field()), optax.adam(1e-3)
    compiled, programs = {}, {}
    for way in WAYS:
        name = ", ".join(f"`{n}={x!r}`" for n, x in way.items()) or "default"
        step = svi_step(
            jax.random.key(2), model, guide, train, adam, batch_size=size, memory=bl.Memory(**way)
        )
        compiled[name] = step.lower().compile()
        programs[name] = lambda _, run=compiled[name], inputs=step.inputs: run(*inputs)
        report.progress(f"compiled: {name}")
    times = in_turn(programs, given.rounds)
    table = report.table("Memory of a step", ("step", "MiB", "s", "over the default"))
    for name, program in compiled.items():
        mebibytes = program.memory_analysis().temp_size_in_bytes / 2**20
        ratio = times[name].wall / times["default"].wall
        table.row(name, f"{mebibytes:,.0f}", f"{np.median(times[name].wall):.2f}", spread(ratio))
