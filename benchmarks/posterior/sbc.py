"""Which guides are calibrated? Simulation-based calibration on a tiny head.

The model is a random Llama with only its head adapted, at rank 1, so that importance resampling from the
prior gives the exact posterior. Truths are drawn from the prior and labels from the likelihood, and every
guide is fitted to every data set. The tables have one row for each inference, and one for each of its
functions, with p-values adjusted over the functions; "margins" is the smallest p-value of three margins.
`--folder` saves figures of the ranks, `sbc.png` and `vsbc.png`. To add a guide, add a line to `GUIDES`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import optax
from matplotlib.figure import Figure
from numpyro.infer.autoguide import AutoNormal

import bnlora as bl
from benchmarks.posterior.sbc_core import p_text
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora import guides, plots
from bnlora.assess import sbc
from bnlora.assess.sbc.calibration import Calibration
from bnlora.testing import frozen_scale, tiny_base, tiny_rows

SCALE = 1.5
PRIORS: dict[str, Callable[[], bl.priors.Prior]] = {
    "normal": partial(bl.priors.normal, scale=SCALE),
    "sparse_gp": partial(bl.priors.sparse_gp, rows=2, cols=4, scale=SCALE),
}


def of_family(family: guides.Family) -> Callable[..., guides.Guide]:
    """Function from a prior program to a guide with one family for every site."""
    return partial(guides.Guide, families=family, noise=guides.noise(lam_init=0.1))


# Functions from a prior program to a guide.
GUIDES: dict[str, Callable[..., Callable]] = {
    "AutoNormal": partial(AutoNormal, init_loc_fn=bl.guides.init_to_base, init_scale=0.1),
    "SiteFlow": partial(bl.guides.SiteFlow, init_scale=0.1, lam_init=0.1),
    "mean_field": of_family(guides.mean_field(init_scale=0.1)),
    "matrix_normal": of_family(guides.matrix_normal(init_scale=0.1)),
    "full": of_family(guides.full(init_scale=0.1)),
    "full, all": of_family(guides.full(init_scale=0.1, over="all")),
    "iaf, all": of_family(guides.iaf(init_scale=0.1, over="all")),
    "spline, all": of_family(guides.spline(init_scale=0.1, over="all")),
    "block_neural, all": of_family(guides.block_neural(init_scale=0.1, over="all")),
    "ensemble of 4": of_family(guides.ensemble(size=4, init_scale=0.1)),
    "frozen scale 0.1 (wrong)": partial(frozen_scale, scale=0.1),
}
EXACT = "importance (reference)"
NORM = "norm[lm_head]"
SHORT = (
    "inference",
    "log-likelihood: mean p, SBC p",
    "norm of the update: mean p, SBC p",
    "margins: SBC p",
    "s",
)
HEADER = ("inference", "function", "mean p", "spread", "SBC p", "VSBC p", "draws are")


def inference(name: str, model: bl.Classifier, arguments: argparse.Namespace) -> sbc.Inference:
    """Inference by name: the reference, or SVI with one of the guides."""
    if name == EXACT:
        return sbc.importance_inference(
            model, num_particles=arguments.particles, num_draws=arguments.draws, num_together=512
        )
    rate = optax.cosine_decay_schedule(arguments.rate, arguments.steps, alpha=0.05)
    return sbc.svi_inference(
        jax.random.key(arguments.seed + 1),
        model,
        GUIDES[name](model.prior),
        optax.adam(rate),
        num_steps=arguments.steps,
        num_draws=arguments.draws,
        num_particles=arguments.per_step,
    )


def short(name: str, result: Calibration, seconds: float) -> tuple[str, ...]:
    """Row of the short table for an inference."""
    means, adjusted = result.probabilities.mean(0), result.adjusted

    def both(function: str) -> str:
        k = result.names.index(function)
        return f"{means[k]:.3f}, {p_text(adjusted[k])}"

    margins = [p for n, p in zip(result.names, adjusted, strict=True) if n.startswith("margin")]
    cells = both("log_likelihood"), both(NORM), p_text(min(margins)), f"{seconds:.0f}"
    return (name, *cells)


def rows_of(name: str, result: Calibration) -> list[tuple[str, ...]]:
    """Rows of an inference, one for each function; p-values are adjusted over the functions."""
    lines = []
    for k, row in enumerate(result.table.rows):
        function, mean, spread, _, uniform, _, symmetric, direction = row
        lost = f", {int(result.failed.sum())} failed" if result.failed.any() and k == 0 else ""
        lines.append((name if k == 0 else "", function, mean, spread, uniform, symmetric, direction + lost))
    return lines


def picture(draw: Callable, results: dict[tuple[str, str], Calibration], path: Path) -> None:
    """A figure with one row of panels for each inference; the panels of a row share their scale."""
    height, width = len(results), len(next(iter(results.values())).names)
    figure = Figure(figsize=(2.4 * width, 1.9 * height + 0.5), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False, sharey="row", sharex=True)
    for axes, ((prior, name), result) in zip(grid, results.items(), strict=True):
        draw(result, ax=axes)
        axes[0].set_ylabel(f"{name},\n{prior} prior\n{axes[0].get_ylabel()}", fontsize=8)
        for panel in axes[1:]:
            panel.set_ylabel("")
    for panel in grid[:-1].ravel():
        panel.set_xlabel("")
    lines = next(iter(results.values())).num_draws, len(next(iter(results.values())).failed)
    text = (
        "L = {} draws in each of {} simulations. Orange: the test of the picture rejects. p: by Holm's rule."
    )
    figure.supxlabel(text.format(*lines), fontsize=9)
    figure.savefig(path, dpi=90)


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes, priors and inferences."""
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--per-step", type=int, default=1, help="guide draws averaged in a step")
    parser.add_argument("--draws", type=int, default=63)
    parser.add_argument("--particles", type=int, default=16384)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder of sbc.png and vsbc.png; no figures by default")
    parser.add_argument(
        "--priors", nargs="*", default=list(PRIORS), choices=list(PRIORS), help="names of priors"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[EXACT, *GUIDES],
        choices=[EXACT, *GUIDES],
        metavar="INFERENCE",
        help="names of inferences",
    )


def run(given: argparse.Namespace, report: Report) -> None:
    """Calibrate every guide under every prior."""
    base = tiny_base(jax.random.key(1), num_layers=2)
    rows, sites = tiny_rows(jax.random.key(2), given.rows), bl.select(base, ["lm_head"], rank=1)
    results, lines = {}, {}
    for prior in given.priors:
        model = bl.Classifier(base, sites, PRIORS[prior](), label_ids=(3, 5))
        table, lines[prior] = report.table(prior, SHORT), []
        for name in given.only:
            key = jax.random.key(given.seed)
            with clock() as took:
                made = inference(name, model, given)
                result = sbc.run(key, model, made, rows, num_simulations=given.simulations)
            table.row(*short(name, result, took.wall))
            lines[prior] += rows_of(name, result)
            results[prior, name] = result
            report.progress(f"{prior}, {name}: {result.verdict}")
    for prior, found in lines.items():
        table = report.table(f"{prior}, each function", HEADER)
        for cells in found:
            table.row(*cells)
    if given.folder is not None:
        for name, draw in (("sbc", plots.sbc), ("vsbc", plots.vsbc)):
            picture(draw, results, given.folder / f"{name}.png")
