"""The plan for large models: operations, exchanges and times against closed forms, without large arrays."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import chips, entry, hlo, planned
from benchmarks.chips import Chip, Work, roofline
from benchmarks.hlo import Program
from benchmarks.planned import PROGRAMS, Case, closed_form
from benchmarks.speed import scale

ROOT = Path(__file__).parents[2]
TINY = Case("tiny", "prediction", rows=4, length=32, draws=2)

TEXT = """
HloModule example

%inside (p: bf16[8,16]) -> f32[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %c = f32[8,16]{1,0} convert(%p)
}

%sum.clone_promoted (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %w = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %wide = f32[8,16]{1,0} fusion(%w), kind=kLoop, calls=%inside
  %all = f32[16,16]{1,0} all-gather(%wide), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %dot = f32[16,16]{1,0} dot(%all, %all), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%n, %w)
}

%condition (arg.1: (s32[], bf16[8,16])) -> pred[] {
  %arg.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[4,8], y: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%z, %q)
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %dot.1 = f32[4,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %total = f32[4,2]{1,0} all-reduce(%dot.1), replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%sum.clone_promoted
}
"""


# The text of a program -------------------------------------------------------------------------------------


def test_loops_count_times_their_turns():
    program = Program.read(TEXT, 8)
    inner, outer = 2 * 16 * 16 * 16, 2 * 4 * 2 * 8
    assert program.products(once=True) == inner + outer
    assert program.products() == 5 * inner + outer
    assert program.open_loops == 0
    assert Program.read(TEXT.replace("known_trip_count", "other"), 8).open_loops == 1


def test_bytes_of_collectives_are_those_of_a_ring():
    gather, total = Program.read(TEXT, 8).collectives()
    if gather.kind != "all-gather":
        gather, total = total, gather
    assert (gather.turns, total.turns) == (5, 1)
    assert gather.compiled == 16 * 16 * 4 / 2  # half of the result comes from the other device
    assert gather.sent == gather.compiled / 2  # it was bfloat16
    assert total.compiled == 2 * (4 * 2 * 4) * 3 / 4
    assert total.sent == total.compiled / 2  # the compiler marks what it promoted
    assert gather.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert (gather.leaves(4), gather.leaves(8), total.leaves(4)) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%sum", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_notation_of_groups_is_read(text, groups):
    assert hlo.groups_of(f"(%x), channel_id=1, {text}", 4).tolist() == groups


def test_an_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="unknown notation"):
        hlo.groups_of("(%x), replica_groups=mesh['a'=4] {'a':(1)2}", 4)


# Operations ------------------------------------------------------------------------------------------------


def compiled(case: Case) -> jax.stages.Compiled:
    function, arguments = PROGRAMS[case.program](case)
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize("program", ["prediction", "features"])
def test_products_are_those_of_the_closed_form_and_of_an_unrolled_program(program, monkeypatch):
    case = Case(**asdict(TINY) | {"program": program, "draws": 2 if program == "prediction" else 1})
    rolled = compiled(case)
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    flat = compiled(case)
    scanned, unrolled = Program.read(rolled.as_text()), Program.read(flat.as_text())
    # A loop computes the gradient of every layer's input, an unrolled program not that of the first layer's.
    readers = sum(math.prod(case.config.layer_modules[name]) for name in ("q_proj", "k_proj", "v_proj"))
    unused = 0 if program == "prediction" else 2 * case.rows * case.length * readers
    assert scanned.products() == pytest.approx(unrolled.products() + unused, rel=0.01)
    assert scanned.products() > scanned.products(once=True)
    # Beside the closed form there are products with two label words and the rotation's: O(1 / d_ff) of all.
    assert scanned.products() == pytest.approx(closed_form(case), rel=0.02)
    # XLA's own count of the unrolled program has the elementwise operations of every layer.
    whole, added = flat.cost_analysis()["flops"] + unused, scanned.products() - scanned.products(once=True)
    corrected = rolled.cost_analysis()["flops"] + added
    assert scanned.products() < corrected <= 1.01 * whole
    assert corrected == pytest.approx(whole, rel=0.1)


def test_the_closed_form_is_two_operations_a_weight_and_token():
    case = Case("7B", "prediction")
    kernels = sum(d_in * d_out for d_in, d_out in case.config.layer_modules.values())
    tokens = case.rows * case.length * case.config.num_layers
    attention = 4 * case.length * case.config.d_model
    assert closed_form(case) == pytest.approx(tokens * (2 * kernels + attention), rel=0.03)
    step = Case("7B", "step")
    assert 2.5 < closed_form(step) / closed_form(case) < 3  # forward, all but one product again, backward


# Several devices -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """Three cases in a process with eight devices."""
    tiny = asdict(TINY) | {"data": 2, "model": 4}
    cases = {
        "three layers": Case(**tiny),
        "five layers": Case(**tiny | {"layers": 5}),
        "30B": Case("30B", "prediction", data=2, model=4, split="fully"),
    }
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planned"],
        input="".join(json.dumps(asdict(case)) + "\n" for case in cases.values()),
        env=os.environ | {"XLA_FLAGS": flags}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_layer_sums_its_outputs_twice_over_the_axis_model(found):
    """Attention and feed-forward part sum (draws, rows, tokens, width) in bfloat16 over four devices."""
    config = TINY.config
    output = TINY.draws * (TINY.rows / 2) * TINY.length * config.d_model * 2
    more = found["five layers"]["sent"]["all-reduce"] - found["three layers"]["sent"]["all-reduce"]
    assert more == 2 * 2 * output * 2 * 3 / 4
    assert found["five layers"]["collectives"] - found["three layers"]["collectives"] == 2 * 2


def test_a_device_has_its_share_of_the_operations(found):
    """At the width of a large model elementwise operations and the head are below a hundredth of all."""
    assert found["30B"]["closed_form"] == closed_form(Case("30B", "prediction")) / 8
    assert found["30B"]["operations"] == pytest.approx(found["30B"]["closed_form"], rel=0.01)


def test_no_array_of_the_size_of_a_model_exists(found):
    x = found["30B"]
    assert x["parameters"] == pytest.approx(32.5e9, rel=0.01)
    assert x["weights"] == pytest.approx(2 * x["parameters"] / 8, rel=0.01)
    assert x["allocated"] == 0
    assert x["process"] < x["weights"] / 4


# Times and tables ------------------------------------------------------------------------------------------


def test_the_slowest_side_of_the_roofline_decides():
    chip = Chip("example", 100.0, 10.0, 20.0, 5.0, 1.0, 8, "")
    assert roofline(chip, Work(300.0, 20.0, 5.0, 1.0)) == (3.0, "operations")
    assert roofline(chip, Work(300.0, 80.0, 5.0, 1.0)) == (4.0, "memory")
    assert roofline(chip, Work(300.0, 80.0, 50.0, 1.0)) == (10.0, "exchange")
    assert roofline(chip, Work(300.0, 80.0, 5.0, 20.0)) == (20.0, "exchange")


def test_chips_state_their_source_and_are_of_one_order():
    for chip in chips.CHIPS:
        assert chip.source
        assert 1e14 < chip.peak < 1e15
        assert 1e10 < chip.network <= chip.link < chip.bandwidth < 1e13
        assert 1e10 < chip.memory < 1e11


def test_an_exchange_that_leaves_an_island_takes_the_network():
    x = {"weights": 10, "results": 1, "operations": 5.0, "sent": {"all-reduce": 8.0}, "far": 6.0}
    assert scale.work(Case("7B", data=8, model=8), x, 8) == Work(5.0, 31, 2.0, 6.0)
    assert scale.work(Case("7B", data=8, model=8), x, 256) == Work(5.0, 31, 8.0, 0.0)


def invented(cases, *_):
    """Numbers in the form of a measurement."""
    sent = dict.fromkeys(hlo.KINDS, 2e9)
    sizes = {"weights": 4e9, "arguments": 5e9, "results": 1e9, "temporaries": 30e9, "parameters": 7e9}
    costs = {
        "operations": 4e12,
        "closed_form": 2e12,
        "counted_once": 1e12,
        "sent": sent,
        "compiled_sent": 3e9,
    }
    rest = {"far": 0.0, "allocated": 0, "process": 1e9, "seconds": {"wall": 3.0, "cpu": 2.0}}
    return [{"case": asdict(case), **sizes, **costs, **rest} for case in cases]


def test_the_tables_have_a_row_for_every_case(monkeypatch, capsys):
    monkeypatch.setattr(scale, "measured", invented)
    few = ["--shapes", "tiny", "--meshes", "2x4", "--splits", "fully", "--rows", "4", "--length", "16"]
    assert entry.main(["scale", *few, "--grow", "rank"]) == 0
    shown = capsys.readouterr().out
    assert "| tiny | 2 x 4 | fully | 4.00 | 5.00 | 1.00 | 30.00 | 36.00 | yes, 45% | no, 225% |" in shown
    assert "| tiny | 2 x 4 | fully | 4.00 | 2.00 | 1.00 | 10.00 | 2.00 | 2.00 | 6.00 |" in shown
    assert shown.count("| tiny | 2 x 4 | fully |") == 3 * len(PROGRAMS)
    assert all(f"| rank | {rank} |" in shown for rank in (8, 16, 32))


@pytest.mark.parametrize("text", ["2", "2x", "0x4", "2x2x2", "axb"])
def test_a_mesh_is_two_numbers(text, capsys):
    with pytest.raises(SystemExit):
        entry.main(["scale", "--meshes", text])
    assert "a mesh must be two numbers, such as 2x4" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_step_is_compiled_on_a_mesh():
    x = planned.measured(Case("tiny", rows=4, length=32))
    assert x["open_loops"] == 1  # the steps of a call, whose number is an argument
    assert x["operations"] > x["closed_form"]
    assert np.isfinite(x["temporaries"])
