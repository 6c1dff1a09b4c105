"""Ratio of a Bayesian step to a plain one, of many draws to one, and compile time at three depths.

    bayes        time of a step of the Bayesian fit relative to plain LoRA, on SmolLM2-135M
    completions  time of a step on questions with four choices, relative to one on as many rows of words
    predict      time of a prediction with S draws relative to S predictions with one, all from the tokens
    compile      tracing and compiling the Bayesian step of small random models of 12, 24 and 48 layers

The compared programs alternate in one process. `step_torch` compares the step of plain LoRA with that of
torch and peft.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import datasets
import jax
import numpy as np
import optax

import bnlora as bl
from benchmarks.report import Report
from benchmarks.steps import Started, svi_step
from benchmarks.timing import in_turn, show
from bnlora.app.demo import RECIPE
from bnlora.app.recipe import PriorName
from bnlora.prediction.predict import predict_with_draws
from bnlora.testing import tiny_base, tiny_rows

LABEL_IDS = np.array([100, 200])
DEPTHS = (12, 24, 48)
RATE = 1e-3


def step_of(
    base: bl.Base,
    train: bl.Batch,
    prior: PriorName,
    *,
    top_layers: int | None,
    batch_size: int,
    particles: int = 1,
    init_params: dict[str, jax.Array] | None = None,
) -> Started:
    """The step of plain LoRA ("none") or of the Bayesian fit, with a cached prefix."""
    label_ids = LABEL_IDS % base.config.vocab_size
    model, guide = replace(RECIPE, prior=prior, top_layers=top_layers).build(base, label_ids)
    train, adam = bl.cache_prefix(model, train), optax.adam(RATE)
    size = {"batch_size": batch_size, "num_particles": particles}
    return svi_step(jax.random.key(0), model, guide, train, adam, init_params=init_params, **size)


def layers_text(top_layers: int | None) -> str:
    """The adapted layers, in words."""
    return "all layers" if top_layers is None else f"the upper {top_layers} layers"


def bayes(given: argparse.Namespace, report: Report) -> None:
    """Time a step of both fits."""
    base = RECIPE.load_base()
    size = given.batch_size
    train = tiny_rows(jax.random.key(0), 4 * size, length=given.length, vocabulary=base.config.vocab_size)
    about = {"top_layers": given.top_layers, "batch_size": size, "particles": given.particles}
    priors: tuple[PriorName, ...] = ("none", "sparse-gp")
    steps = {prior: step_of(base, train, prior, **about) for prior in priors}
    states = {prior: step.state for prior, step in steps.items()}

    def run(prior: PriorName, number: int) -> None:
        rows = (np.arange(size) + number) % len(train)
        states[prior] = steps[prior].run(states[prior], jax.random.key(number), rows)

    times = in_turn({prior: partial(run, prior) for prior in priors}, given.rounds)
    title = f"Bayesian over plain step, {layers_text(given.top_layers)}"
    show(report, title, times, unit="step")
    counts = {n: sum(x.size for x in jax.tree.leaves(s.params)) for n, s in states.items()}
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    report.text(title, f"{size} rows of {given.length} tokens; parameters: {shown}.")


def predict(given: argparse.Namespace, report: Report) -> None:
    """Time one prediction with S draws and S predictions with one."""
    base = RECIPE.load_base()
    rows = tiny_rows(jax.random.key(0), given.batch_size, length=given.length, vocabulary=49_152)
    draws, layers = given.draws, 15 if given.top_layers is None else given.top_layers
    model, _ = replace(RECIPE, top_layers=layers).build(base, LABEL_IDS)
    key = jax.random.key(1)
    adapters = {
        name: {f: 0.02 * jax.random.normal(key, (draws, *shape)) for f, shape in site.shapes.items()}
        for name, site in model.sites.items()
    }

    def together(_: int) -> None:
        predict_with_draws(model, adapters, rows, batch_size=len(rows))

    def apart(_: int) -> None:
        for draw in range(draws):
            one = jax.tree.map(lambda x, s=draw: x[s : s + 1], adapters)
            predict_with_draws(model, one, rows, batch_size=len(rows))

    programs = {f"{draws} predictions of one draw": apart, f"one of {draws} draws": together}
    title = f"Prediction, {layers_text(layers)}"
    show(report, title, in_turn(programs, given.rounds), unit="prediction")
    report.text(title, f"{len(rows)} rows of {given.length} tokens.")


def completions(given: argparse.Namespace, report: Report) -> None:
    """Time a step of plain LoRA on the log-likelihood of completions, and on label words of as many rows."""
    base, random = RECIPE.load_base(), np.random.default_rng(0)
    count, choices = given.batch_size, 4

    def text(tokens: int) -> str:
        return base.tokenizer.decode(random.integers(1000, 40_000, tokens))

    rows = {
        "context": [text(given.length - 6) for _ in range(count)],
        "choices": [[text(6) for _ in range(choices)] for _ in range(count)],
        "label": random.integers(0, choices, count).tolist(),
    }
    columns = {"context": "context", "choices": "choices", "label": "label"}
    questions = bl.multiple_choice(
        datasets.Dataset.from_dict(rows), base.tokenizer, **columns, max_length=given.length
    ).train
    words = tiny_rows(jax.random.key(0), choices * count, length=given.length, vocabulary=49_152)
    layers = None if given.top_layers is None else slice(-given.top_layers, None)
    kinds = {
        "words": (words, bl.likelihoods.Words((100, 200))),
        "completions": (questions, bl.likelihoods.Completions(choices)),
    }
    steps, states = {}, {}
    for name, (batch, likelihood) in kinds.items():
        sites = bl.select(base, ["q_proj", "k_proj", "v_proj"], rank=8, layers=layers)
        model = bl.Classifier(base, sites, bl.priors.point(), likelihood=likelihood)
        cached, guide = bl.cache_prefix(model, batch), bl.guides.Guide(model.prior, bl.guides.delta())
        steps[name] = svi_step(
            jax.random.key(0), model, guide, cached, optax.adam(RATE), batch_size=len(batch)
        )
        states[name] = steps[name].state

    def run(name: str, number: int) -> None:
        rows = np.arange(steps[name].batch_size)
        states[name] = steps[name].run(states[name], jax.random.key(number), rows)

    times = in_turn({name: partial(run, name) for name in kinds}, given.rounds)
    title = f"Completions over words, {layers_text(given.top_layers)}"
    show(report, title, times, unit="step")
    about = f"{count} questions of {choices} choices, {given.length} tokens; {choices * count} rows of words."
    report.text(title, about)


def compiling(given: argparse.Namespace, report: Report) -> None:
    """Time tracing and lowering, and compiling, of the Bayesian step at three depths."""
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    tiny = {depth: tiny_base(jax.random.key(0), num_layers=depth) for depth in DEPTHS}
    rows = tiny_rows(jax.random.key(0), given.batch_size)
    about = {"top_layers": None, "batch_size": len(rows)}
    steps = {depth: step_of(base, rows, "sparse-gp", **about) for depth, base in tiny.items()}

    def lower(depth: int) -> jax.stages.Lowered:
        jax.clear_caches()
        return steps[depth].lower("default")

    def finish(depth: int) -> None:
        lower(depth).compile()

    def call(run: Callable[[int], object], depth: int, _: int) -> None:
        run(depth)

    jobs = {"Tracing and lowering": (lower, 1), "Tracing, lowering and compiling": (finish, 0)}
    for what, (run, warm_up) in jobs.items():
        programs = {f"{depth} layers": partial(call, run, depth) for depth in DEPTHS}
        show(report, what, in_turn(programs, given.rounds, warm_up=warm_up), unit="program")
    table = report.table("Length of the lowered text", ("layers", "characters"))
    for depth in DEPTHS:
        table.row(depth, f"{len(lower(depth).as_text()):,}")


JOBS = {"bayes": bayes, "completions": completions, "predict": predict, "compile": compiling}


def options(parser: argparse.ArgumentParser) -> None:
    """The job and its sizes."""
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--particles", type=int, default=1, help="draws of the guide in a step")
    parser.add_argument("--draws", type=int, default=16, help="draws of a prediction")
    parser.add_argument("--top-layers", type=int, help="default: all, or 15 for predict")


def run(given: argparse.Namespace, report: Report) -> None:
    """Run one job."""
    JOBS[given.job](given, report)
