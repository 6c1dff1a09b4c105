"""Certificates of the reference chains of `posteriors`, and how they were sampled."""

import argparse
from pathlib import Path

import numpy as np

import bnlora as bl
from benchmarks.heads import HEADS
from benchmarks.report import Report

FOLDER = Path(__file__).parents[1] / "references"
HEADER = ("reference", "draws", "s", "worst R-hat", "least ESS (bulk, tail)", "divergences", "least E-BFMI",
          "worst lag-1 autocorrelation")  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """References."""
    parser.add_argument("--heads", nargs="*", default=list(HEADS), choices=list(HEADS), help="names of heads")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each reference, from its record."""
    table = report.table("References", HEADER)
    for name in given.heads:
        stored = bl.load_reference(FOLDER / name)
        certificate, plan = stored.certificate, stored.record["plan"]
        table.row(
            name,
            f"{plan['num_chains']} x {plan['num_draws']:,}, every {plan['thinning']}",
            f"{stored.record['seconds']:,.0f}",
            f"{max(certificate.rhat):.4f}",
            f"{min(certificate.ess_bulk):,.0f}, {min(certificate.ess_tail):,.0f}",
            certificate.divergences,
            f"{min(certificate.bfmi):.2f}",
            f"{np.max(certificate.autocorrelation):.3f}",
        )
