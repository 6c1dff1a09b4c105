"""The gold standard of the demonstration's tangent posterior: python benchmarks/gold.py.

NUTS in the coordinates of Laplace's Gaussian, at the scales that `fit_core` chose and with scales as sites,
on labelled movie sentences. At fixed scales NumPyro's NUTS gets the same density in the same coordinates,
in turns; its seconds and gradients are held against those of `bnlora.sample_nuts`, compiling included.
Effective sizes are the least over the contrasts of eight rows and the log-likelihood. With scales as sites a
gradient factorises two matrices of the size of the rows: its cost grows with their third power.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS
from pool import drawn, pool
from rich.console import Console

import bnlora as bl
from bnlora.infer.core.fit import SCALE_PRIOR, fit_core
from bnlora.infer.mcmc.whitened import InRows
from bnlora.metrics.monte_carlo import bulk_ess

QUIET = Console(quiet=True)
CHAINS, ACCEPTANCE = 4, 0.8


def least_ess(target: InRows, positions: np.ndarray) -> float:
    """Least bulk effective size over some contrasts and the log-likelihood, positions (chain, draw, r)."""
    design, offset, labels = (np.asarray(x) for x in target.likelihood)
    moved = np.asarray(positions, np.float64) * np.asarray(target.gaussian.gains)
    contrasts = offset[:, 0] + moved @ design[:, 0].T
    log_likelihood = -np.logaddexp(0, np.where(labels == 1, -contrasts, contrasts)).sum(-1, keepdims=True)
    return float(bulk_ess(np.concatenate([contrasts[..., :8], log_likelihood], axis=-1)).min())


def by_numpyro(key: jax.Array, target: InRows, warmup: int, draws: int) -> tuple[np.ndarray, int]:
    """Positions (chain, draw, r) and gradients after the warm-up."""
    inputs = target.inputs
    kernel = NUTS(potential_fn=lambda z: -target.log_density(z, inputs), target_accept_prob=ACCEPTANCE)
    sampler = MCMC(kernel, num_warmup=warmup, num_draws=draws, num_chains=CHAINS,
                   chain_method="vectorized", progress_bar=False)  # fmt: skip
    start = jnp.zeros((CHAINS, len(target.gaussian.gains)))
    sampler.run(key, init_params=start, extra_fields=("num_steps",))
    return sampler.get_samples(group_by_chain=True), int(np.sum(sampler.get_extra_fields()["num_steps"]))


def fixed(core, warmup: int, draws: int, rounds: int) -> bl.Chains:
    """Both samplers at fixed scales, in turns; the last chains of ours."""
    options = {"num_warmup": warmup, "num_draws": draws, "target_acceptance": ACCEPTANCE, "console": QUIET}
    print("| sampler | round | s | gradients | least ESS | ESS / s |\n|---|---|---|---|---|---|")
    for number in range(rounds):
        key = jax.random.key(number)
        began = time.perf_counter()
        chains = bl.sample_nuts(key, core.model, core.fit.train, mass=core.gaussian, **options)
        seconds, target = time.perf_counter() - began, chains.target
        ess = least_ess(target, np.stack([target.positions(c) for c in chains.vectors]))
        gradients = chains.num_gradients["sampling"]
        print(
            f"| bnlora | {number} | {seconds:.1f} | {gradients:,} | {ess:.0f} | {ess / seconds:.1f} |",
            flush=True,
        )
        began = time.perf_counter()
        positions, gradients = by_numpyro(key, target, warmup, draws)
        seconds, ess = time.perf_counter() - began, least_ess(target, positions)
        print(
            f"| NumPyro | {number} | {seconds:.1f} | {gradients:,} | {ess:.0f} | {ess / seconds:.1f} |",
            flush=True,
        )
    print(chains.certificate, int(chains.stats["divergent"].sum()), "divergences")
    return chains


def random_scales(core, warmup: int, draws: int) -> bl.Chains:
    """NUTS with scales as sites, in coordinates that follow them."""
    prior = bl.priors.core(core.frames, scale=SCALE_PRIOR)
    tangent = core.model.with_prior(prior)
    began = time.perf_counter()
    gaussian = bl.laplace(tangent, core.fit.train)
    print(f"{gaussian}, {gaussian.informed.pull.size} directions, {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    chains = bl.sample_nuts(jax.random.key(1), tangent, core.fit.train, mass=gaussian, num_warmup=warmup,
                            num_draws=draws, target_acceptance=ACCEPTANCE, console=QUIET)  # fmt: skip
    seconds = time.perf_counter() - began
    divergences = int(chains.stats["divergent"].sum())
    print(f"{seconds:.0f} s, gradients {chains.num_gradients}, {divergences} divergences")
    print(chains.certificate, flush=True)
    print("| scale | chosen by evidence | 5 % | median | 95 % | bulk ESS |\n|---|---|---|---|---|---|")
    for name, values in chains.sites().items():
        if name.endswith(".scale"):
            flat = values.reshape(*values.shape[:2], 1)
            low, middle, high = np.quantile(flat, [0.05, 0.5, 0.95])
            chosen = core.scales.values[name.removesuffix(".scale")]
            ess = float(bulk_ess(flat)[0])
            print(f"| {name} | {chosen:.2f} | {low:.2f} | {middle:.2f} | {high:.2f} | {ess:.0f} |")
    exact = bl.log_evidence(jax.random.key(2), chains)
    print(f"log evidence {exact.value:.2f} ({exact.stderr:.2f}) by bridge sampling, "
          f"{gaussian.log_evidence:.2f} by Laplace, scales integrated out", flush=True)  # fmt: skip
    return chains


def predictions(posteriors: dict[str, object], tests: dict[str, bl.Batch]) -> None:
    """NLL and debiased ECE by domain of some posteriors of tangent models with the same features."""
    print("| posterior | " + " | ".join(tests) + " |\n|" + "---|" * (len(tests) + 1))
    for name, posterior in posteriors.items():
        cells = []
        for rows in tests.values():
            found = bl.predict(jax.random.key(3), posterior, rows, num_draws=256, console=QUIET).log_probs
            labels = np.asarray(rows.labels)
            cells.append(
                f"{bl.metrics.nll(found, labels):.3f} / {bl.metrics.debiased_ece(found, labels):.3f}"
            )
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--rows", type=int, default=560)
    parser.add_argument("--test", type=int, default=1000, help="test rows of each domain")
    arguments = parser.parse_args()
    found = pool(console=QUIET)
    train, tests = drawn(found, 0, labelled=arguments.rows, test=arguments.test)
    core = fit_core(jax.random.key(0), found.base, train, label_ids=found.label_ids, console=QUIET)
    print(core.scales)
    chains = fixed(core, arguments.warmup, arguments.draws, arguments.rounds)
    random = random_scales(core, arguments.warmup, arguments.draws)
    features = {name: bl.cache_prefix(core.model, rows, console=QUIET) for name, rows in tests.items()}
    predictions({"SVI": core, "NUTS": chains, "NUTS, scales as sites": random}, features)


if __name__ == "__main__":
    main()
