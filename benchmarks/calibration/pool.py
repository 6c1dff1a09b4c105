"""Compute the activations of the rows of other benchmarks, and cache them on disk (4.3 GB)."""

import argparse

from rich.console import Console

from benchmarks.data import pool
from benchmarks.report import Report
from bnlora.data.assets import DOMAINS


def options(parser: argparse.ArgumentParser) -> None:
    """Domains."""
    parser.add_argument("--domains", nargs="*", choices=DOMAINS, default=list(DOMAINS))


def run(given: argparse.Namespace, report: Report) -> None:
    """Compute the activations that are not on disk yet, and count the rows."""
    table = report.table("Rows on the disk", ("domain", "rows", "longest, in tokens"))
    for name, batch in pool(given.domains, console=Console(stderr=True)).rows.items():
        table.row(name, f"{len(batch):,}", batch.tokens.shape[1])
