"""Cost of a Bayesian step over a deterministic one on SmolLM2-135M: python benchmarks/step.py.

Both steps are compiled first and then run in turn, round by round in one process and in alternating order, so
that a machine whose speed drifts slows both. Reported are medians and the ratio round by round.
"""

import argparse
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import bnlora as bl
from bnlora.demo import RECIPE
from bnlora.display import Table
from bnlora.elbo import initial_parameters
from bnlora.svi import State, _by_group, _Loop
from bnlora.testing import tiny_rows


def loop_of(name: str, base: bl.Base, train: bl.Batch, particles: int) -> tuple[_Loop, State]:
    """The compiled step of plain LoRA ("none") or of the Bayesian fit, and its start."""
    model, guide = replace(RECIPE, prior=name).build(base, np.array([100, 200]))
    train = bl.cache_prefix(model, train)
    params, constrain = initial_parameters(jax.random.key(0), model, guide)
    optimizer = _by_group(params, optax.adam(1e-3), optax.adam(1e-3), 10.0)
    loop = _Loop(model, guide, train, constrain, optimizer, particles)
    return loop, State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def main() -> None:
    """Time both steps in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--particles", type=int, default=1)
    arguments = parser.parse_args()
    base = RECIPE.load_base()
    train = tiny_rows(jax.random.key(0), 4 * arguments.batch_size, length=arguments.length, vocabulary=49_152)
    loops = {name: loop_of(name, base, train, arguments.particles) for name in ("none", "sparse-gp")}
    states = {name: state for name, (_, state) in loops.items()}
    rows = np.arange(arguments.batch_size)
    for step in range(arguments.rounds + 2):
        for name in sorted(loops, reverse=bool(step % 2)):  # neither is always first
            states[name] = loops[name][0].run(states[name], jax.random.key(step), rows)
    seconds = {name: np.array([s["seconds"] for s in loop.steps[2:]]) for name, (loop, _) in loops.items()}
    ratio = seconds["sparse-gp"] / seconds["none"]
    low, high = np.quantile(ratio, [0.1, 0.9])
    counts = {n: sum(x.size for x in jax.tree.leaves(s.params)) for n, s in states.items()}
    table = [
        (n, f"{counts[n]:,}", f"{np.median(seconds[n]):.3f}", f"{seconds[n].min():.3f}") for n in seconds
    ]
    Console().print(Table(f"{arguments}", ("prior", "parameters", "median s", "least s"), tuple(table)))
    print(f"ratio round by round: median {np.median(ratio):.3f}, 10 % to 90 %: {low:.3f} to {high:.3f}")
    print(repr(loops["sparse-gp"][0].model.sites))


if __name__ == "__main__":
    main()
