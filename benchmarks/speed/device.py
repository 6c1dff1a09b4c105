"""All that a new device should show once: kernels against the reference, and the speed of what users run.

`make device` runs it in full, in under eight minutes, and writes one log. On a host without an accelerator
the kernels are interpreted; `--size tiny` takes seconds there, so a test holds the script in order.

1. Kernels: product, gradients and draws under `vmap` against the reference, for each type.
2. Speed of the product, as `python -m benchmarks kernel`.
3. A step of a fit one by one and several in a call, a prediction, and NUTS, by the kernels and by XLA.
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax

import bnlora as bl
from benchmarks.report import Report
from benchmarks.speed import kernel
from benchmarks.timing import clock, in_turn, spread
from bnlora.data.batch import Batch
from bnlora.infer.svi.step import CHUNK
from bnlora.kernels import api, trial
from bnlora.kernels.derivatives import operation
from bnlora.models.decoder_config import DecoderConfig

KEY = jax.random.key(0)
KINDS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "eight bits": ("float32", True)}
SHAPES = {
    "tiny": {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "135M": {
        "vocab_size": 49_152,
        "d_model": 576,
        "d_ff": 1536,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
    },
}
ROWS = {"tiny": (32, 8, 4), "135M": (256, 64, 16)}
"""Training rows, tokens of each, and rows of a step."""


PRODUCTS = {"rank": 8, "draws": [1, 16], "sizes": 4, "dtype": "bfloat16", "tflops": None, "gbs": None}
"""Options of the benchmark `kernel`."""


def base_of(size: str) -> bl.Base:
    """A random base of this size."""
    shape = SHAPES[size]
    side = shape["d_model"] // shape["num_heads"]
    constants = {"head_dim": side, "rope_theta": 1e4, "norm_eps": 1e-5, "tied": True, "max_length": 128}
    return bl.Base.random(jax.random.key(0), DecoderConfig(**shape, **constants))


def rows_of(size: str, vocab_size: int) -> Batch:
    """Random rows of full length, with labels."""
    count, length, _ = ROWS[size]
    tokens, labels = jax.random.split(jax.random.key(1))
    return Batch(
        jax.random.randint(tokens, (count, length), 0, vocab_size),
        np.ones((count, length), bool),
        np.asarray(jax.random.randint(labels, (count,), 0, 2)),
    )


def kernels(report: Report) -> None:
    """A row for each type: the verdict of the trial."""
    where = jax.devices()[0].device_kind
    implementation = api._interpreted() if jax.default_backend() == "cpu" else api._compiled()
    how = "interpreted" if jax.default_backend() == "cpu" else "compiled"
    table = report.table(f"Kernels on {where}, {how}", ("arrays", "product, gradients, draws"))
    apply = operation(implementation, trial.SCALE)
    for name, (dtype, eight_bits) in KINDS.items():
        why = trial.failure(apply, *trial.problem(dtype, eight_bits=eight_bits))
        table.row(name, why or f"within {trial.TOLERANCE} of the reference")


def model_of(base: bl.Base, implementation: str | None, targets: list[str]) -> bl.Classifier:
    """A classifier under independent normals, whose products run by one implementation."""
    base = base.running(implementation=implementation)
    sites = bl.select(base, targets, rank=8 if base.vocab_size > 100 else 2)
    return bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))


def programs_of(model: bl.Classifier, train: Batch, batch: int) -> dict[str, Any]:
    """One step, many in a call, and a prediction."""
    guide, adam = bl.guides.Guide(model.prior, bl.guides.mean_field()), optax.adam(1e-2)
    fit = bl.fit(KEY, model, guide, train, adam, num_steps=2, batch_size=batch)
    step, state = bl.svi_step(KEY, model, guide, fit.train, adam, batch_size=batch)
    rows = np.arange(CHUNK * batch).reshape(CHUNK, batch) % len(train)
    return {
        "a step": lambda turn: step.run(state, jax.random.key(turn), rows[:1]),
        f"{CHUNK} steps in a call": lambda turn: step.run(state, jax.random.key(turn), rows),
        "prediction, 16 draws": lambda turn: bl.predict(jax.random.key(turn), fit, train, num_draws=16),
    }


def steps(given: argparse.Namespace, report: Report) -> None:
    """Seconds of a step by itself and of many in a call, and of a prediction."""
    base, batch = base_of(given.size), ROWS[given.size][2]
    train = rows_of(given.size, base.vocab_size)
    programs: dict[str, Any] = {}
    for name in ["xla"] if jax.default_backend() == "cpu" else ["xla", "pallas"]:
        model = model_of(base, name, ["q_proj", "v_proj", "lm_head"])
        made = programs_of(model, train, batch)
        programs |= {f"{name}: {what}": program for what, program in made.items()}
    table = report.table("A fit and a prediction", ("what", "ms", "steps or rows a second"))
    for name, taken in in_turn(programs, given.rounds).items():
        count = CHUNK if "in a call" in name else 1 if "step" in name else len(train)
        table.row(name, spread(1e3 * taken.wall), f"{count / np.median(taken.wall):,.0f}")


def chains(given: argparse.Namespace, report: Report) -> None:
    """Seconds of NUTS on a head, and what its certificate says."""
    base = base_of(given.size)
    train = rows_of(given.size, base.vocab_size)
    header = ("chains", "draws of each", "s", "gradients of the sampling", "divergent")
    table = report.table("NUTS on the rows of two labels", header)
    model = model_of(base, None, ["lm_head"])
    sizes = {"num_chains": 2, "num_warmup": given.draws, "num_draws": given.draws}
    with clock() as took:
        found = bl.sample_nuts(jax.random.key(3), model, train, **sizes)
    gradients, divergent = found.num_gradients["sampling"], int(found.stats["divergent"].sum())
    table.row(found.num_chains, given.draws, f"{took.wall:.1f}", f"{gradients:,}", divergent)


def options(parser: argparse.ArgumentParser) -> None:
    """Size, and how much of everything."""
    parser.add_argument("--size", choices=list(SHAPES), default="135M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--draws", type=int, default=100, help="draws and warm-up steps of each chain; 0 for none"
    )


def run(given: argparse.Namespace, report: Report) -> None:
    """All parts, one after the other."""
    device = jax.devices()[0]
    report.progress(f"{jax.device_count()} x {device.device_kind} ({device.platform}), JAX {jax.__version__}")
    kernels(report)
    if given.size != "tiny":
        kernel.measure(argparse.Namespace(**PRODUCTS, rounds=given.rounds), report)
    steps(given, report)
    if given.draws:
        chains(given, report)
