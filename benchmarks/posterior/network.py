"""The network under the core prior against its tangent model.

For each development seed, the core prior is fitted to 560 labelled movie sentences on the tangent model. The
network then gets the same prior at several multiples of these scales, and a mean-field guide that starts at
the prior, where its KL divergence is zero. The multiple with the highest bound of the network on all labelled
rows is chosen; test rows are not used. The table has bound, NLL and debiased ECE of both models, by domain.
"""

import argparse

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.core_network import bound_of, network_fit
from benchmarks.data import Pool, drawn, pool
from benchmarks.report import Report, Table
from benchmarks.timing import clock
from bnlora.data.assets import DOMAINS
from bnlora.infer.core.fit import fit_core

QUIET = Console(quiet=True)
FACTORS = (0.03, 0.1, 0.2)
STEPS = 400


def scores(key: jax.Array, posterior: object, tests: dict[str, bl.Batch], draws: int) -> list[str]:
    """NLL and debiased ECE by domain and their mean, as cells of a table."""
    cells = []
    for rows in tests.values():
        log_probs = bl.predict(key, posterior, rows, num_draws=draws, console=QUIET).log_probs
        labels = np.asarray(rows.labels)
        cells.append([bl.metrics.nll(log_probs, labels), bl.metrics.debiased_ece(log_probs, labels)])
    cells.append(list(np.mean(cells, axis=0)))
    return [" / ".join(f"{x:.3f}" for x in pair) for pair in cells]


def run_seed(table: Table, seed: int, found: Pool, num_test: int, draws: int) -> None:
    """The rows of one seed."""
    base, label_ids = found.base, found.label_ids
    words = bl.likelihoods.Words(label_ids)
    train, tests = drawn(found, seed, test=num_test)
    key, fit_key, bound_key, draw_key = jax.random.split(jax.random.key(seed), 4)
    with clock() as took:
        core = fit_core(key, base, train, label_ids=label_ids, console=QUIET)
    bound = core.fit.history["elbo"][-20:]
    text = f"{bound.mean():.1f} ({bound.std() / 20**0.5:.1f})"
    table.row(seed, "tangent", 1, text, f"{took.wall:.0f}", *scores(draw_key, core, tests, draws))
    best = None
    for factor in FACTORS:
        with clock() as took:
            fit = network_fit(fit_key, core, base, train, words, multiple=factor, num_steps=STEPS)
        value, stderr = bound_of(bound_key, fit, train, num_draws=16)
        empty = [""] * (len(DOMAINS) + 1)
        table.row(seed, "network", factor, f"{value:.1f} ({stderr:.1f})", f"{took.wall:.0f}", *empty)
        if best is None or value > best[0]:
            best = value, factor, fit
    _, factor, fit = best
    table.row(seed, "network, best bound", factor, "", "", *scores(draw_key, fit, tests, draws))


def options(parser: argparse.ArgumentParser) -> None:
    """Seeds and sizes."""
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--test", type=int, default=500, help="test rows of each domain")
    parser.add_argument("--draws", type=int, default=16)


def run(given: argparse.Namespace, report: Report) -> None:
    """A table of seed, model, multiple of the scales, bound, seconds, and NLL / debiased ECE by domain."""
    found = pool(console=QUIET)
    header = ("seed", "model", "multiple", "bound (standard error)", "s", *DOMAINS, "mean")
    table = report.table("The network and its tangent model", header)
    for seed in given.seeds:
        run_seed(table, seed, found, given.test, given.draws)
