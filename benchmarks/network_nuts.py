"""NUTS on the network itself, on its last layer: python benchmarks/network_nuts.py.

The core prior stands on v_proj of the last layer, at multiples of the scale that the tangent model's evidence
chose. NUTS samples the posterior of the tangent model and that of the network, with the same rows and scale.
A line says whether the chains are certified, and how far the contrasts of test sentences differ. At small
scales the two models agree. The network needs minutes where the tangent model needs seconds.
"""

import argparse
import time

import jax
import numpy as np
from pool import drawn, pool
from rich.console import Console

import bnlora as bl
from bnlora.data.assets import DOMAINS
from bnlora.infer.core.fit import fit_core

QUIET = Console(quiet=True)
FAMILY = "v_proj"
OPTIONS = {"target_acceptance": 0.8, "max_doublings": 6, "console": QUIET}


def contrasts(posterior, rows: bl.Batch, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of test rows (draw, row), and log-probabilities of their mixture."""
    found = bl.predict(jax.random.key(2), posterior, rows, num_draws=draws, console=QUIET)
    samples = np.asarray(found.draw_log_probs, np.float64)
    return samples[..., 1] - samples[..., 0], found.log_probs


def line(chains: bl.Chains, seconds: float, tests: dict, reference: dict, draws: int) -> str:
    """Cells of a line; `reference` has the contrasts of the tangent model, or takes them."""
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
        f"{seconds:.0f} | {chains.num_gradients['sampling']:,} | {certified} | "
        f"{min(chains.certificate.ess_bulk):.0f} | {spread:.2f} | {gap:.2f} | "
        + ", ".join(f"{x:.3f}" for x in losses)
    )


def main() -> None:
    """Print a line for each multiple and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--factors", type=float, nargs="*", default=[0.3])
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--draws", type=int, default=250)
    parser.add_argument("--test", type=int, default=100)
    arguments = parser.parse_args()
    found = pool(console=QUIET)
    train, tests = drawn(found, arguments.seed, labelled=arguments.rows, test=arguments.test)
    key, sizes = (
        jax.random.key(arguments.seed),
        {"num_warmup": arguments.warmup, "num_draws": arguments.draws},
    )
    core = fit_core(key, found.base, train, label_ids=found.label_ids, size={FAMILY: arguments.size},
                    targets=[FAMILY], layers=slice(-1, None), num_steps=1, console=QUIET)  # fmt: skip
    print(core.scales, f"{core.frames.num_coordinates} coordinates; NLL on {', '.join(DOMAINS)}")
    print("Spread: median ratio of standard deviations of contrasts to those of the tangent model.")
    print("Gap: median distance of their means, in these standard deviations.")
    print("| multiple | model | s | gradients | certified | least bulk ESS | spread | gap | NLL |")
    print("|" + "---|" * 9)
    for factor in arguments.factors:
        scale = {name: factor * value for name, value in core.scales.values.items()}
        tangent = core.model.with_prior(bl.priors.core(core.frames, scale=scale))
        reference: dict[str, np.ndarray] = {}
        runs = {
            "tangent": (tangent, core.fit.train, {"mass": bl.laplace(tangent, core.fit.train)}),
            "network": (tangent.network, train, {}),
        }
        for name, (model, rows, mass) in runs.items():
            began = time.perf_counter()
            chains = bl.sample_nuts(key, model, rows, **sizes, **OPTIONS, **mass)
            cells = line(chains, time.perf_counter() - began, tests, reference, 4 * arguments.draws)
            print(f"| {factor:g} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
