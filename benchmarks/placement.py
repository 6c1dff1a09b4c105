"""Placement, size and scale prior of the core prior on the development seeds: python benchmarks/placement.py.

For each seed from 0 to 2 the features of all placements are computed once: 560 labelled movie sentences, and
1,200 test sentences of each domain. Every line then has scales by Laplace's evidence and predictions by
Laplace's Gaussian, whose logits have a closed form; no network runs. These test sentences were looked at when
`bnlora.infer.core.fit` got its defaults, so seeds 0 to 2 stand in no other table.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from pool import drawn, pool
from rich.console import Console

import bnlora as bl
from bnlora.data.assets import DOMAINS
from bnlora.infer.core.scales import STARTS, Evidence, _maximise, _objective, linear_of
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
    """Accuracy, NLL and ECE in each domain, (domain, 3), and the log evidence."""
    whole, names = linear_of(tangent, train, by="family")
    kept = [names.index(name) for name in placement]

    def part(model):
        return model._replace(groups=[model.groups[i] for i in kept])

    model, on = part(whole), np.ones(len(kept), bool)
    log_scales = _maximise(_objective(model, prior), on, [np.full(len(kept), np.log(s)) for s in STARTS])
    with jax.enable_x64(new_val=True):
        evidence = Evidence.of(model)
        mode = evidence.mode(jnp.asarray(log_scales), evidence.model)
        design = model.design(jnp.asarray(log_scales))
        mean, vectors, values = map(np.asarray, posterior(design, mode, in_rows=evidence.in_rows))
    rows = []
    for batch in tests.values():
        new = part(linear_of(tangent, batch, by="family")[0])
        X = np.concatenate([np.exp(s) * g for s, g in zip(log_scales, new.groups, strict=True)], axis=2)[:, 0]
        variance = (X**2).sum(1) - ((X @ vectors) ** 2 * (values / (1 + values))).sum(1)
        logits = (new.offset[:, 0] + X @ mean)[:, None] + np.sqrt(np.maximum(variance, 0))[:, None] * NODES
        p = (WEIGHTS / WEIGHTS.sum() / (1 + np.exp(-logits))).sum(1)
        log_probs = np.log(np.clip(np.stack([1 - p, p], 1), 1e-12, 1))
        labels = np.asarray(batch.labels)
        rows.append(
            [metric(log_probs, labels) for metric in (bl.metrics.accuracy, bl.metrics.nll, bl.metrics.ece)]
        )
    return np.array(rows), float(mode.log_evidence)


def main() -> None:
    """Print a line for each size, placement and prior: means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--test", type=int, default=1200)
    arguments = parser.parse_args()
    pooled = pool(console=QUIET)
    base, label_ids = pooled.base, pooled.label_ids
    found: dict = {}
    for seed in arguments.seeds:
        train, plain = drawn(pooled, seed, test=arguments.test)
        for size in arguments.sizes:
            options = {"label_ids": label_ids, "size": size, "layers": slice(-2, None), "console": QUIET}
            frames = bl.frames(jax.random.key(seed), base, [*MODULES, SLOPE], train, **options)
            prior = bl.priors.core(frames)
            tangent = bl.Tangent(bl.Classifier(base, frames.sites, prior, label_ids=label_ids))
            ready = bl.cache_prefix(tangent, train, console=QUIET)
            tests = {n: bl.cache_prefix(tangent, plain[n], console=QUIET) for n in DOMAINS}
            for placement in PLACEMENTS:
                for name, prior in PRIORS.items():
                    key = size, " ".join(placement), name
                    found.setdefault(key, []).append(scores(tangent, ready, tests, placement, prior))
    print("| size | placement | scale prior | evidence | " + " | ".join(DOMAINS) + " | mean |")
    print("|" + "---|" * (5 + len(DOMAINS)))
    for (size, placement, prior), runs in found.items():
        table = np.mean([run[0] for run in runs], axis=0)
        cells = [" / ".join(f"{x:.3f}" for x in row) for row in (*table, table.mean(0))]
        evidence = np.mean([run[1] for run in runs])
        print(f"| {size} | {placement} | {prior} | {evidence:.1f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
