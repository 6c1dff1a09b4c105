"""Cost of a step, of a prediction and of compiling, on SmolLM2-135M: python benchmarks/step.py JOB.

    bayes     a step of the Bayesian fit over one of plain LoRA
    predict   prediction with S draws over S predictions with one draw, all from the tokens
    compile   tracing and compiling the Bayesian step of small random models of 12, 24 and 48 layers

What is compared runs in turn, round by round in one process (`rounds.py`). `step_torch.py` compares the step
of plain LoRA with that of torch and peft.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rounds import in_turn, show

import bnlora as bl
from bnlora.app.demo import RECIPE
from bnlora.app.recipe import PriorName
from bnlora.infer.svi.fit import State, _Loop, _prepare
from bnlora.prediction.predict import predict_with_draws
from bnlora.testing import tiny_base, tiny_rows

LABEL_IDS = np.array([100, 200])
DEPTHS = (12, 24, 48)


def loop_of(
    base: bl.Base, train: bl.Batch, prior: PriorName, *, top_layers: int | None, particles: int = 1
) -> tuple[_Loop, State]:
    """The step of plain LoRA ("none") or of the Bayesian fit, and its start; the prefix is cached."""
    label_ids = LABEL_IDS % base.config.vocab_size
    model, guide = replace(RECIPE, prior=prior, top_layers=top_layers).build(base, label_ids)
    train = bl.cache_prefix(model, train)
    adam = optax.adam(1e-3)
    return _prepare(
        jax.random.key(0), model, guide, train, adam, scale_optimizer=adam, num_particles=particles
    )


def bayes(arguments: argparse.Namespace) -> None:
    """Time a step of both fits."""
    base = RECIPE.load_base()
    size, length = arguments.batch_size, arguments.length
    train = tiny_rows(jax.random.key(0), 4 * size, length=length, vocabulary=base.config.vocab_size)
    options = {"top_layers": arguments.top_layers, "particles": arguments.particles}
    priors: tuple[PriorName, ...] = ("none", "sparse-gp")
    loops = {prior: loop_of(base, train, prior, **options) for prior in priors}
    states = {prior: state for prior, (_, state) in loops.items()}

    def step_of(prior: PriorName):
        def step(number: int) -> None:
            rows = (np.arange(size) + number) % len(train)
            states[prior] = loops[prior][0].run(states[prior], jax.random.key(number), rows)

        return step

    seconds = in_turn({prior: step_of(prior) for prior in priors}, arguments.rounds)
    counts = {n: sum(x.size for x in jax.tree.leaves(s.params)) for n, s in states.items()}
    which = "all layers" if arguments.top_layers is None else f"the upper {arguments.top_layers} layers"
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    show(f"{which}, {size} rows of {length}, parameters: {shown}", seconds, unit="step")


def predict(arguments: argparse.Namespace) -> None:
    """Time one prediction with S draws and S predictions with one."""
    base = RECIPE.load_base()
    rows = tiny_rows(jax.random.key(0), arguments.batch_size, length=arguments.length, vocabulary=49_152)
    draws, layers = arguments.draws, 15 if arguments.top_layers is None else arguments.top_layers
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
    title = f"adapters in {layers} of {base.num_layers} layers, {len(rows)} rows of {arguments.length}"
    show(title, in_turn(programs, arguments.rounds), unit="prediction")


def compiling(arguments: argparse.Namespace) -> None:
    """Time tracing and lowering, and compiling, of the Bayesian step at three depths."""
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    tiny = {depth: tiny_base(jax.random.key(0), num_layers=depth) for depth in DEPTHS}
    rows = tiny_rows(jax.random.key(0), arguments.batch_size)
    loops = {depth: loop_of(base, rows, "sparse-gp", top_layers=None) for depth, base in tiny.items()}

    def lower(depth: int) -> jax.stages.Lowered:
        jax.clear_caches()
        loop, state = loops[depth]
        given = (state, jax.random.key(0), loop.model.base.weights, loop.train, jnp.arange(len(rows)))
        return jax.jit(loop._traced_step).lower(*given)

    def finish(depth: int) -> None:
        lower(depth).compile()

    def call(run: Callable[[int], object], depth: int, _: int) -> None:
        run(depth)

    jobs = {"tracing and lowering": (lower, 1), "tracing, lowering and compiling": (finish, 0)}
    for what, (run, warm_up) in jobs.items():
        programs = {f"{depth} layers": partial(call, run, depth) for depth in DEPTHS}
        show(what, in_turn(programs, arguments.rounds, warm_up=warm_up), unit="program")
    for depth in DEPTHS:
        print(f"{depth} layers: {len(lower(depth).as_text()):,} characters of lowered text")


JOBS = {"bayes": bayes, "predict": predict, "compile": compiling}


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--top-layers", type=int, help="all, and 15 for predict, when omitted")
    arguments = parser.parse_args()
    began = time.perf_counter()
    JOBS[arguments.job](arguments)
    print(f"{arguments}; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
