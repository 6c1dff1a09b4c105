"""Fits over several processes: they agree with one process, stop together, and outlive the loss of one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import hosts as script
from builders.commands import WORDS, reviews
from builders.thorough import sample_of

import bnlora as bl
from bnlora.app.outcome import ExitCode
from bnlora.data.tables import write_table
from bnlora.models import hosts
from bnlora.testing import tiny_base

TESTS = Path(__file__).parents[1]
LONGEST = 300
"""Seconds after which a process counts as hanging."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def started(*words: object, devices: int = 1) -> subprocess.Popen:
    """A process of Python with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    places = f"{TESTS.parent}{os.pathsep}{TESTS}"
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": places},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each; none is left running."""
    try:
        texts = [process.communicate(timeout=LONGEST) for process in processes]
        return [(process.returncode, *pair) for process, pair in zip(processes, texts, strict=True)]
    finally:
        for process in processes:
            process.kill()


# Two processes and one, by how the weights are split and which process is killed ----------------------------


@pytest.fixture(scope="module", params=sample_of(["tensor 1", "fully 0"], ["tensor 1"]))
def found(request, tmp_path_factory) -> dict[str, Any]:
    """What both processes and the one with two devices measured, and how they ended."""
    split, victim = request.param.split()
    folder, port = tmp_path_factory.mktemp("hosts"), free_port()
    path = TESTS / "builders" / "hosts.py"
    both = ended(*(started(path, folder, port, process, split, victim) for process in (0, 1)))
    one = tmp_path_factory.mktemp("alone")
    ((code, _, messages),) = ended(started(path, one, port, "alone", split, victim, devices=2))
    assert code == 0, messages[-2000:]
    written = [folder / "0.json", folder / "1.json", one / "alone.json"]
    assert all(path.exists() for path in written), both
    first, second, alone = (json.loads(path.read_text()) for path in written)
    return {"0": first, "1": second, "alone": alone, "ends": both, "folder": folder, "victim": int(victim)}


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(found):
    """They went on from a checkpoint. Sums in another order: some tens of roundings of float32."""
    for what in ("bound", "nll"):
        np.testing.assert_allclose(found["0"]["fit"][what], found["alone"]["fit"][what], rtol=2e-5)
    np.testing.assert_allclose(found["0"]["probabilities"], found["alone"]["probabilities"], rtol=2e-5)
    assert found["0"]["fit"]["traces"] == 1


@pytest.mark.slow
def test_both_processes_have_the_same_bits(found):
    for what in ("fit", "probabilities", "interrupted"):
        assert found["0"][what] == found["1"][what]


@pytest.mark.slow
def test_an_interrupt_of_one_process_stops_both_at_the_same_step(found):
    for process in ("0", "1"):
        stopped = found[process]["interrupted"]
        assert (stopped["stopped"], len(stopped["bound"])) == ("interrupted", script.STOP)


@pytest.mark.slow
def test_processes_with_other_rows_are_refused(found):
    sentence = "all processes must make the same call; process 1 differs from process 0"
    assert found["0"]["other rows"] == sentence
    assert found["1"]["other rows"].startswith(f'{sentence} (training rows: "24 rows ')


@pytest.mark.slow
def test_chains_are_refused(found):
    assert "chains need a base on devices of one process; got devices of 2" in found["0"]["chains"]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_sentence(found):
    """JAX itself ends the others: at once where its coordinator, process 0, is gone."""
    survivor = 1 - found["victim"]
    assert found["ends"][found["victim"]][0] == -signal.SIGKILL
    code, _, messages = found["ends"][survivor]
    assert code == -signal.SIGABRT
    assert "another task died" in messages
    if survivor == 0:
        sentence = json.loads((found["folder"] / "lost.json").read_text())
        assert sentence.startswith("one of the 2 processes is lost (")
        assert "start all of them again" in sentence


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(found):
    folder = found["folder"] / "killed"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    # A process 0 that outlives the other keeps the last state too; a killed one only what was complete.
    assert steps == [4, script.DEAD] if found["victim"] else steps
    base = tiny_base(jax.random.key(1), num_layers=1 if found["victim"] else 2)
    fit = script.fitted(base, folder, looks=False)
    np.testing.assert_allclose(fit.history["elbo"], found["alone"]["fit"]["bound"], rtol=2e-5)


@pytest.mark.slow
def test_a_fit_of_two_processes_is_read_by_one(found):
    base = tiny_base(jax.random.key(1), num_layers=1 if found["victim"] else 2)
    kept = bl.load_fit(found["folder"] / "fit", *script.built(base))
    assert kept.history["elbo"].tolist() == found["0"]["fit"]["bound"]


# The command line ------------------------------------------------------------------------------------------

SMALL = ["--steps", "4", "--batch-size", "4", "--rank", "2", "--top-layers", "1", "--target", "lm_head"]


@pytest.mark.thorough
def test_the_command_fits_in_two_processes(tiny_folder, tmp_path):
    write_table(reviews(12), tmp_path / "train.csv")
    command = ["-m", "bnlora", "fit", tmp_path / "train.csv", "--out", tmp_path / "fit", "--json"]
    command += ["--base", tiny_folder, *WORDS, *SMALL, "--coordinator", f"localhost:{free_port()}"]
    runs = ended(*(started(*command, "--processes", 2, "--process", process) for process in (0, 1)))
    assert [code for code, *_ in runs] == [0, 0], runs
    # Gloo itself prints a line before the result.
    assert json.loads(runs[0][1].splitlines()[-1])["steps"] == 4
    assert "{" not in runs[1][1]
    assert {path.name for path in (tmp_path / "fit").iterdir()} == {
        "fit.json", "fit.safetensors", "recipe.json",
    }  # fmt: skip
    again = ended(*(started(*command, "--processes", 2, "--process", process) for process in (0, 1)))
    assert again[0][0] == ExitCode.BAD_INPUT
    assert "already contains a fit" in again[0][2]
    assert again[1][0] != 0


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinator", ["", "host", "host:", ":1", "host:0", "host:70000", "host:x"])
def test_an_address_without_a_port_is_refused(coordinator):
    with pytest.raises(ValueError, match="coordinator must be HOST:PORT"):
        bl.hosts(coordinator, num_processes=2, process_id=0)


def test_numbers_of_processes_are_checked():
    with pytest.raises(ValueError, match="process_id must be from 0 to 1, for 2 processes; got 2"):
        bl.hosts("localhost:1", num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="num_processes must be at least 1; got 0"):
        bl.hosts("localhost:1", num_processes=0, process_id=0)


def test_one_process_has_nothing_to_join():
    bl.hosts("localhost:1", num_processes=1, process_id=0)
    assert not jax.distributed.is_initialized()


def test_without_other_processes_nothing_is_exchanged():
    assert hosts.told(None, 1.5, 2) == [1.5, 2]
    assert hosts.handed(None, lambda: b"abc") == b"abc"
    assert hosts.gathered(None, 3, 4).tolist() == [[3, 4]]
    assert hosts.leads(None)
    with pytest.raises(ValueError, match="Gloo"), hosts.guarded(None):
        raise ValueError("Gloo")
