"""How soon the result of `bl.explore` follows a change, on SmolLM2-135M.

The default frames of `bl.fit_core` on 560 labelled movie sentences, and 320 others for validation. Every kind
of change is timed from the settings to the finished page: evidence, posterior, predictions, scores, tables
and pictures. The first change of a session compiles two programs and is shown apart.
"""

import argparse
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.data import LABELLED
from benchmarks.report import Report
from benchmarks.timing import clock, in_turn, spread
from bnlora.app.demo import RECIPE
from bnlora.data.assets import vader_splits
from bnlora.infer.core.fit import SIZES
from bnlora.program.tangent.targets import SLOPE

QUIET = Console(quiet=True)
TITLE = "Seconds until the page of a changed prior is there"


def explorer_of(labelled: int, validation: int) -> bl.Explorer:
    """The explorer of the demonstration's sentences."""
    base = RECIPE.load_base()
    splits = vader_splits(seed=0, train=labelled, validation=validation, test=1)
    data = RECIPE.read({n: splits[n] for n in ("train", "validation")}, base, text="text", label="label")
    frames = bl.frames(
        jax.random.key(0), base, [*SIZES, SLOPE], data["train"], label_ids=data.label_ids,
        size=dict(SIZES), layers=slice(-2, None), console=QUIET,
    )  # fmt: skip
    network = bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=data.label_ids)
    return bl.explore(bl.Tangent(network), data["train"], data["validation"], console=QUIET)


def changes(explorer: bl.Explorer) -> dict[str, Callable[[int], str]]:
    """Kinds of changes; the number of the round chooses the value, so that no two are the same."""
    total, families = len(explorer.train), list(explorer.start.scales)

    def factor(step: int) -> float:
        return 1.07**step

    return {
        "a scale": lambda step: explorer.at(scales={"v_proj": 0.5 * factor(step)}).html(),
        "all scales": lambda step: explorer.at(scales=dict.fromkeys(families, factor(step))).html(),
        "a layer off": lambda step: explorer.at(
            layers=explorer.start.layers[1:], scales={"v_proj": factor(step)}
        ).html(),
        "rows in use": lambda step: explorer.at(rows=total // 2 + step).html(),
        "scales by evidence, half-normal law": lambda step: explorer.at(
            law="half-normal", width=3.0 * factor(step)
        ).html(),
    }


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--labelled", type=int, default=LABELLED, help="labelled sentences")
    parser.add_argument("--validation", type=int, default=320, help="sentences for validation")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each kind of change."""
    explorer = explorer_of(given.labelled, given.validation)
    with clock() as first:
        explorer.at().html()
    with clock() as chosen:
        explorer.at(law="half-normal").html()
    coordinates = explorer.tangent.frames.num_coordinates
    table = report.table(TITLE, ("change", "s", "largest", "CPU s"))
    for name, times in in_turn(changes(explorer), given.rounds).items():
        table.row(name, spread(times.wall), f"{times.wall.max():.2f}", f"{np.median(times.cpu):.2f}")
    report.text(
        TITLE,
        f"Medians and the middle 80 % of {given.rounds} rounds. {given.labelled} training rows, "
        f"{given.validation} validation rows, {coordinates:,} coordinates. The first result of a session "
        f"takes {first.wall:.1f} s, the first scales by evidence {chosen.wall:.1f} s: they compile.",
    )
