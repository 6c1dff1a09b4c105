"""A tangent posterior's predictions in forward passes, on SmolLM2-135M: python benchmarks/core_draws.py.

Rows that were never seen before are predicted with 16 draws: one forward pass, a backward pass for each
contrast through the layers above the lowest adapter, and a product for the draws. This is held against one
forward pass of the same rows by the network, through the same functions, in turns and compiled before.
"""

import argparse

import jax
from rich.console import Console
from rounds import in_turn, show

import bnlora as bl
from bnlora.data.assets import fetch_smollm2
from bnlora.infer.core.fit import SIZES
from bnlora.program.tangent.targets import SLOPE
from bnlora.testing import tiny_rows

QUIET = Console(quiet=True)
CASES = {
    "2 classes, two upper layers": (2, 2),
    "8 classes, two upper layers": (8, 2),
    "2 classes, all layers": (2, 30),
}


def measure(name: str, base: bl.Base, rounds: int, rows: int, length: int) -> None:
    """Print seconds and ratios of one case."""
    classes, layers = CASES[name]
    label_ids = tuple(range(100, 100 + classes))
    key, few = jax.random.key(0), {"length": length, "vocabulary": 49_152}
    train, new = tiny_rows(jax.random.key(1), 24, **few), tiny_rows(jax.random.key(2), rows, **few)
    size = dict(SIZES) if layers == 2 else 4
    frames = bl.frames(
        key, base, [*SIZES, SLOPE], train, label_ids=label_ids, size=size, layers=slice(-layers, None),
        source="random" if layers > 2 else "jacobian", console=QUIET,
    )  # fmt: skip
    network = bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=label_ids)
    gaussian = bl.laplace(bl.Tangent(network), train, console=QUIET)
    zero = jax.tree.map(lambda x: 0 * x[0], gaussian.draw_adapters(key, 1))
    point = bl.PointPosterior(network, zero)
    programs = {
        "one forward pass": lambda step: (
            bl.predict(key, point, new, num_draws=1, console=QUIET).draw_log_probs
        ),
        "16 draws, tangent": lambda step: (
            bl.predict(jax.random.key(step), gaussian, new, num_draws=16, console=QUIET).draw_log_probs
        ),
    }
    title = f"{name}: {rows} rows of up to {length} tokens, {frames.num_coordinates:,} coordinates"
    show(title, in_turn(programs, rounds), unit="prediction")


def main() -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=40)
    arguments = parser.parse_args()
    base = bl.load(fetch_smollm2())
    for name in CASES:
        measure(name, base, arguments.rounds, arguments.rows, arguments.length)


if __name__ == "__main__":
    main()
