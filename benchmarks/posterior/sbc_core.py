"""Is the posterior of the core prior calibrated? Simulation-based calibration on the tangent model.

Truths are drawn from the prior at 3 nats and labels from the likelihood, and every inference runs on every
data set, with fixed frames and scales. The rows are 8 and 320 movie sentences of the demonstration under
SmolLM2-135M, with the last two layers adapted as in `bl.fit_core`, but with smaller frames. Importance
resampling from the prior, which is exact, is feasible only for the head of a tiny network.

Posterior calibration starts from the observed labels of 320 sentences: truths from their posterior, new
labels of the same rows, and inference from both.

`--tiny` uses random rows of a tiny network instead. LAPACK's threads wait for each other if other programs
run: set OPENBLAS_NUM_THREADS=1.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.data import drawn, pool
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.assess import sbc
from bnlora.assess.sbc.calibration import Calibration
from bnlora.assess.sbc.core import gaussian_inference, laplace_inference, nuts_inference
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
QUIET = Console(quiet=True)
LAYERS, SIZE, SCALE, DRAWS, FEW, MANY = slice(-2, None), 8, 3.0, 63, 8, 320
TARGETS = ["v_proj", "slope"]
NUTS, LAPLACE, OWN = "NUTS", "Laplace", "Laplace, truths its own"
SHORT = (
    "rows",
    "inference",
    "log-likelihood",
    "norm of the slope (of the head)",
    "margins at three rows",
    "least adjusted SBC p",
)
HEADER = (
    "rows",
    "inference",
    "function",
    "mean p (95 %)",
    "variance of ranks over uniform (95 %)",
    "SBC p",
    "s",
)


def tangent_of(base, targets: list[str], rows: bl.Batch, label_ids: tuple[int, ...], size: int) -> bl.Tangent:
    """The tangent model in frames of the rows; labels are not used."""
    frames = bl.frames(KEY, base, targets, rows, label_ids=label_ids, size=size, layers=LAYERS, console=QUIET)
    network = bl.Classifier(base, frames.sites, bl.priors.core(frames, scale=SCALE), label_ids=label_ids)
    return bl.Tangent(network)


def inferences(tangent: bl.Tangent) -> dict[str, sbc.Inference]:
    """All inferences except importance resampling."""
    return {
        NUTS: nuts_inference(tangent, num_draws=DRAWS),
        "full Gaussian, SVI": gaussian_inference(KEY, tangent, num_draws=DRAWS),
        LAPLACE: laplace_inference(tangent, num_draws=DRAWS),
        "Laplace, spread times 0.5 (wrong)": laplace_inference(tangent, num_draws=DRAWS, spread=0.5),
    }


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> list[str]:
    """A statistic of columns with a 95 % interval by bootstrap over simulations."""
    random = np.random.default_rng(0)
    again = [statistic(values[random.integers(0, len(values), len(values))]) for _ in range(2000)]
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    return [f"{x:.3f} ({a:.3f}, {b:.3f})" for x, a, b in zip(statistic(values), low, high, strict=True)]


class Judged(NamedTuple):
    """Result of one inference."""

    rows: str
    name: str
    result: Calibration
    seconds: float

    def mean(self, p: np.ndarray) -> np.ndarray:
        """Mean probability of each function."""
        return p.mean(0)

    def spread(self, ranks: np.ndarray) -> np.ndarray:
        """Variance of the ranks of each function, divided by that of uniform ranks."""
        return ranks.var(0, ddof=1) / (((self.result.num_draws + 1) ** 2 - 1) / 12)


def p_text(p: float) -> str:
    """A p-value with four decimals."""
    return "<1e-4" if p < 1e-4 else f"{p:.4f}"


def condensed(judged: Judged) -> tuple[str, ...]:
    """Row of an inference: mean p and variance of ranks by kind of function, and the smallest p-value."""
    names, result = judged.result.names, judged.result
    means, spreads = judged.mean(result.probabilities), judged.spread(result.ranks)

    def cell(chosen: list[int]) -> str:
        ends = ((x[chosen].min(), x[chosen].max()) for x in (means, spreads))
        return ", ".join(f"{a:.3f}" if a == b else f"{a:.3f} to {b:.3f}" for a, b in ends)

    norm = "norm[slope]" if "norm[slope]" in names else "norm[lm_head]"
    kinds = (["log_likelihood"], [norm], [n for n in names if n.startswith("margin")])
    cells = (cell([names.index(n) for n in kind]) for kind in kinds)
    return (judged.rows, judged.name, *cells, p_text(result.adjusted.min()))


def lines(judged: Judged) -> list[tuple[str, ...]]:
    """Rows of an inference, one for each function; p-values are adjusted over the functions."""
    rows, name, result, seconds = judged
    means = interval(result.probabilities, judged.mean)
    spreads = interval(result.ranks, judged.spread)
    found = []
    for k, function in enumerate(result.names):
        lost = f", {int(result.failed.sum())} failed" if result.failed.any() and k == 0 else ""
        first = (rows, name + lost) if k == 0 else ("", "")
        last = f"{seconds:.0f}" if k == 0 else ""
        found.append((*first, function, means[k], spreads[k], p_text(result.adjusted[k]), last))
    return found


def judge(
    report: Report,
    rows: str,
    made: Mapping[str, sbc.Inference],
    run: Callable[[str, sbc.Inference], Calibration],
) -> list[Judged]:
    """Run the inferences one by one."""
    found = []
    for name, inference in made.items():
        with clock() as took:
            result = run(name, inference)
        found.append(Judged(rows, name, result, took.wall))
        report.progress(f"{rows}, {name}: {result.verdict}")
    return found


def prior_part(
    report: Report, tangent: bl.Tangent, rows: bl.Batch, label: str, simulations: int, **more: sbc.Inference
) -> list[Judged]:
    """Calibration under the prior."""

    def run(name: str, inference: sbc.Inference) -> Calibration:
        return sbc.run(jax.random.key(1), tangent, inference, rows, num_simulations=simulations)

    return judge(report, label, more | inferences(tangent), run)


def posterior_part(
    report: Report, tangent: bl.Tangent, rows: bl.Batch, label: str, simulations: int
) -> list[Judged]:
    """Calibration under the posterior of the observed labels; truths are draws of NUTS except in one row."""
    exact = nuts_inference(tangent, num_draws=simulations, num_warmup=200, thinning=8)
    gaussian = laplace_inference(tangent, num_draws=simulations)
    truths = {
        name: jax.jit(infer)(jax.random.key(2), tangent.base.weights, rows)
        for name, infer in ((NUTS, exact), (OWN, gaussian))
    }

    def run(name: str, inference: sbc.Inference) -> Calibration:
        return sbc.run_posterior(
            jax.random.key(3), tangent, inference, rows, truths[OWN if name == OWN else NUTS]
        )

    made = inferences(tangent)
    kinds = {NUTS: made[NUTS], LAPLACE: made[LAPLACE], OWN: made[LAPLACE]}
    return judge(report, label, kinds, run)


def options(parser: argparse.ArgumentParser) -> None:
    """Number of simulations, and network."""
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--rows", type=int, default=MANY, help="rows of the larger task")
    parser.add_argument("--tiny", action="store_true", help="a tiny network instead of SmolLM2-135M")


def run(given: argparse.Namespace, report: Report) -> None:
    """Calibrate every inference: one row for each, and one for each of its functions."""
    count = given.simulations
    tiny, task = tiny_base(jax.random.key(1), num_layers=2), tiny_rows(jax.random.key(2), given.rows)
    head = tangent_of(tiny, ["lm_head"], task, (3, 5), 4)
    importance = sbc.importance_inference(head, num_particles=4096, num_draws=DRAWS, num_together=512)
    more, few = {"importance (exact)": importance}, head.prepare(task[:FEW])
    judged = prior_part(report, head, few, f"{FEW}, tiny head", count, **more)
    base, rows, label_ids = tiny, task, (3, 5)
    if not given.tiny:
        movies = pool(["movies"])
        base, label_ids, (rows, _) = movies.base, movies.label_ids, drawn(movies, 0, labelled=given.rows)
    tangent = tangent_of(base, TARGETS, rows, label_ids, SIZE)
    many = bl.cache_prefix(tangent, rows, console=QUIET)
    where = "tiny network" if given.tiny else "SmolLM2-135M"
    for part in (many[:FEW], many):
        judged += prior_part(report, tangent, part, f"{len(part)}, {where}", count)
    judged += posterior_part(report, tangent, many, f"{len(many)}, {where}, posterior", count)
    for title, header, of in (("Short", SHORT, lambda x: [condensed(x)]), ("Each function", HEADER, lines)):
        table = report.table(title, header)
        for cells in (cells for one in judged for cells in of(one)):
            table.row(*cells)
    report.text(title, f"{count} simulations of {DRAWS} draws, scale {SCALE} nats; {tangent.frames!r}.")
