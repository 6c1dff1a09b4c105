"""What NUTS says of the network itself, on its last layer: python benchmarks/network_nuts.py.

The core prior on v_proj of the last layer alone, at multiples of the scale that the evidence of the tangent
model chose. NUTS draws from the posterior of the tangent model and from that of the network, on the same
rows and at the same scale; both are certified, and their contrasts on test sentences are compared row by
row. At small scales both must agree; where they part is where the tangent model ends.
"""

import argparse
import time

import jax
import numpy as np
from pool import drawn, pool
from rich.console import Console

import bnlora as bl
from bnlora.assets import DOMAINS
from bnlora.tangent.fit import fit_core

QUIET = Console(quiet=True)
FAMILY = "v_proj"
OPTIONS = {"target_acceptance": 0.8, "max_doublings": 6, "console": QUIET}


def contrasts(posterior, rows: bl.Batch, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of test rows (draw, row), and log-probabilities of their mixture."""
    found = bl.predict(jax.random.key(2), posterior, rows, num_samples=draws, console=QUIET)
    samples = np.asarray(found.draw_log_probs, np.float64)
    return samples[..., 1] - samples[..., 0], found.log_probs


def main() -> None:
    """Print a line for each multiple and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 0.3, 0.1])
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--draws", type=int, default=250)
    parser.add_argument("--test", type=int, default=300)
    arguments = parser.parse_args()
    found = pool(console=QUIET)
    train, tests = drawn(found, arguments.seed, labelled=arguments.rows, test=arguments.test)
    key = jax.random.key(arguments.seed)
    core = fit_core(key, found.base, train, label_ids=found.label_ids, size={FAMILY: arguments.size},
                    targets=[FAMILY], layers=slice(-1, None), num_steps=1, console=QUIET)  # fmt: skip
    print(
        core.scales,
        ", ".join(DOMAINS),
        f"{core.frames.num_coordinates} coordinates",
    )
    print(
        "Spread: median ratio of standard deviations of contrasts to those of the tangent model; gap: median"
    )
    print("distance of their means, in these standard deviations; NLL by domain.")
    print("| multiple | model | s | gradients | certified | least bulk ESS | spread | gap | NLL |")
    print("|" + "---|" * 9)
    for factor in arguments.factors:
        scale = {name: factor * value for name, value in core.scales.values.items()}
        prior = bl.priors.core(core.frames, scale=scale)
        tangent = core.model.with_prior(prior)
        gaussian = bl.laplace(tangent, core.fit.train)
        reference: dict[str, np.ndarray] = {}
        for name, model, rows, extra in (
            ("tangent", tangent, core.fit.train, {"mass": gaussian}),
            ("network", tangent.network, train, {}),
        ):
            began = time.perf_counter()
            chains = bl.sample_nuts(key, model, rows, num_warmup=arguments.warmup, num_draws=arguments.draws,
                                    **OPTIONS, **extra)  # fmt: skip
            spent, certificate = time.perf_counter() - began, chains.certificate
            sds, gaps, losses = [], [], []
            for domain, batch in tests.items():
                draws, log_probs = contrasts(chains, batch, 4 * arguments.draws)
                known = reference.setdefault(domain, draws)
                sds.append(draws.std(0) / known.std(0))
                gaps.append(np.abs(draws.mean(0) - known.mean(0)) / known.std(0))
                losses.append(bl.metrics.nll(log_probs, np.asarray(batch.labels)))
            print(
                f"| {factor:g} | {name} | {spent:.0f} | {chains.num_gradients['sampling']:,} | "
                f"{'yes' if certificate.passed else 'no'} | {min(certificate.ess_bulk):.0f} | "
                f"{np.median(np.concatenate(sds)):.2f} | {np.median(np.concatenate(gaps)):.2f} | "
                + ", ".join(f"{x:.3f}" for x in losses) + " |",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
