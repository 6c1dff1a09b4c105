"""What sampling costs: BlackJAX against NumPyro, cached trunk, warm start: python benchmarks/nuts.py.

Both NUTS samplers get the same head, adaptation target, diagonal mass matrix, chains, warm-up and draws, one
after the other in one process, in turns. A round's number is the least bulk effective sample size over the
identifiable functions by the seconds of the whole call, compiling included, and without it by gradients.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from heads import HEADS, smollm2
from numpyro.infer import MCMC, NUTS
from rich.console import Console

import bnlora as bl
from bnlora import guides
from bnlora._util.display import Table
from bnlora.infer.mcmc.target import Target, starts, target
from bnlora.metrics.monte_carlo import bulk_ess
from bnlora.prediction.functions import evaluate, identifiable
from bnlora.program.draws import adapters_at

QUIET = Console(quiet=True)
ACCEPTANCE = 0.9


def blackjax(
    key: jax.Array, model: bl.Classifier, train: bl.Batch, warmup: int, draws: int
) -> tuple[float, int]:
    """Least effective sample size and gradients."""
    options = {"num_warmup": warmup, "num_draws": draws, "target_acceptance": ACCEPTANCE}
    chains = bl.sample_nuts(key, model, train, init_strategy="zero", **options)
    return float(bulk_ess(chains.values()[1]).min()), sum(chains.num_gradients.values())


def numpyro(
    key: jax.Array, model: bl.Classifier, train: bl.Batch, warmup: int, draws: int
) -> tuple[float, int]:
    """The same by NumPyro's sampler; it does not report the gradients of its warm-up, which count as none."""
    kernel = NUTS(model, target_accept_prob=ACCEPTANCE, init_strategy=guides.init_to_base)
    sampler = MCMC(
        kernel,
        num_warmup=warmup,
        num_draws=draws,
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


def rounds(model: bl.Classifier, made: Target, arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Effective draws per second of both samplers in alternating rounds."""
    found: dict[str, list[float]] = {"blackjax": [], "numpyro": []}
    lines = []
    for number in range(arguments.rounds):
        for name, sampler in (("blackjax", blackjax), ("numpyro", numpyro)):
            began = time.perf_counter()
            ess, gradients = sampler(
                jax.random.key(number), model, made.train, arguments.warmup, arguments.draws
            )
            seconds = time.perf_counter() - began
            found[name].append(ess / seconds)
            lines.append(
                (name, str(number), f"{ess:.0f}", f"{seconds:.1f}", f"{ess / seconds:.2f}", f"{gradients:,}")
            )
            print(" | ".join(lines[-1]), flush=True)
    ratio = np.array(found["blackjax"]) / np.array(found["numpyro"])
    spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
    return [*lines, ("ratio", "", "", "", spread, "")]


def seconds_of(call: Callable[[], jax.Array], repeats: int) -> float:
    """Median seconds of a compiled call."""
    call().block_until_ready()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def trunk(made: Target, train: bl.Batch) -> float:
    """Seconds of a gradient of one chain on plain rows over seconds on cached ones."""
    vector = starts(jax.random.key(0), made, None, "zero", 1)[0]
    gradient = jax.jit(jax.grad(made.log_density))
    cached = seconds_of(lambda: gradient(vector, made.inputs), 30)
    plain = seconds_of(lambda: gradient(vector, (made.inputs[0], train)), 3)
    print(f"gradient on cached rows {1e3 * cached:.2f} ms, on plain rows {1e3 * plain:.0f} ms", flush=True)
    return plain / cached


def warm_start(model: bl.Classifier, made: Target, arguments: argparse.Namespace) -> None:
    """Gradients of the warm-up from a fit, from the start of fits and from draws of the prior."""
    guide = guides.Guide(model.prior, guides.mean_field())
    steps = {"num_steps": 500, "batch_size": len(made.train)}
    fit = bl.fit(jax.random.key(0), model, guide, made.train, optax.adam(1e-2), console=QUIET, **steps)
    options = {"num_warmup": arguments.warmup, "num_draws": 100, "target_acceptance": ACCEPTANCE}
    for start, given in (("fit", fit), ("zero", None), ("prior", None), ("pathfinder", None)):
        chains = bl.sample_nuts(
            jax.random.key(1), model, made.train, init_strategy=start, given=given, **options
        )
        print(f"start {start}: {chains.num_gradients['warm-up']:,} gradients in the warm-up", flush=True)


def main() -> None:
    """Print the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", default="two-words", choices=list(HEADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=300)
    arguments = parser.parse_args()
    model, train, _ = HEADS[arguments.head].load(smollm2())
    made = target(jax.random.key(0), model, train, sites=None, given=None, fix_at="mean", console=QUIET)
    print(f"plain over cached: {trunk(made, train):.0f}", flush=True)
    warm_start(model, made, arguments)
    header = ("sampler", "round", "least ESS", "s", "ESS / s", "gradients")
    Console(width=110).print(Table(f"{arguments}", header, tuple(rounds(model, made, arguments))))


if __name__ == "__main__":
    main()
