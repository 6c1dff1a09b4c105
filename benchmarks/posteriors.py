"""How far is every guide from the exact posterior of a small head? python benchmarks/posteriors.py.

The references are NUTS chains with a certificate, kept in `references/` as values of identifiable functions
and predictions; `--sample` makes them anew. Every posterior is fitted to the same rows with the same number
of full-batch steps and compared by `bl.compare`. Lines: mean absolute error of the means in units of the
reference's standard deviation, median ratio of standard deviations, sliced Wasserstein-2 with its null level,
mean total variation of predictions with its null level, k-hat, bound, seconds, parameters.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from heads import HEADS, smollm2
from numpyro.infer.autoguide import AutoNormal
from rich.console import Console

import bnlora as bl
from bnlora import guides
from bnlora._util.display import Table
from bnlora.infer import approximate as inference

FOLDER = Path(__file__).parent / "references"
QUIET = Console(quiet=True)
MAP = "point (MAP)"
HEADER = (
    "head",
    "posterior",
    "means",
    "spread",
    "W2",
    "null",
    "TV",
    "null",
    "k-hat",
    "bound",
    "s",
    "parameters",
)
# Thinning until neighbours are nearly uncorrelated; trajectories of queries take their limit of gradients.
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
# Of the same transitions half as many draws are kept: every fourth had a lag-1 autocorrelation of 0.055.
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
# From a prior program to a guide.
GUIDES: dict[str, Callable[[Any], Callable]] = {
    "AutoNormal": partial(AutoNormal, init_loc_fn=guides.init_to_base, init_scale=0.01),
    "SiteFlow": guides.SiteFlow,
    **{name: partial(guides.Guide, families=family) for name, family in FAMILIES.items()},
}


def fitted(name: str, model: bl.Classifier, train: bl.Batch, steps: int, seed: int) -> bl.Fit:
    """A guide after full-batch SVI."""
    rate = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    scales = optax.adam(optax.cosine_decay_schedule(3e-2, steps))
    return bl.fit(
        jax.random.key(seed),
        model,
        GUIDES[name](model.prior),
        train,
        rate,
        scale_optimizer=scales,
        num_steps=steps,
        batch_size=len(train),
        console=QUIET,
    )


def row(head: str, name: str, found: bl.Comparison, bound: str, seconds: float, size: str) -> tuple[str, ...]:
    """One line of the table."""
    if found.predictive is None:
        raise ValueError("a line of the table needs predictions")
    k = "" if found.khat is None else f"{found.khat.value:.2f}"
    return (
        head,
        name,
        f"{np.abs(found.moments.shift).mean():.2f}",
        f"{np.median(found.moments.ratio):.2f}",
        f"{found.transport.sliced:.3f}",
        f"{found.transport.sliced_null:.3f}",
        f"{found.predictive.total_variation.mean():.4f}",
        f"{found.predictive.total_variation_null.mean():.4f}",
        k,
        bound,
        f"{seconds:.0f}",
        size,
    )


def sample(name: str, base: bl.Base, seed: int, folder: Path | None) -> None:
    """Make the reference of a head anew, and keep it if its certificate passed."""
    model, train, others = HEADS[name].load(base)
    pieces = None if folder is None else folder / name
    queries = {1: QUERIES, 2: QUERIES_OF_RANK_2}
    options = queries[HEADS[name].rank] if HEADS[name].module == "q_proj" else OUTPUT_ROWS
    chains = bl.sample_nuts(jax.random.key(seed), model, train, folder=pieces, **options)
    print(chains, chains.certificate, sep="\n", flush=True)
    if not chains.certificate.passed:
        raise SystemExit(f"the reference of {name} was not kept: {chains.certificate.verdict}")
    bl.save_reference(bl.store_reference(chains, others), FOLDER / name)


def compared(name: str, base: bl.Base, arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """The lines of a head."""
    model, train, others = HEADS[name].load(base)
    train = bl.cache_prefix(model, train, console=QUIET)
    reference, lines = bl.load_reference(FOLDER / name), []
    key = jax.random.key(arguments.seed + 1)
    for guide in arguments.only:
        began = time.perf_counter()
        fit = fitted(guide, model, train, arguments.steps, arguments.seed)
        seconds = time.perf_counter() - began
        found = bl.compare(key, fit, reference, others, num_draws=400, console=QUIET)
        bound = "" if "not a bound" in repr(fit.guide) else f"{fit.history['elbo'][-50:].mean():.1f}"
        lines.append(row(name, guide, found, bound, seconds, f"{fit.num_parameters:,}"))
        print(name, guide, found.verdict, sep=": ", flush=True)
        if guide == MAP:
            lines += around(name, fit, reference, train, others, key)
    return lines


def around(name: str, fit: bl.Fit, reference: Any, train: bl.Batch, others: bl.Batch, key: jax.Array) -> list:
    """Laplace's method at the mode, with the two structures that such sizes allow."""
    lines = []
    for structure in ("diagonal", "kronecker"):
        began = time.perf_counter()
        made = inference.laplace(fit, train, structure=structure)
        seconds = time.perf_counter() - began
        found = bl.compare(key, made, reference, others, num_draws=400, console=QUIET)
        lines.append(row(name, f"Laplace, {structure}", found, "", seconds, ""))
    return lines


def main() -> None:
    """Make references, or compare every guide with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="make the references instead")
    parser.add_argument("--folder", type=Path, help="where chains are kept, to go on after an interrupt")
    parser.add_argument("--heads", nargs="*", default=list(HEADS), help="names of heads")
    parser.add_argument("--only", nargs="*", default=list(GUIDES), help="names of guides")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base, lines = smollm2(), []
    for name in arguments.heads:
        if arguments.sample:
            sample(name, base, arguments.seed, arguments.folder)
        else:
            lines += compared(name, base, arguments)
    if lines:
        Console(width=150).print(Table(f"{arguments}", HEADER, tuple(lines)))


if __name__ == "__main__":
    main()
