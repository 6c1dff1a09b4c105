"""Gain of running the last layer only at the last token, on SmolLM2-135M.

The gradient of the log-likelihood with respect to the adapters, from cached activations, is compared with
that of the same classifier whose last layer runs at all positions. Both are compiled first and then
alternate in one process.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp

import bnlora as bl
from benchmarks.report import Report
from benchmarks.timing import clock, in_turn, show
from bnlora.adapters.sites import HEAD
from bnlora.data.assets import fetch_smollm2
from bnlora.testing import tiny_rows

PLACES = {
    "q_proj, k_proj of two layers, lm_head": (["q_proj", "k_proj", HEAD], slice(-2, None)),
    "q_proj of the last layer": (["q_proj"], [-1]),
}


def logits_of_all_positions(model: bl.Classifier, params, adapters, batch: bl.Batch) -> jax.Array:
    """The classifier's logits, selected at the end from those of all positions."""
    placed, module = model.sites.place(adapters), model.base.bind(params)
    head = placed.pop(HEAD, None)
    layers = {"first_layer": model.sites.first_layer, "stop": model.base.num_layers, "adapters": placed}
    top = module.blocks(batch.cached.hidden, batch.mask, **layers)
    final = jnp.take_along_axis(top, batch.last[:, None, None], axis=1)[:, 0]
    return module.head(final, rows=jnp.asarray(model.label_ids), adapter=head)


def gradient_of(logits: Callable) -> Callable:
    """The compiled gradient of the log-likelihood with respect to the adapters."""

    def log_likelihood(adapters, params, batch):
        log_probs = jax.nn.log_softmax(logits(params, adapters, batch))
        return jnp.take_along_axis(log_probs, batch.labels[:, None], axis=1).sum()

    return jax.jit(jax.grad(log_likelihood))


def measure(base: bl.Base, name: str, given: argparse.Namespace, report: Report) -> None:
    """Time both gradients in alternation, for one choice of modules."""
    targets, layers = PLACES[name]
    sites = bl.select(base, targets, rank=8, layers=layers)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(100, 200))
    batch = tiny_rows(jax.random.key(0), given.rows, length=given.length, vocabulary=49_152)
    batch = bl.cache_prefix(model, batch)
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(model.sites)))
    adapters = {
        n: {f: 0.02 * jax.random.normal(next(keys), shape) for f, shape in site.shapes.items()}
        for n, site in model.sites.items()
    }
    gradients = {
        "at all tokens": gradient_of(lambda *inputs: logits_of_all_positions(model, *inputs)),
        "at the last token": gradient_of(model.logits),
    }
    first = {}
    for which, gradient in gradients.items():
        with clock() as took:
            jax.block_until_ready(gradient(adapters, base.weights, batch))
        first[which] = f"{took.wall:.1f} s {which}"
    programs = {which: lambda _, f=f: f(adapters, base.weights, batch) for which, f in gradients.items()}
    show(report, name, in_turn(programs, given.rounds, warm_up=1), unit="gradient")
    report.text(name, f"The first call, compiling included, took {' and '.join(first.values())}.")


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")


def run(given: argparse.Namespace, report: Report) -> None:
    """Measure every choice of modules."""
    base = bl.load(fetch_smollm2())
    for name in PLACES:
        measure(base, name, given, report)
