"""Checkpoints: a fit that goes on has the bits of one that was never stopped, and others are refused."""

import functools
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.infer.svi import validation
from bnlora.infer.svi.step import Step
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS, OTHERS = tiny_rows(jax.random.key(2), 24), tiny_rows(jax.random.key(3), 12)
SITES = bl.select(BASE, ["lm_head"], rank=2)
LOOKS = {"validation": OTHERS, "early_stopping": bl.EarlyStopping(every=4, patience=100)}


def fitted(folder=None, *, prior=None, rows=ROWS, key=KEY, rate=0.05, base=BASE, every=5, keep=2, **options):
    model = bl.Classifier(base, SITES, prior or bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    kept = None if folder is None else bl.Checkpoints(folder, every=every, keep=keep)
    sizes = {"num_steps": 23, "batch_size": 8} | options
    return bl.fit(key, model, guide, rows, optax.adam(rate), checkpoints=kept, **sizes)


@functools.cache
def unbroken(*, looks: bool = False) -> bl.Fit:
    """The fit without checkpoints, with or without validation rows."""
    return fitted(**(LOOKS if looks else {}))


def assert_same(first: bl.Fit, second: bl.Fit) -> None:
    """Bit by bit."""
    for name in ("params", "last_params", "history", "validation"):
        jax.tree.map(np.testing.assert_array_equal, getattr(first, name), getattr(second, name))
    assert (first.stopped, first.best_step) == (second.stopped, second.best_step)
    assert first.skipped_steps == second.skipped_steps


def stop_after(step: int, monkeypatch) -> None:
    """Let the next fit be interrupted after this many steps."""
    run = Step.run

    def interrupted(self, state, key, rows):
        if len(self.steps) >= step:
            raise KeyboardInterrupt
        return run(self, state, key, rows)

    monkeypatch.setattr(Step, "run", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("looks", [False, True])
def test_a_fit_goes_on_bit_for_bit(step, looks, tmp_path, monkeypatch):
    rules = LOOKS if looks else {}
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        partial = fitted(tmp_path, **rules)
    assert partial.stopped == "interrupted"
    assert step <= len(partial.step_seconds) < 23
    assert_same(fitted(tmp_path, **rules), unbroken(looks=looks))


def test_a_fit_that_has_ended_is_handed_over_at_once(tmp_path, monkeypatch):
    first = fitted(tmp_path)
    monkeypatch.setattr(Step, "run", None)
    again = fitted(tmp_path)
    assert_same(again, first)
    assert again.num_traces == 0


def test_an_interrupt_while_rows_are_evaluated_skips_no_evaluation(tmp_path, monkeypatch):
    evaluate, calls = validation.outputs_with_draws, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "outputs_with_draws", interrupted)
        partial = fitted(tmp_path, **LOOKS)
    assert (partial.stopped, len(partial.step_seconds)) == ("interrupted", 8)
    assert_same(fitted(tmp_path, **LOOKS), unbroken(looks=True))


@pytest.mark.parametrize("rule", ["patience", "plateau"])
def test_a_rule_that_ended_a_fit_stays_obeyed(rule, tmp_path, monkeypatch):
    rules = {
        "patience": {"validation": OTHERS, "early_stopping": bl.EarlyStopping(every=2, patience=2)},
        "plateau": {"plateau": bl.Plateau(window=5, tolerance=500.0)},
    }[rule]
    first = fitted(tmp_path, rate=0.5, num_steps=300, **rules)
    assert first.stopped == rule
    monkeypatch.setattr(Step, "run", None)
    assert_same(fitted(tmp_path, rate=0.5, num_steps=300, **rules), first)


def test_a_divergence_is_not_gone_on_with(tmp_path, monkeypatch):
    budget = {"optimisation": bl.Optimisation(skip_budget=2)}
    with pytest.raises(bl.FitDiverged) as first:
        fitted(tmp_path, rate=1e30, **budget)
    monkeypatch.setattr(Step, "run", None)
    with pytest.raises(bl.FitDiverged) as again:
        fitted(tmp_path, rate=1e30, **budget)
    assert_same(first.value.fit, again.value.fit)


def test_more_steps_go_on_and_fewer_are_refused(tmp_path):
    fitted(tmp_path)
    assert_same(fitted(tmp_path, num_steps=31), fitted(num_steps=31))
    with pytest.raises(ValueError, match="num_steps must be at least the 31 steps of the checkpoint; got 23"):
        fitted(tmp_path)


def test_the_oldest_are_removed(tmp_path):
    fitted(tmp_path, keep=3)
    assert {p.name for p in tmp_path.iterdir() if p.name.isdigit()} == {"15", "20", "23"}


CHANGES = {
    "another key": ({"key": jax.random.key(9)}, r"key: \[0, 0\], now \[0, 9\]"),
    "other rows": ({"rows": OTHERS}, "training rows: "),
    "another prior": ({"prior": bl.priors.normal(scale=2.0)}, "prior: "),
    "another rate": ({"rate": 0.06}, "optimiser: "),
    "another base": ({"base": tiny_base(jax.random.key(7), num_layers=2)}, "frozen weights: "),
    "other batches": ({"batch_size": 6}, "batch_size: 8, now 6"),
    "validation": ({"validation": OTHERS}, "validation rows: null, now "),
    "particles": ({"num_particles": 2}, "num_particles: 1, now 2"),
    "clipping": ({"optimisation": bl.Optimisation(clip_norm=1.0)}, "optimiser: "),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    fitted(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_checkpoints_of_another_fit_are_refused(name, kept):
    changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=rf"holds checkpoints of another fit \({message}"):
        fitted(kept, **changes)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_serves(tmp_path):
    fitted(tmp_path)
    for path in (tmp_path / "23").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"the checkpoint in '.*23' is corrupt .*; remove it to go on"):
        fitted(tmp_path)
    shutil.rmtree(tmp_path / "23")
    assert_same(fitted(tmp_path), unbroken())


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; checkpoints need a folder"):
        fitted(tmp_path / "file")


def test_a_checkpoint_that_cannot_be_written_loses_no_fit(tmp_path):
    """The folder turns into a file during the fit."""
    folder = tmp_path / "steps"

    def remove(step, params):
        if step == 4:
            shutil.rmtree(folder)
            folder.write_text("")

    before = set(threading.enumerate())
    with pytest.warns(UserWarning, match=r"cannot be written to '.*steps' \(.*\); the fit goes on"):
        fit = fitted(folder, on_step=remove)
    new = set(threading.enumerate()) - before
    assert [thread.name for thread in new if not thread.daemon] == []  # nothing holds the process at its end
    assert_same(fit, unbroken())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from infer import test_resume
from bnlora.infer.svi import watch
watch.LOOK = 0.0
test_resume.fitted(sys.argv[1], every=2, num_steps=2000)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_checkpoints_to_go_on_from(tmp_path):
    """SIGKILL while checkpoints are written; what is left is loaded and goes on bit for bit."""
    tests = str(Path(__file__).parents[1])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(tests=tests), str(tmp_path)])
    while not [p for p in tmp_path.iterdir() if p.name.isdigit() and int(p.name) >= 10]:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = max(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
    assert last < 2000
    assert_same(fitted(tmp_path, every=2, num_steps=last + 7), fitted(num_steps=last + 7))


def first_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Wait until there is a complete checkpoint."""
    while not [p for p in folder.glob("*") if p.name.isdigit()]:
        assert process.poll() is None
        time.sleep(0.001)


@pytest.mark.thorough
def test_a_process_killed_at_any_moment_leaves_nothing_but_whole_checkpoints(tmp_path):
    """SIGKILL at 20 random moments, five before the first checkpoint: each fit goes on bit for bit.

    Moments are shares of the life of a process that is not killed.
    """
    sizes, seen = {"every": 2, "num_steps": 120}, Counter()
    script = SCRIPT.format(tests=str(Path(__file__).parents[1])).replace("2000", "120")

    def started(folder: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, str(folder)])

    began, whole = time.monotonic(), started(tmp_path / "whole")
    first_checkpoint(tmp_path / "whole", whole)
    early = time.monotonic() - began
    assert whole.wait() == 0
    late, expected = time.monotonic() - began - early, fitted(num_steps=120)
    moments = np.random.default_rng(2026).uniform(size=20)
    for turn, share in enumerate(moments):
        folder = tmp_path / str(turn)
        process = started(folder)
        if turn % 4:
            first_checkpoint(folder, process)
        time.sleep(share * (late if turn % 4 else early))
        process.kill()
        process.wait()
        names = [path.name for path in folder.glob("*")]
        done = max((int(name) for name in names if name.isdigit()), default=0)
        seen["before the first" if not done else "at the end" if done == 120 else "between"] += 1
        seen["half-written"] += any("tmp" in name for name in names)
        assert_same(fitted(folder, **sizes), expected)
    print(f"killed at 20 moments: {dict(seen)}")
    assert seen["between"] >= 5


@pytest.mark.thorough
def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    """The first lets the fit return and its process end by itself; the second, in the meantime, ends it."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1])).replace("2000", "200000")
    script = script.replace("test_resume.fitted", "fit = test_resume.fitted")
    script += "import time\nprint(fit.stopped, flush=True)\ntime.sleep(600)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    first_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
