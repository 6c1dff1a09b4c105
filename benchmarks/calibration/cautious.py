"""Smaller scales, chosen by a rule on the evidence.

On the rows of the seeds of `seeds`, all scales of `fit_core` are multiplied by one factor below one, at which
Laplace's evidence is a given number of nats below its maximum (`bnlora.choose_scales(..., within=...)`).
Predictions are those of Laplace's Gaussian. The rule of 2 nats was fixed before any of these seeds was run.
`--by-layer` adds one scale for each layer of a family. The differences from the base without adapters have
95 % intervals by bootstrap over seeds and rows.
"""

import argparse

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.calibration.seeds import TEST, of_positive
from benchmarks.data import Pool, drawn, pool
from benchmarks.report import Report
from bnlora.app.experiment import untouched
from bnlora.data.assets import DOMAINS
from bnlora.infer.core.fit import SCALE_PRIOR, CoreFit, fit_core

QUIET = Console(quiet=True)
BASE, BY_LAYER = "base", "one a layer"
SHOWN = {"NLL": bl.metrics.nll, "debiased ECE": bl.metrics.debiased_ece, "ACC": bl.metrics.accuracy}


def chosen(core: CoreFit, rules: dict[str, dict]) -> dict[str, bl.Scales]:
    """Scales by rule; a rule is a set of options of `choose_scales`."""
    options = {"prior": SCALE_PRIOR, "console": QUIET}
    return {n: bl.choose_scales(core.model, core.fit.train, **rule, **options) for n, rule in rules.items()}


def run_seed(seed: int, pooled: Pool, rules: dict[str, dict], count: int) -> dict:
    """Log-probabilities of the second class by rule and domain, and the labels."""
    train, tests = drawn(pooled, seed, test=count)
    keys = jax.random.split(jax.random.key(seed), 5)  # the same keys as in `seeds`, for the same fit
    options = {"label_ids": pooled.label_ids, "num_steps": 1, "console": QUIET}
    core = fit_core(keys[3], pooled.base, train, **options)
    scales = chosen(core, rules)
    found: dict = {"scales": {name: one.by_name for name, one in scales.items()}}
    gaussians = {}
    for name, one in scales.items():
        prior = bl.priors.core(core.frames, scale=one.values)
        gaussians[name] = bl.laplace(core.model.with_prior(prior), core.fit.train)
    for name in DOMAINS:
        rows = bl.cache_prefix(core.model, tests[name], console=QUIET)
        predicted = {BASE: untouched(rows)}
        for rule, gaussian in gaussians.items():
            predicted[rule] = bl.predict(keys[4], gaussian, rows, num_draws=64, console=QUIET)
        found[name] = {m: p.log_probs[:, 1] for m, p in predicted.items()}
        found[name]["labels"] = np.asarray(rows.labels)
    return found


def gaps(found: list[dict], rule: str, draws: int = 400) -> np.ndarray:
    """Bootstrap of the NLL of a rule minus that of the base, shape (draw, domain)."""
    random, made = np.random.default_rng(0), np.zeros((draws, len(DOMAINS)))

    def differences(rows: dict) -> np.ndarray:
        both = of_positive(rows[BASE]) - of_positive(rows[rule])
        return np.take_along_axis(both, rows["labels"][:, None], axis=1)[:, 0]

    per_row = [[differences(f[d]) for d in DOMAINS] for f in found]
    for draw in range(draws):
        for seed in random.integers(0, len(found), len(found)):
            for d, values in enumerate(per_row[seed]):
                made[draw, d] += values[random.integers(0, len(values), len(values))].mean() / len(found)
    return made


def tables(report: Report, found: list[dict], rules: list[str]) -> None:
    """Metrics by rule and domain, and differences from the base."""
    table = report.table("Smaller scales", ("metric", "scales", *DOMAINS, "mean"))
    for metric, of in SHOWN.items():
        for rule in (BASE, *rules):
            values = np.mean(
                [[of(of_positive(f[d][rule]), f[d]["labels"]) for d in DOMAINS] for f in found], axis=0
            )
            table.row(metric, rule, *(f"{x:.3f}" for x in (*values, values.mean())))
    for rule in rules:
        made = gaps(found, rule)
        made = np.concatenate([made, made.mean(1, keepdims=True)], axis=1)
        low, high = np.quantile(made, [0.025, 0.975], axis=0)
        cells = [f"{m:+.3f} ({a:+.3f} to {b:+.3f})" for m, a, b in zip(made.mean(0), low, high, strict=True)]
        table.row("NLL minus base", rule, *cells)


def options(parser: argparse.ArgumentParser) -> None:
    """Seeds, and the rules for scales."""
    parser.add_argument("--seeds", type=int, nargs="*", default=[3, 4, 5, 6, 7])
    parser.add_argument("--within", type=float, nargs="*", default=[0.0, 2.0], help="nats of evidence")
    parser.add_argument("--by-layer", action="store_true", help="also one scale for each layer")
    parser.add_argument("--test", type=int, default=TEST, help="test rows of each domain")


def run(given: argparse.Namespace, report: Report) -> None:
    """Tables over all seeds."""
    rules: dict[str, dict] = {f"{within:g} nats": {"within": within} for within in given.within}
    if given.by_layer:
        rules[BY_LAYER] = {"by": "layer"}
    pooled, found = pool(console=QUIET), []
    for seed in given.seeds:
        found.append(run_seed(seed, pooled, rules, given.test))
        report.progress(f"seed {seed}: {found[-1]['scales']}")
    tables(report, found, list(rules))
