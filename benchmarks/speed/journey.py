"""Times to a result in Jupyter: first step, predict, `to_arviz` and `diagnose` of four fits, without caches.

Each fit runs in a new process without a compilation cache. The calls run one by one as in a user's session:
each may use programs compiled by the calls before. The rows are random tokens. `first step` is a whole
`bl.fit` or `bl.fit_core` of one step (`--steps`), with the cache of activations below the adapters.

`--base tiny --fits sparse-gp --rows 128 --others 128 --length 16 --rank 2 --steps 100 --draws 32` is a small
model, whose time is nearly all tracing and compiling. `--slowest 8` lists the slowest programs.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.monitoring
import numpy as np
import optax
from rich.console import Console

import bnlora as bl
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.app.recipe import Recipe
from bnlora.data.assets import fetch_smollm2
from bnlora.testing import tiny_base, tiny_rows

FITS = {"plain LoRA": "none", "normal prior": "normal", "sparse GP": "sparse-gp", "core": "core"}
BASES = {"smollm2": lambda: bl.load(fetch_smollm2()), "tiny": lambda: tiny_base(jax.random.key(1))}
CALLS = ("fit", "predict", "to_arviz", "diagnose", "compare")
RECIPE = Recipe(words=("a", "b"), top_layers=2)
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
QUIET = Console(quiet=True)


class Watch:
    """Seconds of tracing, lowering and compiling by program since the last `take`, as reported by JAX."""

    def __init__(self):
        self.seconds: dict[str, Counter[str]] = defaultdict(Counter)
        self.programs: Counter[str] = Counter()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **about: Any) -> None:
        stage = STAGES.get(event)
        if stage is None:
            return
        name = str(about.get("fun_name", "?"))
        self.seconds[stage][name] += seconds
        self.programs[name] += stage == "compile"

    def take(self, slowest: int) -> dict[str, Any]:
        """Return the recorded seconds and clear them."""
        heard: dict[str, Any] = {stage: self.seconds[stage].total() for stage in STAGES.values()}
        named = self.seconds["compile"].most_common(slowest)
        heard["slowest"] = [(name, self.programs[name], seconds) for name, seconds in named]
        heard["programs"] = self.programs.total()
        self.seconds, self.programs = defaultdict(Counter), Counter()
        return heard


def fitted(given: argparse.Namespace, base: bl.Base, train: bl.Batch) -> Any:
    """Fit of one kind."""
    key, label_ids = jax.random.key(given.seed), np.array([3, 5])
    if given.only == "core":
        return bl.fit_core(key, base, train, label_ids=label_ids, num_steps=given.steps, console=QUIET)
    model, guide = replace(RECIPE, prior=given.only, rank=given.rank).build(base, label_ids)
    size = {"num_steps": given.steps, "batch_size": 16, "console": QUIET}
    return bl.fit(key, model, guide, train, optax.adam(1e-2), **size)


def calls(given: argparse.Namespace) -> dict[str, Callable[[Any], Any]]:
    """The calls by name; each except the first takes the fit."""
    base = BASES[given.base]()
    size = {"length": given.length, "vocabulary": base.config.vocab_size}
    train = tiny_rows(jax.random.key(2), given.rows, **size)
    others = tiny_rows(jax.random.key(3), given.others, **size)
    predict, compare = jax.random.split(jax.random.key(4))

    def svi(fit: Any) -> bl.Fit:
        return fit.fit if given.only == "core" else fit

    return {
        "fit": lambda _: fitted(given, base, train),
        "predict": lambda fit: bl.predict(predict, fit, others, num_draws=given.draws, console=QUIET),
        "to_arviz": lambda fit: bl.to_arviz(jax.random.key(9), svi(fit), others),
        "diagnose": lambda fit: bl.diagnose(jax.random.key(9), svi(fit), others, console=QUIET),
        "compare": lambda fit: bl.compare(
            compare, svi(fit), svi(fit), others, against="anything", console=QUIET
        ),
    }


def measure(given: argparse.Namespace) -> None:
    """Run every call in this process, and print its numbers as a line of JSON."""
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    watch, todo, fit = Watch(), calls(given), None
    for name in given.calls:
        watch.take(0)
        with clock() as took:
            result = todo[name](fit)
        fit = result if name == "fit" else fit
        numbers = {"call": name, "wall": took.wall, "cpu": took.cpu}
        print(json.dumps(numbers | watch.take(given.slowest)), flush=True)


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes, fits and calls."""
    parser.add_argument("--base", choices=BASES, default="smollm2")
    parser.add_argument("--fits", nargs="*", choices=FITS.values(), default=list(FITS.values()))
    parser.add_argument("--calls", nargs="*", choices=CALLS, default=list(CALLS[:4]))
    parser.add_argument("--rows", type=int, default=64, help="training rows")
    parser.add_argument("--others", type=int, default=16, help="rows to predict and diagnose")
    parser.add_argument("--length", type=int, default=32, help="longest row in tokens")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--draws", type=int, default=8, help="draws of `predict`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slowest", type=int, default=0, help="number of slowest programs of a call to list")
    parser.add_argument("--only", choices=FITS.values(), help="one fit, in this process, as lines of JSON")


def run(given: argparse.Namespace, report: Report) -> None:
    """Run every fit in a new process."""
    if given.only:
        measure(given)
        return
    title = "Time to an answer"
    table = report.table(title, ("fit", "call", "s", "CPU s", "programs", "trace", "lower", "compile"))
    names = {kind: name for name, kind in FITS.items()}
    for kind in given.fits:
        command = [*_command(given), "--only", kind]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            one = json.loads(line)
            call = "first step" if (one["call"], given.steps) == ("fit", 1) else one["call"]
            stages = (f"{one[stage]:.1f}" for stage in STAGES.values())
            cells = f"{one['wall']:.1f}", f"{one['cpu']:.1f}", one["programs"]
            table.row(names[kind], call, *cells, *stages)
            for program, count, seconds in one["slowest"]:
                report.progress(f"    {seconds:7.2f} s  {count:3} x {program}")
        if process.wait():
            raise SystemExit(f"the process of {kind} stopped")
    report.text(
        title,
        f"{given.base}; {given.rows} training rows and {given.others} others of up to {given.length} tokens; "
        f"{given.draws} draws in `predict`.",
    )


def _command(given: argparse.Namespace) -> list[str]:
    """Command line of a process of this benchmark with the same sizes."""
    names = ("base", "rows", "others", "length", "rank", "steps", "draws", "seed", "slowest")
    sizes = [str(x) for name in names for x in (f"--{name}", getattr(given, name))]
    return [sys.executable, "-m", "benchmarks", "journey", *sizes, "--calls", *given.calls]
