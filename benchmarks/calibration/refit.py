"""How far a refit from a summary of the earlier rows is from a fit of all rows.

The labelled rows of the demonstration come in parts. Frames and scales are those of the first half. "Summary"
fits the second half with the Gaussian posterior of the first as its prior; "four parts" does so for each
quarter of the rows, three times. Both never see earlier rows again. The distance of predictions is the mean
total variation to the refit that keeps all rows.
"""

import argparse
from collections import defaultdict

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.cells.tasks import LAYERS, Rows, film_reviews
from benchmarks.report import Report

QUIET = Console(quiet=True)
KEPT = "all rows kept"
DRAWS = 64


def posteriors(seed: int, found: Rows) -> dict[str, bl.CoreFit]:
    """All fits of one seed, by name."""
    key, train = jax.random.key(seed), found.train
    half = len(train) // 2
    start = bl.fit_core(key, found.base, train[:half], likelihood=found.likelihood, console=QUIET)
    fits = {"first half": start}
    train = bl.cache_prefix(start.model, train, console=QUIET)  # all fits have its features
    first, second = train[:half], train[half:]
    fits[KEPT] = bl.refit(key, start, second, kept=first, console=QUIET)
    fits["summary"] = bl.refit(key, start, second, console=QUIET)
    fits["summary, half of it forgotten"] = bl.refit(key, start, second, keep=0.5, console=QUIET)
    fits["second half only"] = bl.refit(key, start, second, keep=0.0, console=QUIET)
    quarter = len(train) // 4
    parts = bl.refit(key, start, train[:quarter], keep=0.0, console=QUIET)  # the same frames and scales
    for begin in range(quarter, len(train), quarter):
        parts = bl.refit(key, parts, train[begin : begin + quarter], console=QUIET)
    fits["summaries of four parts"] = parts
    return fits


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, from 3 on")
    parser.add_argument("--rows", type=int, default=560, help="labelled rows")
    parser.add_argument("--test", type=int, default=500, help="test rows of each domain")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each posterior, as means over the seeds, with the smallest and largest distance."""
    domains = ["movies", "tweets"]
    values = defaultdict(list)
    for seed in range(3, 3 + given.seeds):
        found = film_reviews(given.rows, seed, LAYERS, rows=given.test)
        fits = posteriors(seed, found)
        for domain in domains:
            rows = bl.cache_prefix(fits[KEPT].model, found.tests[domain], console=QUIET)
            predicted = {
                name: bl.predict(jax.random.key(1), fit, rows, num_draws=DRAWS, console=QUIET)
                for name, fit in fits.items()
            }
            for name, prediction in predicted.items():
                apart = 0.5 * np.abs(prediction.probs - predicted[KEPT].probs).sum(1).mean()
                values[name, domain].append((bl.metrics.nll(prediction.log_probs, rows.labels), apart))
        report.progress(f"seed {seed} is done")
    header = ("posterior", *(f"{d}: {what}" for d in domains for what in ("NLL", "distance")))
    table = report.table("Refits", header)
    for name in fits:
        cells = []
        for domain in domains:
            nll, apart = np.transpose(values[name, domain])
            spread = "" if name == KEPT else f"{apart.mean():.4f} ({apart.min():.4f} to {apart.max():.4f})"
            cells += [f"{nll.mean():.3f}", spread]
        table.row(name, *cells)
