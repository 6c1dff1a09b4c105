"""Memory and time of a step at SmolLM2-135M's sizes, every layer adapted: python benchmarks/memory.py.

Weights are random, which changes neither. Memory is what the compiled step takes beside its arguments, by the
compiler's own account. Times are those of steps run in turn in one process.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rounds import in_turn

import bnlora as bl
from bnlora._util.display import Table
from bnlora.base import random_base
from bnlora.infer.svi.fit import _prepare, _program
from bnlora.models.llama import LlamaConfig
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


def main() -> None:
    """Compile every way to run the step, then time them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    base = random_base(jax.random.key(0), LlamaConfig(vocab_size=49_152, tied=True, **SIZES))
    train = tiny_rows(jax.random.key(1), arguments.batch_size, length=arguments.length, vocabulary=49_152)
    sites = bl.select(base, list(base.modules), rank=8)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(100, 200))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    rows, adam = jnp.arange(arguments.batch_size), optax.adam(1e-3)
    compiled = {}
    for way in WAYS:
        program = _program(model, **{"accumulate": 1} | way)
        loop, state = _prepare(jax.random.key(2), program, guide, train, adam, scale_optimizer=adam)
        step = (state, jax.random.key(3), base.weights, train, rows)
        name = ", ".join(f"{n}={x!r}" for n, x in way.items()) or "default"
        compiled[name] = loop.step(arguments.batch_size).lower(*step).compile()
    times = in_turn({n: lambda _, run=run: run(*step) for n, run in compiled.items()}, arguments.rounds)
    cells = []
    for name, run in compiled.items():
        mebibytes = run.memory_analysis().temp_size_in_bytes / 2**20
        ratio = times[name].wall / times["default"].wall
        spread = f"{np.median(ratio):.2f} ({ratio.min():.2f}-{ratio.max():.2f})"
        cells.append((name, f"{mebibytes:,.0f}", f"{times[name].wall.min():.2f}", spread))
    columns = ("step", "MiB", "least s", "ratio to default")
    Console(width=140).print(Table(f"{arguments}", columns, tuple(cells)))


if __name__ == "__main__":
    main()
