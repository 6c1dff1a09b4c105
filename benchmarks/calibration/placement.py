"""Placement, size and scale prior of the core prior on the development seeds.

For each seed from 0 to 2 the features of all placements are computed once, for 560 labelled movie sentences
and 1,200 test sentences of each domain. Every row of the table then has scales by Laplace's evidence and
predictions by Laplace's Gaussian, whose logits have a closed form; the network does not run. These test
sentences were used to choose the defaults of `bnlora.infer.core.fit`, so no other table has seeds 0 to 2.
"""

import argparse
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from rich.console import Console

import bnlora as bl
from benchmarks.data import LABELLED, drawn, pool
from benchmarks.report import Report
from bnlora.data.assets import DOMAINS
from bnlora.infer.core.scales import STARTS, Evidence, _objective, linear_of, maximise
from bnlora.program.tangent.linear import posterior
from bnlora.program.tangent.targets import SLOPE

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
PLACEMENTS = (
    ("q_proj", "k_proj", "lm_head"),
    ("q_proj", "k_proj", "lm_head", SLOPE),
    ("v_proj", "o_proj", "lm_head"),
    ("v_proj", "o_proj"),
    ("o_proj",),
    ("v_proj",),
    ("v_proj", SLOPE),
    ("q_proj", "k_proj", "v_proj", SLOPE),
)
PRIORS = {"none": None, "HalfNormal(1)": dist.HalfNormal(1.0), "HalfNormal(5)": dist.HalfNormal(5.0)}
METRICS = bl.metrics.accuracy, bl.metrics.nll, bl.metrics.ece
QUIET = Console(quiet=True)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(48)


def scores(tangent, train, tests, placement, prior) -> tuple[np.ndarray, float]:
    """Accuracy, NLL and ECE in each domain, shape (domain, 3), and the log evidence in nats."""
    whole, names = linear_of(tangent, train, by="family")
    kept = [names.index(name) for name in placement]

    def part(model):
        return model._replace(groups=[model.groups[i] for i in kept])

    model, on = part(whole), np.ones(len(kept), bool)
    log_scales = maximise(_objective(model, prior), on, [np.full(len(kept), np.log(s)) for s in STARTS])
    with jax.enable_x64(new_val=True):
        evidence = Evidence.of(model)
        mode = evidence.mode(jnp.asarray(log_scales), evidence.model)
        design = model.design(jnp.asarray(log_scales))
        mean, vectors, values = map(np.asarray, posterior(design, mode, in_rows=evidence.in_rows))
    rows = []
    for batch in tests.values():
        new = part(linear_of(tangent, batch, by="family")[0])
        X = np.concatenate([np.exp(s) * g for s, g in zip(log_scales, new.groups, strict=True)], axis=2)[:, 0]
        # Variance of each logit under Laplace's Gaussian: prior minus what the data remove.
        variance = (X**2).sum(1) - ((X @ vectors) ** 2 * (values / (1 + values))).sum(1)
        logits = (new.offset[:, 0] + X @ mean)[:, None] + np.sqrt(np.maximum(variance, 0))[:, None] * NODES
        # Mean probability by Gauss-Hermite quadrature over the normal logit.
        p = (WEIGHTS / WEIGHTS.sum() / (1 + np.exp(-logits))).sum(1)
        log_probs = np.log(np.clip(np.stack([1 - p, p], 1), 1e-12, 1))
        labels = np.asarray(batch.labels)
        rows.append([metric(log_probs, labels) for metric in METRICS])
    return np.array(rows), float(mode.log_evidence)


def options(parser: argparse.ArgumentParser) -> None:
    """Seeds and sizes."""
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=LABELLED)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32], help="directions of each side")
    parser.add_argument("--test", type=int, default=1200, help="test rows of each domain")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each size, placement and prior: means over the seeds."""
    pooled, found = pool(console=QUIET), {}
    for seed in given.seeds:
        train, plain = drawn(pooled, seed, labelled=given.rows, test=given.test)
        for size in given.sizes:
            few = {"label_ids": pooled.label_ids, "size": size, "layers": slice(-2, None), "console": QUIET}
            frames = bl.frames(jax.random.key(seed), pooled.base, [*MODULES, SLOPE], train, **few)
            prior = bl.priors.core(frames)
            network = bl.Classifier(pooled.base, frames.sites, prior, label_ids=pooled.label_ids)
            tangent = bl.Tangent(network)
            ready = bl.cache_prefix(tangent, train, console=QUIET)
            tests = {n: bl.cache_prefix(tangent, plain[n], console=QUIET) for n in DOMAINS}
            for placement, (name, law) in product(PLACEMENTS, PRIORS.items()):
                one = scores(tangent, ready, tests, placement, law)
                found.setdefault((size, " ".join(placement), name), []).append(one)
        report.progress(f"seed {seed} done")
    header = ("size", "placement", "scale prior", "evidence", *DOMAINS, "mean")
    table = report.table("ACC / NLL / ECE", header)
    for names, runs in found.items():
        means = np.mean([run[0] for run in runs], axis=0)
        cells = [" / ".join(f"{x:.3f}" for x in row) for row in (*means, means.mean(0))]
        table.row(*names, f"{np.mean([run[1] for run in runs]):.1f}", *cells)
