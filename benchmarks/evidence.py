"""Laplace's evidence against bridge sampling on the demonstration's rows: python benchmarks/evidence.py.

The scales that `fit_core` chose are multiplied by five factors. At each, NUTS in the coordinates of Laplace's
Gaussian draws from the exact posterior of the tangent model, and bridge sampling gives its log evidence. The
question is whether value and maximiser of Laplace's approximation can be trusted.
"""

import argparse
import time

import jax
import numpy as np
from pool import drawn, pool
from rich.console import Console

import bnlora as bl
from bnlora.infer.core.fit import fit_core

FACTORS = (0.35, 0.6, 1.0, 1.7, 2.8)


def top(values: list[float]) -> float:
    """The factor at the top of the parabola through the three middle points, in the log of the factor."""
    square, linear, _ = np.polyfit(np.log(FACTORS[1:4]), values[1:4], 2)
    return float(np.exp(-linear / (2 * square)))


def main() -> None:
    """Print both evidences at every factor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=560)
    arguments = parser.parse_args()
    quiet = Console(quiet=True)
    found = pool(["movies"], console=quiet)
    train, _ = drawn(found, arguments.seed, labelled=arguments.rows)
    key = jax.random.key(arguments.seed)
    core = fit_core(key, found.base, train, label_ids=found.label_ids, num_steps=1, console=quiet)
    print(core.scales)
    both: dict[str, list[float]] = {"Laplace": [], "bridge sampling": []}
    for factor in FACTORS:
        scale = {name: factor * value for name, value in core.scales.values.items()}
        tangent = core.model.with_prior(bl.priors.core(core.frames, scale=scale))
        gaussian = bl.laplace(tangent, core.fit.train)
        began = time.perf_counter()
        chains = bl.sample_nuts(key, tangent, core.fit.train, mass=gaussian, num_warmup=300, num_draws=1000,
                                target_acceptance=0.8, console=quiet)  # fmt: skip
        exact = bl.log_evidence(key, chains, num_draws=8000)
        both["Laplace"].append(gaussian.log_evidence)
        both["bridge sampling"].append(exact.value)
        gap = gaussian.log_evidence - exact.value
        print(
            f"factor {factor}: Laplace {gaussian.log_evidence:.2f}, bridge {exact.value:.2f} "
            f"(standard error {exact.stderr:.2f}), gap {gap:+.2f} nats, "
            f"{int(chains.stats['divergent'].sum())} divergences, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    print("; ".join(f"maximum by {name} at the factor {top(values):.2f}" for name, values in both.items()))


if __name__ == "__main__":
    main()
