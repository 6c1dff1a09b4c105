"""NUTS on the network, for its last layer.

The core prior is on v_proj of the last layer, at multiples of the scale chosen by the evidence of the tangent
model. NUTS samples the posterior of the tangent model and that of the network, with the same rows and scale.
Each row states whether the chains are certified, and how much the contrasts of test sentences differ. At
small scales the two models agree. The network takes minutes, the tangent model seconds.
"""

import argparse

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.data import drawn, pool
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.data.assets import DOMAINS
from bnlora.infer.core.fit import fit_core

QUIET = Console(quiet=True)
FAMILY = "v_proj"
OPTIONS = {"target_acceptance": 0.8, "max_doublings": 6, "console": QUIET}


def contrasts(posterior, rows: bl.Batch, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of test rows, shape (draw, row), and log-probabilities of their mixture."""
    found = bl.predict(jax.random.key(2), posterior, rows, num_draws=draws, console=QUIET)
    samples = np.asarray(found.draw_log_probs, np.float64)
    return samples[..., 1] - samples[..., 0], found.log_probs


def cells_of(
    chains: bl.Chains, seconds: float, tests: dict[str, bl.Batch], reference: dict, draws: int
) -> tuple[str, ...]:
    """Cells of a row; `reference` contains the contrasts of the tangent model, or gets them here."""
    sds, gaps, losses = [], [], []
    for domain, batch in tests.items():
        found, log_probs = contrasts(chains, batch, draws)
        known = reference.setdefault(domain, found)
        sds.append(found.std(0) / known.std(0))
        gaps.append(np.abs(found.mean(0) - known.mean(0)) / known.std(0))
        losses.append(bl.metrics.nll(log_probs, np.asarray(batch.labels)))
    spread, gap = (np.median(np.concatenate(x)) for x in (sds, gaps))
    certified = "yes" if chains.certificate.passed else "no"
    return (
        f"{seconds:.0f}",
        f"{chains.num_gradients['sampling']:,}",
        certified,
        f"{min(chains.certificate.ess_bulk):.0f}",
        f"{spread:.2f}",
        f"{gap:.2f}",
        ", ".join(f"{x:.3f}" for x in losses),
    )


def options(parser: argparse.ArgumentParser) -> None:
    """Number of rows, multiples of the scale, and draws of NUTS."""
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=4, help="directions of each side of the frames")
    parser.add_argument("--factors", type=float, nargs="*", default=[0.3], help="multiples of the scale")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--draws", type=int, default=250)
    parser.add_argument("--test", type=int, default=100, help="test rows of each domain")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each multiple and model."""
    found = pool(console=QUIET)
    train, tests = drawn(found, given.seed, labelled=given.rows, test=given.test)
    key, few = jax.random.key(given.seed), {"num_warmup": given.warmup, "num_draws": given.draws}
    core = fit_core(key, found.base, train, label_ids=found.label_ids, size={FAMILY: given.size},
                    targets=[FAMILY], layers=slice(-1, None), num_steps=1, console=QUIET)  # fmt: skip
    report.progress(str(core.scales))
    title, losses = "NUTS of the last layer", f"NLL on {', '.join(DOMAINS)}"
    header = ("multiple", "model", "s", "gradients", "certified", "least bulk ESS", "spread", "gap", losses)
    table = report.table(title, header)
    for factor in given.factors:
        scale = {name: factor * value for name, value in core.scales.values.items()}
        tangent = core.model.with_prior(bl.priors.core(core.frames, scale=scale))
        reference: dict[str, np.ndarray] = {}
        runs = {
            "tangent": (tangent, core.fit.train, {"mass": bl.laplace(tangent, core.fit.train)}),
            "network": (tangent.network, train, {}),
        }
        for name, (model, rows, mass) in runs.items():
            with clock() as took:
                chains = bl.sample_nuts(key, model, rows, **few, **OPTIONS, **mass)
            table.row(f"{factor:g}", name, *cells_of(chains, took.wall, tests, reference, 4 * given.draws))
    report.text(
        title,
        f"{core.frames.num_coordinates} coordinates. Spread: median ratio of the standard deviations of "
        "contrasts to those of the tangent model. Gap: median distance of their means, in these "
        "standard deviations.",
    )
