"""Many draws of a tangent posterior over one forward pass, on SmolLM2-135M.

New rows are predicted with 16 draws: one forward pass, a backward pass for each contrast through the layers
above the lowest adapter, and one product for all draws. This is compared with one forward pass of the same
rows by the network, through the same functions, in alternation, without compile time.
"""

import argparse

import jax
from rich.console import Console

import bnlora as bl
from benchmarks.report import Report
from benchmarks.timing import in_turn, spread
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


def measure(name: str, base: bl.Base, rounds: int, rows: int, length: int) -> tuple[str, ...]:
    """Number of coordinates of one case, and ratios in wall-clock and CPU seconds."""
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
    first, draws = in_turn(programs, rounds).values()
    return f"{frames.num_coordinates:,}", spread(draws.wall / first.wall), spread(draws.cpu / first.cpu)


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=40, help="longest row in tokens")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, help="names of cases")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each case."""
    header = ("case", "coordinates", "over one forward pass", "in CPU seconds")
    table, base = report.table("16 draws of a tangent posterior", header), bl.load(fetch_smollm2())
    for name in given.only:
        table.row(name, *measure(name, base, given.rounds, given.rows, given.length))
