"""What a new process pays before anything has run twice: fit, predict, to_arviz, diagnose and compare.

A random Llama of four layers, 128 rows, rank 2 on two families and the head, the sparse-GP prior and the
guide of the paper. A step takes milliseconds, so nearly all of each time is tracing and compiling. There is
no compilation cache, and the five run in turn, as a user does: what one has compiled, the next may use.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import optax
from rich.console import Console

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

ROWS, STEPS, BATCH = 128, 100, 16
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
QUIET = Console(quiet=True)


class Watch:
    """Seconds of tracing, lowering and compiling by program, as JAX reports them, since the last `take`."""

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

    def take(self) -> tuple[dict[str, Counter[str]], Counter[str]]:
        """What was heard, which is then forgotten."""
        heard = dict(self.seconds), self.programs
        self.seconds, self.programs = defaultdict(Counter), Counter()
        return heard


def jobs() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The five calls by name; each takes what those before it returned."""
    base = tiny_base(jax.random.key(1))
    rows = tiny_rows(jax.random.key(2), 2 * ROWS, length=16)
    train, others = rows[:ROWS], rows[ROWS:]
    sites = bl.select(base, ["q_proj", "k_proj", "lm_head"], rank=2)
    model = bl.Classifier(base, sites, bl.priors.sparse_gp(), label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior, lam_max=0.03)
    fit, predict, compare = jax.random.split(jax.random.key(3), 3)
    size = {"num_steps": STEPS, "batch_size": BATCH, "console": QUIET}
    return {
        "fit": lambda _: bl.fit(fit, model, guide, train, optax.adam(1e-2), **size),
        "predict": lambda made: bl.predict(predict, made["fit"], others, console=QUIET),
        "to_arviz": lambda made: bl.to_arviz(made["fit"], others),
        "diagnose": lambda made: bl.diagnose(made["fit"], others, console=QUIET),
        "compare": lambda made: bl.compare(
            compare, made["fit"], made["fit"], others, against="anything", console=QUIET
        ),
    }


def run(watch: Watch, slowest: int = 0) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Run all five, print a line for each, and return the numbers of these lines and the results."""
    todo, made, lines = jobs(), {}, {}
    watch.take()
    print(f"{'':10}{'wall s':>9}{'CPU s':>9}{'programs':>10}{'trace s':>9}{'lower s':>9}{'compile s':>11}")
    for name, job in todo.items():
        wall, cpu = time.perf_counter(), time.process_time()
        made[name] = job(made)
        line = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        seconds, programs = watch.take()
        line["programs"] = programs.total()
        line |= {stage: seconds.get(stage, Counter()).total() for stage in STAGES.values()}
        lines[name] = line
        print(
            f"{name:10}{line['wall']:9.1f}{line['cpu']:9.1f}{line['programs']:10.0f}"
            f"{line['trace']:9.1f}{line['lower']:9.1f}{line['compile']:11.1f}",
            flush=True,
        )
        for program, taken in seconds.get("compile", Counter()).most_common(slowest):
            print(f"    {taken:7.2f} s  {programs[program]:3} x {program}")
    return lines, made


def main() -> None:
    """Print the table, and write its numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slowest", type=int, default=0, help="name the so many slowest programs of each")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    lines, _ = run(Watch(), options.slowest)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
