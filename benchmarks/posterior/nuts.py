"""Cost of sampling: BlackJAX against NumPyro, cached trunk, warm start.

Both NUTS samplers get the same head, adaptation target, diagonal mass matrix, chains, warm-up and draws, and
alternate in one process. The result of a round is the smallest bulk effective sample size over the
identifiable functions, divided by the seconds of the whole call (compiling included), and by the number of
gradients.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from numpyro.infer import MCMC, NUTS
from rich.console import Console

import bnlora as bl
from benchmarks.heads import HEADS, smollm2
from benchmarks.report import Report
from benchmarks.timing import Took, clock, in_turn, spread
from bnlora import guides
from bnlora.infer.mcmc.target import Target, starts, target
from bnlora.metrics.monte_carlo import bulk_ess
from bnlora.prediction.functions import evaluate, identifiable
from bnlora.program.draws import adapters_at

QUIET = Console(quiet=True)
ACCEPTANCE = 0.9


def blackjax(
    key: jax.Array, model: bl.Classifier, train: bl.Batch, warmup: int, draws: int
) -> tuple[float, int]:
    """Smallest effective sample size, and number of gradients."""
    options = {"num_warmup": warmup, "num_draws": draws, "target_acceptance": ACCEPTANCE}
    chains = bl.sample_nuts(key, model, train, init_strategy="zero", **options)
    return float(bulk_ess(chains.values()[1]).min()), sum(chains.num_gradients.values())


def numpyro(
    key: jax.Array, model: bl.Classifier, train: bl.Batch, warmup: int, draws: int
) -> tuple[float, int]:
    """The same by NumPyro's sampler; gradients of its warm-up are not reported and not counted."""
    kernel = NUTS(model, target_accept_prob=ACCEPTANCE, init_strategy=guides.init_to_base)
    sampler = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
        jit_model_args=True,
    )
    sampler.run(key, model.base.weights, train, extra_fields=("num_steps",))
    drawn = sampler.get_samples()
    adapters = jax.jit(lambda sites: jax.lax.map(lambda x: adapters_at(model, {}, x), sites))(drawn)
    _, values = evaluate(identifiable(model, train[:8]), model, adapters, train)
    gradients = int(np.sum(sampler.get_extra_fields()["num_steps"]))
    return float(bulk_ess(values.reshape(4, draws, -1)).min()), gradients


class Run(NamedTuple):
    """One call of a sampler: its name, the round, its smallest effective sample size, gradients and times."""

    sampler: str
    number: int
    ess: float
    gradients: int
    took: Took


def in_rounds(
    model: bl.Classifier, train: bl.Batch, rounds: int, *, warmup: int, draws: int
) -> Iterator[Run]:
    """Both samplers in alternating rounds."""
    for number in range(rounds):
        for name, sampler in {"blackjax": blackjax, "numpyro": numpyro}.items():
            with clock() as took:
                ess, gradients = sampler(jax.random.key(number), model, train, warmup, draws)
            yield Run(name, number, ess, gradients, took)


def rounds(report: Report, model: bl.Classifier, made: Target, given: argparse.Namespace) -> None:
    """Effective draws per second of both samplers in alternating rounds."""
    rates: dict[str, list[float]] = {"blackjax": [], "numpyro": []}
    title = f"Effective draws, {given.draws:,} draws a chain"
    table = report.table(title, ("sampler", "round", "least ESS", "s", "ESS / s", "gradients"))
    sizes = {"warmup": given.warmup, "draws": given.draws}
    for name, number, ess, gradients, took in in_rounds(model, made.train, given.rounds, **sizes):
        rates[name].append(ess / took.wall)
        cells = f"{ess:.0f}", f"{took.wall:.1f}", f"{ess / took.wall:.2f}", f"{gradients:,}"
        table.row(name, number, *cells)
    ratio = np.array(rates["blackjax"]) / np.array(rates["numpyro"])
    report.text(title, f"BlackJAX over NumPyro, round by round: {spread(ratio)}, median and middle 80 %.")


def trunk(report: Report, made: Target, train: bl.Batch) -> None:
    """Seconds of a gradient of one chain, on rows with and without cached activations."""
    vector = starts(jax.random.key(0), made, None, "zero", 1)[0]
    gradient = jax.jit(jax.grad(made.log_density))
    weights, _, affine = made.inputs
    plain = weights, train, affine
    programs = {
        "cached rows": (lambda _: gradient(vector, made.inputs), 30),
        "plain rows": (lambda _: gradient(vector, plain), 3),
    }
    table = report.table("A gradient of one chain", ("rows", "ms"))
    for name, (program, count) in programs.items():
        (taken,) = in_turn({name: program}, count, warm_up=1).values()
        table.row(name, f"{1e3 * np.median(taken.wall):.2f}")


def warm_start(report: Report, model: bl.Classifier, made: Target, given: argparse.Namespace) -> None:
    """Gradients of the warm-up if chains start at a fit, at the start of fits, or at draws of the prior."""
    guide = guides.Guide(model.prior, guides.mean_field())
    steps = {"num_steps": 500, "batch_size": len(made.train)}
    fit = bl.fit(jax.random.key(0), model, guide, made.train, optax.adam(1e-2), console=QUIET, **steps)
    few = {"num_warmup": given.warmup, "num_draws": 100, "target_acceptance": ACCEPTANCE}
    table = report.table("Gradients of the warm-up", ("start", "gradients, four chains"))
    for start, of in (("fit", fit), ("zero", None), ("prior", None), ("pathfinder", None)):
        chains = bl.sample_nuts(jax.random.key(1), model, made.train, init_strategy=start, given=of, **few)
        table.row(start, f"{chains.num_gradients['warm-up']:,}")


def options(parser: argparse.ArgumentParser) -> None:
    """The head, and draws."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--head", default="two-words", choices=list(HEADS))
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=300)


def run(given: argparse.Namespace, report: Report) -> None:
    """Run the three measurements."""
    model, train, _ = HEADS[given.head].load(smollm2())
    made = target(jax.random.key(0), model, train, sites=None, given=None, fix_at="mean", console=QUIET)
    trunk(report, made, train)
    warm_start(report, model, made, given)
    rounds(report, model, made, given)
