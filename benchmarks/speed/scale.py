"""Memory, operations, exchange and least time of models of 7B to 30B on 8 and 64 devices, without them.

Four programs are compiled for CPU devices that stand for accelerators: a step of a fit (sparse GP, flow
guide; queries, values and head), the tangent features of a core model, the sums for its frames, and a
prediction. Weights are bfloat16 shapes (`jax.ShapeDtypeStruct`) on a mesh, so nothing of the size of a
model exists. Memory is XLA's account. Operations are XLA's too, but XLA counts the body of a loop once: the
products of the further turns are added (`benchmarks.hlo`), and the sum is compared with a closed form.
Exchanges are read from the compiled text, times the turns of their loops. The compiler for CPUs computes in
float32 what others compute in bfloat16, and fuses otherwise, so the temporaries of others differ.

Times are rooflines from the data sheets of chips (`benchmarks.chips`): lower bounds, never measured.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import optax

import bnlora as bl
from benchmarks.chips import CHIPS, Work, roofline
from benchmarks.planned import PROGRAMS, SIZES, TARGETS, Case, closed_form
from benchmarks.report import Report

GROWTH = {"draws": (2, 4), "layers": (8, 16), "rank": (16, 32), "inducing": (18, 36)}
"""Values of each factor beside the default, for the growth of cost on the smallest shape."""

DIRECTIONS = 16
"""Directions of each side of the core's frames, the default of `bnlora.frames`."""

TITLES = {
    "step": "A step of a fit",
    "features": "Tangent features",
    "frames": "Sums for the frames of a core",
    "prediction": "A prediction",
}
PASSES = {"step": 3, "features": 3, "frames": 3, "prediction": 1}
"""How often a program reads the weights: forward, again, backward."""

TOPOLOGY = "v5e:2x4"


def options(parser: argparse.ArgumentParser) -> None:
    """Shapes, meshes, programs, and sizes of a step."""
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=["7B", "13B", "30B"])
    parser.add_argument(
        "--meshes", nargs="+", type=mesh_size, default=[(2, 4), (8, 8)], help="data x model, such as 2x4"
    )
    parser.add_argument("--splits", nargs="+", choices=["tensor", "fully"], default=["tensor", "fully"])
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--rows", type=int, default=32, help="rows of a step and of a prediction")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--draws", type=int, default=8, help="draws of a prediction")
    parser.add_argument("--remat", choices=["none", "elementwise", "attention", "layers"], default="layers")
    parser.add_argument("--grow", nargs="*", choices=list(GROWTH), default=list(GROWTH))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at the same time")
    parser.add_argument("--tpu", action="store_true", help=f"also compile for {TOPOLOGY} (needs libtpu)")


def mesh_size(text: str) -> tuple[int, int]:
    """Devices along "data" and "model" of a text such as 2x4."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"a mesh must be two numbers, such as 2x4; got {text!r}")
    return int(sizes[0]), int(sizes[1])


def measured(cases: Sequence[Case], jobs: int, report: Report) -> list[dict[str, Any]]:
    """The measurement of every case, from processes with enough devices.

    Raises:
        RuntimeError: If a process fails; the message has the end of its output.
    """
    devices = max(case.devices for case in cases)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}

    def run(some: Sequence[Case]) -> list[dict[str, Any]]:
        lines = "".join(json.dumps(asdict(case)) + "\n" for case in some)
        command = [sys.executable, "-m", "benchmarks.planned"]
        done = subprocess.run(
            command, input=lines, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"compiling {some} failed: {done.stderr[-2000:]}")
        found = [json.loads(line) for line in done.stdout.splitlines()]
        report.progress(f"compiled {len(found)} programs")
        return found

    parts = [cases[begin::jobs] for begin in range(min(jobs, len(cases)))]
    with ThreadPoolExecutor(len(parts)) as threads:
        found = list(threads.map(run, parts))
    return [found[index % len(parts)][index // len(parts)] for index in range(len(cases))]


def meshes_of(given: argparse.Namespace, program: str) -> list[Case]:
    """The cases of one program."""
    inducing = DIRECTIONS if program in ("features", "frames") else Case.inducing
    common = {"rows": given.rows, "length": given.length, "remat": given.remat, "inducing": inducing}
    common["draws"] = given.draws if program == "prediction" else 1
    return [
        Case(shape, program, data, model, split, **common)
        for shape in given.shapes
        for data, model in given.meshes
        for split in given.splits
    ]


def run(given: argparse.Namespace, report: Report) -> None:
    """Compile everything, and print the tables."""
    one = [Case(shape, rows=given.rows, length=given.length, remat=given.remat) for shape in given.shapes]
    grown = [replace(one[0], **{factor: value}) for factor in given.grow for value in _values(one[0], factor)]
    by_program = {program: meshes_of(given, program) for program in given.programs}
    cases = [*one, *grown, *(case for some in by_program.values() for case in some)]
    found = dict(zip(cases, measured(cases, given.jobs, report), strict=True))
    shapes(report, one, found)
    for program, some in by_program.items():
        programs(report, program, some, found)
        times(report, program, some, found)
    estimates(report, one, found)
    if given.grow:
        growth(report, one[0], given.grow, found)
    compiling(report, found.values())
    if given.tpu:
        on_tpu(report, given)


def _values(case: Case, factor: str) -> list[int]:
    """Values of a factor; a shape with few layers has fewer of them."""
    return [x for x in GROWTH[factor] if factor != "layers" or x < case.config.num_layers]


def shapes(report: Report, one: Sequence[Case], found: dict[Case, dict[str, Any]]) -> None:
    """Sizes of the models, and of what a step computes."""
    header = ("shape", "parameters", "weights in bfloat16, GB", "tokens a step", "TFLOP a step, closed form")
    table = report.table("Shapes", header)
    for case in one:
        x = found[case]
        numbers = f"{x['parameters'] / 1e9:.2f}e9", gigabytes(x["weights"]), f"{case.rows * case.length:,}"
        table.row(case.shape, *numbers, f"{closed_form(case) / 1e12:,.1f}")
    report.text(
        "Shapes",
        f"A step has {one[0].rows} rows of {one[0].length} tokens; remat {one[0].remat!r}; adapters of rank "
        f"{one[0].rank} on {', '.join(TARGETS)}; {one[0].inducing} inducing rows and columns.",
    )


def programs(report: Report, program: str, cases: Sequence[Case], found: dict[Case, dict[str, Any]]) -> None:
    """Memory, operations and exchange of one program, by shape, mesh and split."""
    header = ("shape", "data x model", "split", "weights, GB", "arguments", "results", "temporaries")
    header += ("in all", *(f"fits {chip.name}" for chip in CHIPS))
    title = f"{TITLES[program]}: bytes a device"
    table = report.table(title, header)
    for case in cases:
        x = found[case]
        sizes = [x[name] for name in ("weights", "arguments", "results", "temporaries")]
        fits = (f"{'yes' if total(x) <= c.memory else 'no'}, {total(x) / c.memory:.0%}" for c in CHIPS)
        table.row(*names(case), *map(gigabytes, (*sizes, total(x))), *fits)
    title = f"{TITLES[program]}: operations and exchange of a device"
    header = ("shape", "data x model", "split", "TFLOP", "over the closed form", "XLA, loops once")
    header += ("GB sent", "all-gather", "all-reduce", "other", "between islands of 8", "in the CPU's float32")
    table = report.table(title, header)
    for case in cases:
        x = found[case]
        sent, gathered, summed = sum(x["sent"].values()), x["sent"]["all-gather"], x["sent"]["all-reduce"]
        table.row(
            *names(case), f"{x['operations'] / 1e12:.2f}", f"{x['operations'] / x['closed_form']:.2f}",
            f"{x['counted_once'] / 1e12:.2f}",
            *map(gigabytes, (sent, gathered, summed, sent - gathered - summed, x["far"], x["compiled_sent"])),
        )  # fmt: skip


def times(report: Report, program: str, cases: Sequence[Case], found: dict[Case, dict[str, Any]]) -> None:
    """The roofline of one program on every chip."""
    title = f"{TITLES[program]}: least milliseconds, and what decides them"
    table = report.table(title, ("shape", "data x model", "split", *(chip.name for chip in CHIPS)))
    for case in cases:
        bounds = (roofline(chip, work(case, found[case], chip.island)) for chip in CHIPS)
        table.row(*names(case), *(f"{1e3 * seconds:,.0f} ({side})" for seconds, side in bounds))


def work(case: Case, x: dict[str, Any], island: int) -> Work:
    """What a device does at least: it reads its weights in every pass, and writes the results."""
    sent = sum(x["sent"].values())
    far = x["far"] if case.devices > island else 0.0
    return Work(x["operations"], PASSES[case.program] * x["weights"] + x["results"], sent - far, far)


def estimates(report: Report, one: Sequence[Case], found: dict[Case, dict[str, Any]]) -> None:
    """`bl.estimate`, which compiles nothing, beside XLA's account of the step on one device."""
    title = "bl.estimate and XLA, a step on one device"
    table = report.table(title, ("shape", "part", "bl.estimate, GB", "XLA, GB", "ratio"))
    for case in one:
        base, prior = case.base(), bl.priors.sparse_gp(rows=case.inducing, cols=case.inducing)
        size = bl.estimate(
            base, bl.select(base, list(TARGETS), rank=case.rank), prior, guide=bl.guides.SiteFlow,
            batch=(case.rows, case.length), num_rows=1024, optimizer=optax.adam(1e-2), prefix_cache="off",
        )  # fmt: skip
        x = found[case]
        ours = {"weights": size.weights, "temporaries": size.temporary, "in all": size.step}
        theirs = {"weights": x["weights"], "temporaries": x["temporaries"], "in all": total(x)}
        for part, value in ours.items():
            row = gigabytes(value), gigabytes(theirs[part]), f"{value / theirs[part]:.2f}"
            table.row(case.shape, part, *row)


def growth(report: Report, first: Case, factors: Iterable[str], found: dict[Case, dict[str, Any]]) -> None:
    """How the cost of a step grows with one factor at a time, on one device."""
    title = f"Growth of a step with one factor, {first.shape} on one device"
    header = ("factor", "value", "TFLOP", "beside the closed form, TFLOP", "temporaries, GB")
    table = report.table(title, header)
    for factor in factors:
        default = first.config.num_layers if factor == "layers" else getattr(first, factor)
        cases = {default: first} | {v: replace(first, **{factor: v}) for v in _values(first, factor)}
        for value, case in sorted(cases.items()):
            x = found[case]
            beside = (x["operations"] - x["closed_form"]) / 1e12
            row = f"{x['operations'] / 1e12:.2f}", f"{beside:.2f}", gigabytes(x["temporaries"])
            table.row(FACTORS[factor], value, *row)


FACTORS = {
    "draws": "draws of the guide (particles)",
    "layers": "layers",
    "rank": "rank",
    "inducing": "inducing rows and columns",
}


def compiling(report: Report, found: Iterable[dict[str, Any]]) -> None:
    """What the compilations took."""
    table = report.table("Compiling", ("program", "programs", "CPU s each", "largest process, GB", "arrays"))
    for program in PROGRAMS:
        some = [x for x in found if x["case"]["program"] == program]
        if some:
            seconds = [x["seconds"]["cpu"] for x in some]
            largest = gigabytes(max(x["process"] for x in some))
            arrays = f"{max(x['allocated'] for x in some):,} bytes"
            table.row(program, len(some), f"{min(seconds):.0f} to {max(seconds):.0f}", largest, arrays)


def on_tpu(report: Report, given: argparse.Namespace) -> None:
    """One prediction through the compiler of a TPU and through that of the CPU, loops counted once."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("--tpu needs libtpu", name="libtpu")
    data, model = map(int, TOPOLOGY.split(":")[1].split("x"))
    case = Case(
        given.shapes[0], "prediction", data, model, rows=given.rows, length=given.length, draws=given.draws
    )
    both = measured([case, replace(case, topology=TOPOLOGY)], 1, report)
    title = f"A prediction of {case.shape} through the TPU's compiler ({TOPOLOGY})"
    header = ("compiler", "arguments, GB", "temporaries, GB", "TFLOP, loops once", "GB sent, loops once")
    table = report.table(title, header)
    for name, x in zip(("CPU", "TPU"), both, strict=True):
        numbers = gigabytes(x["arguments"]), gigabytes(x["temporaries"]), f"{x['counted_once'] / 1e12:.3f}"
        table.row(name, *numbers, gigabytes(x["sent_once"]))
        report.progress(f"{name}: {x['seconds']['cpu']:.0f} CPU s")


def names(case: Case) -> tuple[str, str, str]:
    """Shape, mesh and split."""
    return case.shape, f"{case.data} x {case.model}", case.split


def total(x: dict[str, Any]) -> int:
    """All memory of a program on a device."""
    return x["arguments"] + x["results"] + x["temporaries"]


def gigabytes(size: float) -> str:
    """Bytes in units of 1e9."""
    return f"{size / 1e9:,.2f}"
