"""Gain of running the last layer at the last token alone, on SmolLM2-135M: python benchmarks/last_query.py.

The gradient of the log-likelihood with respect to the adapters, from cached activations, is compared with
that of the same classifier whose last layer runs at all positions. Both are compiled first and then run in
turn, round by round in one process and in alternating order. Reported are medians and the ratio by round.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rounds import in_turn, spread

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.data.assets import fetch_smollm2
from bnlora.testing import tiny_rows

PLACES = {
    "q_proj, k_proj of two layers, lm_head": (["q_proj", "k_proj", HEAD], slice(-2, None)),
    "q_proj of the last layer": (["q_proj"], [-1]),
}


def logits_of_all_positions(model: bl.Classifier, params, adapters, batch: bl.Batch) -> jax.Array:
    """The classifier's logits, picked out of all positions at the end."""
    placed, module = model.sites.place(adapters), model.base.bind(params)
    head = placed.pop(HEAD, None)
    layers = {"start": model.sites.start, "stop": model.base.num_layers, "adapters": placed}
    top = module.blocks(batch.hidden, batch.mask, **layers)
    final = jnp.take_along_axis(top, batch.last[:, None, None], axis=1)[:, 0]
    return module.head(final, rows=jnp.asarray(model.label_ids), adapter=head)


def gradient_of(logits: Callable) -> Callable:
    """The compiled gradient of the log-likelihood with respect to the adapters."""

    def log_likelihood(adapters, params, batch):
        log_probs = jax.nn.log_softmax(logits(params, adapters, batch))
        return jnp.take_along_axis(log_probs, batch.labels[:, None], axis=1).sum()

    return jax.jit(jax.grad(log_likelihood))


def seconds(function: Callable, *arguments) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def measure(base: bl.Base, name: str, arguments: argparse.Namespace) -> None:
    """Time both gradients in turn for one choice of modules and print them."""
    targets, layers = PLACES[name]
    sites = bl.select(base, targets, rank=8, layers=layers)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(100, 200))
    batch = tiny_rows(jax.random.key(0), arguments.rows, length=arguments.length, vocabulary=49_152)
    batch = bl.cache_prefix(model, batch)
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(model.sites)))
    adapters = {
        n: {f: 0.02 * jax.random.normal(next(keys), shape) for f, shape in site.shapes.items()}
        for n, site in model.sites.items()
    }
    gradients = {
        "last": gradient_of(model.logits),
        "all": gradient_of(lambda *given: logits_of_all_positions(model, *given)),
    }
    first = {which: seconds(f, adapters, base.weights, batch) for which, f in gradients.items()}
    programs = {which: lambda _, f=f: f(adapters, base.weights, batch) for which, f in gradients.items()}
    last, everywhere = (taken.wall for taken in in_turn(programs, arguments.rounds, warm_up=1).values())
    print(f"{name}: last over all {spread(last / everywhere)}, the middle 80 % of rounds in brackets")
    print(f"  median {np.median(last):.4f} s and {np.median(everywhere):.4f} s; ", end="")
    print(f"first call {first['last']:.1f} s and {first['all']:.1f} s", flush=True)


def main() -> None:
    """Measure every choice of modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    arguments = parser.parse_args()
    base = bl.load(fetch_smollm2())
    for name in PLACES:
        measure(base, name, arguments)


if __name__ == "__main__":
    main()
