"""NUTS of the demonstration's tangent posterior: time compared with NumPyro's sampler, and scales as sites.

NUTS runs in the coordinates of Laplace's Gaussian, on labelled movie sentences, at the scales chosen by
`fit_core` and with scales as sites. At fixed scales, NumPyro's NUTS runs on the same density in the same
coordinates, in alternation; its seconds and gradients are compared with those of `bnlora.sample_nuts`,
compiling included. Effective sample sizes are minima over the contrasts of eight rows and the log-likelihood.
With scales as sites, a gradient factorises two matrices of the number of rows, with cubic cost.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS
from rich.console import Console

import bnlora as bl
from benchmarks.data import drawn, pool
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.infer.core.fit import SCALE_PRIOR, fit_core
from bnlora.infer.mcmc.whitened import InRows
from bnlora.metrics.monte_carlo import bulk_ess

QUIET = Console(quiet=True)
CHAINS, ACCEPTANCE = 4, 0.8


def least_ess(target: InRows, positions: np.ndarray) -> float:
    """Smallest bulk effective sample size over contrasts and log-likelihood; positions (chain, draw, r)."""
    design, offset, labels = (np.asarray(x) for x in target.likelihood)
    moved = np.asarray(positions, np.float64) * np.asarray(target.gaussian.gains)
    contrasts = offset[:, 0] + moved @ design[:, 0].T
    log_likelihood = -np.logaddexp(0, np.where(labels == 1, -contrasts, contrasts)).sum(-1, keepdims=True)
    return float(bulk_ess(np.concatenate([contrasts[..., :8], log_likelihood], axis=-1)).min())


def by_numpyro(key: jax.Array, target: InRows, warmup: int, draws: int) -> tuple[np.ndarray, int]:
    """Positions (chain, draw, r), and number of gradients after the warm-up."""
    inputs = target.inputs
    kernel = NUTS(potential_fn=lambda z: -target.log_density(z, inputs), target_accept_prob=ACCEPTANCE)
    sampler = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=CHAINS,
                   chain_method="vectorized", progress_bar=False)  # fmt: skip
    start = jnp.zeros((CHAINS, len(target.gaussian.gains)))
    sampler.run(key, init_params=start, extra_fields=("num_steps",))
    return sampler.get_samples(group_by_chain=True), int(np.sum(sampler.get_extra_fields()["num_steps"]))


def fixed(report: Report, core: bl.CoreFit, warmup: int, draws: int, rounds: int) -> bl.Chains:
    """Run both samplers at fixed scales, in alternation; return the last chains of `bnlora.sample_nuts`."""
    title = "NUTS at fixed scales"
    table = report.table(title, ("sampler", "round", "s", "gradients", "least ESS", "ESS / s"))
    few = {"num_warmup": warmup, "num_draws": draws, "target_acceptance": ACCEPTANCE, "console": QUIET}
    for number in range(rounds):
        key = jax.random.key(number)
        with clock() as ours:
            chains = bl.sample_nuts(key, core.model, core.fit.train, mass=core.gaussian, **few)
        target = chains.target
        with clock() as theirs:
            positions, gradients = by_numpyro(key, target, warmup, draws)
        own = np.stack([target.positions(c) for c in chains.vectors])
        runs = {
            "bnlora": (ours, own, chains.num_gradients["sampling"]),
            "NumPyro": (theirs, positions, gradients),
        }
        for name, (took, where, count) in runs.items():
            ess = least_ess(target, where)
            table.row(name, number, f"{took.wall:.1f}", f"{count:,}", f"{ess:.0f}", f"{ess / took.wall:.1f}")
    report.text(title, *verdict(chains))
    return chains


def verdict(chains: bl.Chains) -> tuple[str, ...]:
    """Verdict of the certificate, and its worst numbers."""
    worst, least = max(chains.certificate.rhat), min(chains.certificate.ess_bulk)
    divergences = int(chains.stats["divergent"].sum())
    return (
        f"{chains.certificate.verdict.rstrip('.')}.",
        f"Greatest R-hat {worst:.4f}, least bulk ESS {least:,.0f}, {divergences} divergences.",
    )


def random_scales(report: Report, core: bl.CoreFit, warmup: int, draws: int) -> bl.Chains:
    """NUTS with scales as sites, in coordinates that depend on the scales."""
    title, prior = "Scales as sites", bl.priors.core(core.frames, scale=SCALE_PRIOR)
    tangent = core.model.with_prior(prior)
    gaussian = bl.laplace(tangent, core.fit.train)
    few = {"num_warmup": warmup, "num_draws": draws, "target_acceptance": ACCEPTANCE, "console": QUIET}
    with clock() as took:
        chains = bl.sample_nuts(jax.random.key(1), tangent, core.fit.train, mass=gaussian, **few)
    table = report.table(title, ("scale", "chosen by evidence", "5 %", "median", "95 %", "bulk ESS"))
    for name, values in chains.sites().items():
        if name.endswith(".scale"):
            flat, family = values.reshape(*values.shape[:2], 1), name.removesuffix(".scale")
            quantiles = (f"{x:.2f}" for x in np.quantile(flat, [0.05, 0.5, 0.95]))
            table.row(
                family, f"{core.scales.values[family]:.2f}", *quantiles, f"{float(bulk_ess(flat)[0]):.0f}"
            )
    exact = bl.log_evidence(jax.random.key(2), chains)
    counts = ", ".join(f"{count:,} gradients of {stage}" for stage, count in chains.num_gradients.items())
    report.text(
        title,
        f"{gaussian.informed.pull.size} directions, {took.wall:.0f} s, {counts}.",
        *verdict(chains),
        f"Log evidence with the scales integrated out: {exact.value:.2f} (standard error {exact.stderr:.2f}) "
        f"by bridge sampling, {gaussian.log_evidence:.2f} by Laplace.",
    )
    return chains


def predictions(
    report: Report, posteriors: dict[str, object], tests: dict[str, bl.Batch], draws: int
) -> None:
    """NLL and debiased ECE by domain, for posteriors of tangent models with the same features."""
    table = report.table("NLL / debiased ECE", ("posterior", *tests))
    for name, posterior in posteriors.items():
        cells = []
        for rows in tests.values():
            log_probs = bl.predict(
                jax.random.key(3), posterior, rows, num_draws=draws, console=QUIET
            ).log_probs
            labels = np.asarray(rows.labels)
            both = bl.metrics.nll(log_probs, labels), bl.metrics.debiased_ece(log_probs, labels)
            cells.append(" / ".join(f"{x:.3f}" for x in both))
        table.row(name, *cells)


def options(parser: argparse.ArgumentParser) -> None:
    """Number of rows, and draws of NUTS."""
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=560)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--test", type=int, default=1000, help="test rows of each domain")
    parser.add_argument("--fixed", action="store_true", help="leave out scales as sites")


def run(given: argparse.Namespace, report: Report) -> None:
    """Run both comparisons, and predict with all posteriors."""
    found = pool(console=QUIET)
    train, tests = drawn(found, given.seed, labelled=given.rows, test=given.test)
    key = jax.random.key(given.seed)
    core = fit_core(key, found.base, train, label_ids=found.label_ids, console=QUIET)
    report.progress(str(core.scales))
    posteriors = {"SVI, scales by evidence": core}
    posteriors["NUTS, scales by evidence"] = fixed(report, core, given.warmup, given.draws, given.rounds)
    if not given.fixed:
        posteriors["NUTS, scales as sites"] = random_scales(report, core, given.warmup, given.draws)
    features = {name: bl.cache_prefix(core.model, rows, console=QUIET) for name, rows in tests.items()}
    predictions(report, posteriors, features, min(256, CHAINS * given.draws))
