"""How far is each guide from the exact posterior of a small head?

The references are NUTS chains with a certificate, stored in `references/` as values of identifiable functions
and predictions; `--sample` samples them again. Every posterior is fitted to the same rows with the same
number of full-batch steps and compared by `bl.compare`. Columns: mean absolute error of the means in standard
deviations of the reference, median ratio of standard deviations, sliced Wasserstein-2 distance and mean total
variation of predictions (both with the null level in brackets), k-hat, bound, seconds, number of parameters.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from numpyro.infer.autoguide import AutoNormal
from rich.console import Console

import bnlora as bl
from benchmarks.heads import HEADS, smollm2
from benchmarks.report import Report, Table
from benchmarks.timing import clock
from bnlora import guides
from bnlora.infer import approximate as inference

FOLDER = Path(__file__).parents[1] / "references"
QUIET = Console(quiet=True)
MAP = "point (MAP)"
HEADER = ("posterior", "means", "spread", "W2 (null)", "TV (null)", "k-hat", "bound", "s", "parameters")
# Thinning until neighbours are nearly uncorrelated; trajectories of queries reach their limit of gradients.
OUTPUT_ROWS = {
    "num_warmup": 1000,
    "num_draws": 1000,
    "piece": 100,
    "thinning": 6,
    "target_acceptance": 0.99,
}
QUERIES = {
    "num_warmup": 300,
    "num_draws": 500,
    "piece": 100,
    "thinning": 4,
    "target_acceptance": 0.9,
    "max_doublings": 6,
    "initial_step_size": 0.3,
}
# Half as many draws of the same transitions: with every fourth, the lag-1 autocorrelation was 0.055.
QUERIES_OF_RANK_2 = QUERIES | {"num_draws": 250, "piece": 50, "thinning": 8}


FAMILIES: dict[str, guides.Family | dict[str, guides.Family]] = {
    "mean field": guides.mean_field(),
    "BLoB (points for B)": {r".*\.a": guides.blob(), r".*\.b": guides.delta()},
    "matrix normal": guides.matrix_normal(),
    "full": guides.full(),
    "low rank 8, A tied to B": guides.low_rank(rank=8, over="all"),
    "row-shared flow": guides.row_shared(),
    "IAF": guides.iaf(hidden=16),
    "spline": guides.spline(hidden=16),
    "ensemble of 4": guides.ensemble(size=4),
    "MC dropout": {r".*\.a": guides.dropout(), r".*\.b": guides.delta()},
    MAP: guides.delta(),
}
# Functions from a prior program to a guide.
GUIDES: dict[str, Callable[[Any], Callable]] = {
    "AutoNormal": partial(AutoNormal, init_loc_fn=guides.init_to_base, init_scale=0.01),
    "SiteFlow": guides.SiteFlow,
    **{name: partial(guides.Guide, families=family) for name, family in FAMILIES.items()},
}


def fitted(name: str, model: bl.Classifier, train: bl.Batch, steps: int, seed: int) -> bl.Fit:
    """Fit a guide by full-batch SVI."""
    rate = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    scales = optax.adam(optax.cosine_decay_schedule(3e-2, steps))
    return bl.fit(
        jax.random.key(seed),
        model,
        GUIDES[name](model.prior),
        train,
        rate,
        optimisation=bl.Optimisation(scale_optimizer=scales),
        num_steps=steps,
        batch_size=len(train),
        console=QUIET,
    )


def cells_of(comparison: bl.Comparison) -> tuple[str, ...]:
    """Cells of the columns of a comparison."""
    moments, transport, predictive = comparison.moments, comparison.transport, comparison.predictive
    if predictive is None:
        raise ValueError("a row of the table needs predictions; got a comparison without them")
    distance, null = predictive.total_variation.mean(), predictive.total_variation_null.mean()
    return (
        f"{np.abs(moments.shift).mean():.2f}",
        f"{np.median(moments.ratio):.2f}",
        f"{transport.sliced:.3f} ({transport.sliced_null:.3f})",
        f"{distance:.4f} ({null:.4f})",
        "" if comparison.khat is None else f"{comparison.khat.value:.2f}",
    )


def sample(name: str, base: bl.Base, seed: int, folder: Path | None) -> None:
    """Sample the reference of a head again, and store it if it passes its checks."""
    model, train, others = HEADS[name].load(base)
    pieces = None if folder is None else folder / name
    queries = {1: QUERIES, 2: QUERIES_OF_RANK_2}
    options = queries[HEADS[name].rank] if HEADS[name].module == "q_proj" else OUTPUT_ROWS
    chains = bl.sample_nuts(jax.random.key(seed), model, train, folder=pieces, **options)
    print(chains, chains.certificate, sep="\n", flush=True)
    if not chains.certificate.passed:
        raise SystemExit(f"the reference of {name} was not stored: {chains.certificate.verdict}")
    bl.save_reference(bl.store_reference(chains, others), FOLDER / name)


def compared(report: Report, name: str, base: bl.Base, given: argparse.Namespace) -> None:
    """The table of a head."""
    model, train, others = HEADS[name].load(base)
    train = bl.cache_prefix(model, train, console=QUIET)
    reference, key = bl.load_reference(FOLDER / name), jax.random.key(given.seed + 1)
    table = report.table(name, HEADER)
    for guide in given.only:
        with clock() as took:
            fit = fitted(guide, model, train, given.steps, given.seed)
        comparison = bl.compare(key, fit, reference, others, num_draws=400, console=QUIET)
        bound = (
            "" if not getattr(fit.guide, "has_density", True) else f"{fit.history['elbo'][-50:].mean():.1f}"
        )
        size = f"{sum(x.size for x in jax.tree.leaves(fit.params)):,}"
        table.row(guide, *cells_of(comparison), bound, f"{took.wall:.0f}", size)
        report.progress(f"{guide}: {comparison.verdict}")
        if guide == MAP:
            around(table, fit, reference, train, others, key)


def around(
    table: Table, fit: bl.Fit, reference: Any, train: bl.Batch, others: bl.Batch, key: jax.Array
) -> None:
    """Laplace's method at the mode, with the two covariance structures that are feasible at these sizes."""
    for structure in ("diagonal", "kronecker"):
        with clock() as took:
            made = inference.laplace(fit, train, structure=structure)
        comparison = bl.compare(key, made, reference, others, num_draws=400, console=QUIET)
        table.row(f"Laplace, {structure}", *cells_of(comparison), "", f"{took.wall:.0f}", "")


def options(parser: argparse.ArgumentParser) -> None:
    """Heads, guides and sizes."""
    parser.add_argument("--heads", nargs="*", default=list(HEADS), choices=list(HEADS), help="names of heads")
    parser.add_argument(
        "--only", nargs="*", default=list(GUIDES), choices=list(GUIDES), help="names of guides"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", action="store_true", help="sample the references instead")
    parser.add_argument("--folder", type=Path, help="folder of the chains, to continue after an interrupt")


def run(given: argparse.Namespace, report: Report) -> None:
    """Sample references, or compare every guide with them."""
    base = smollm2()
    for name in given.heads:
        if given.sample:
            sample(name, base, given.seed, given.folder)
        else:
            compared(report, name, base, given)
