"""Long runs: memory and speed of a fit of many steps, and of a prediction of many rows from disk to disk.

The model is tiny, so that what the library itself keeps of every step and row is not hidden by the model. The
fit runs in this process, and its resident memory is sampled in a thread. The slope is that of a regression of
the means over 1,000 steps, after a warm-up of a quarter of the steps, with a 95 % interval. The prediction is
the command `bnlora predict` in a process of its own, on a terminal, so that it draws its bar. It is ended if
its resident memory exceeds a bound.
"""

import argparse
import json
import os
import pty
import random
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import scipy.stats
from rich.console import Console

import bnlora as bl
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.testing import tiny_base, tiny_rows

ROOT = Path(__file__).parents[2]
EVERY = 0.01
"""Seconds between two samples of the memory."""

BLOCK = 1000
"""Steps over which samples are averaged."""


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--bound", type=int, default=1024, help="largest memory of the prediction, MiB")
    parser.add_argument("--only", choices=("fit", "predict"), help="one of the two")


def run(given: argparse.Namespace, report: Report) -> None:
    """The fit, and predictions of a twentieth of the rows and of all of them."""
    if given.only != "predict":
        long_fit(given.steps, report)
    if given.only != "fit":
        long_prediction(given, report)


def resident(process: int | str = "self") -> float:
    """Resident memory of a process in KiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**10


@contextmanager
def sampled() -> Iterator[list[tuple[float, float]]]:
    """Times and resident memory of this process while the block runs."""
    samples: list[tuple[float, float]] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(EVERY):
            samples.append((time.perf_counter(), resident()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def long_fit(num_steps: int, report: Report) -> None:
    """Fit, and show the slope of the memory."""
    base = tiny_base(jax.random.key(0), num_layers=1)
    sites = bl.select(base, ["lm_head"], rank=1)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide, rows = bl.guides.Guide(model.prior, bl.guides.mean_field()), tiny_rows(jax.random.key(1), 256)
    sizes: dict[str, Any] = {"num_steps": num_steps, "batch_size": 16, "console": Console(quiet=True)}
    with sampled() as samples, clock() as took:
        began = time.perf_counter()
        fit = bl.fit(jax.random.key(2), model, guide, rows, optax.adam(1e-3), **sizes)
    slope, half, used = slope_of(samples, began + took.wall - np.cumsum(fit.step_seconds[::-1])[::-1])
    speed = num_steps / fit.step_seconds[1:].sum()
    table = report.table("A long fit", ("steps", "traces of the step", "steps/s", "KiB per 1,000 steps"))
    table.row(f"{num_steps:,}", fit.num_traces, f"{speed:,.0f}", f"{slope:,.0f} ± {half:,.0f}")
    numbers = len(fit.history) + 2  # the skipped steps and the seconds
    report.text(
        "A long fit",
        f"± is a 95 % interval, of a regression of {used} means over {BLOCK:,} steps after a quarter of the "
        "steps.",
        f"The record of the steps has {numbers} numbers of eight bytes for each, "
        f"{8 * numbers * BLOCK / 2**10:,.0f} KiB per 1,000 steps.",
    )


def slope_of(samples: list[tuple[float, float]], ends: np.ndarray) -> tuple[float, float, int]:
    """KiB per 1,000 steps, half of the 95 % interval, and the number of means; `ends` are times of steps."""
    times, memory = np.array(samples).T
    steps = np.searchsorted(ends, times)
    late = (steps >= len(ends) / 4) & (steps < len(ends))
    blocks = steps[late] // BLOCK
    means = np.array([memory[late][blocks == b].mean() for b in np.unique(blocks)])
    if len(means) < 3:
        return float("nan"), float("nan"), len(means)
    line = scipy.stats.linregress(np.unique(blocks), means)
    return line.slope, scipy.stats.t.ppf(0.975, len(means) - 2) * line.stderr, len(means)


def long_prediction(given: argparse.Namespace, report: Report) -> None:
    """Predict a few rows and all of them, each in a new process."""
    header = ("rows", "seconds", "rows/s", "largest resident memory", "bar on the terminal")
    table = report.table("A prediction from disk to disk", header)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        words = ["--word", " bad", "--word", " good", "--base", str(folder / "model"), "--target", "lm_head"]
        write_rows(folder / "train.csv", 64)
        small = ["--rank", "1", "--top-layers", "1", "--steps", "2", "--batch-size", "8"]
        command = [
            sys.executable,
            "-m",
            "bnlora",
            "fit",
            str(folder / "train.csv"),
            "--out",
            str(folder / "fit"),
        ]
        subprocess.run([*command, *words, *small], check=True, capture_output=True)
        for rows in (given.rows // 20, given.rows):
            write_rows(folder / "rows.csv", rows)
            result = predicted(folder, given)
            table.row(
                f"{rows:,}", f"{result['seconds']:,.0f}", f"{rows / result['seconds']:,.0f}",
                f"{result['peak'] / 2**10:,.0f} MiB", "yes" if result["bar"] else "no",
            )  # fmt: skip
    report.text(
        "A prediction from disk to disk",
        f"`bnlora predict` with {given.draws} draws, CSV to CSV; ended above {given.bound:,} MiB.",
    )


def predicted(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds, largest memory in KiB, and whether there was a bar.

    Raises:
        MemoryError: If the memory exceeds the bound.
    """
    command = [sys.executable, "-m", "bnlora", "predict", str(folder / "fit"), str(folder / "rows.csv")]
    command += ["--out", str(folder / "out.csv"), "--draws", str(given.draws), "--json"]
    terminal, theirs = pty.openpty()
    drawn: list[bytes] = []
    began, largest = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    threading.Thread(target=drain, args=(terminal, drawn), daemon=True).start()
    while process.poll() is None:
        time.sleep(EVERY)
        try:
            largest = max(largest, resident(process.pid))
        except (FileNotFoundError, IndexError, ProcessLookupError):  # it has just ended
            break
        if largest > given.bound * 2**10:
            process.kill()
            raise MemoryError(f"the prediction has {largest / 2**10:,.0f} MiB, above --bound {given.bound}")
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(b"".join(drawn).decode(errors="replace"))
    seconds = time.perf_counter() - began
    rows = sum(1 for _ in (folder / "out.csv").open(encoding="utf-8")) - 1
    assert json.loads(out)["rows"] == rows
    return {"seconds": seconds, "peak": largest, "bar": b"predict" in b"".join(drawn)}


def drain(terminal: int, into: list[bytes]) -> None:
    """Read what a process writes to its terminal, until it ends; the last kilobytes are enough."""
    try:
        while content := os.read(terminal, 2**16):
            into[:] = [*into, content][-64:]
    except OSError:  # how the end of a terminal is told on Linux
        return


def write_rows(path: Path, count: int) -> None:
    """Sentences of a few words, one at a time."""
    stream = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for number in range(count):
            words = [
                stream.choice(["the plot is", "the film was", "Review: good"])
                for _ in range(stream.randint(1, 4))
            ]
            file.write(f"{' '.join(words)} {['bad', 'good'][number % 2]},{number % 2}\n")


def write_model(folder: Path) -> None:
    """The tiny model of the tests, with a tokenizer of a few words."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False
    )
    texts = ["the plot is good", "the film was bad", "Review: good", "Sentiment: bad good"] * 20
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|end|>", model_max_length=64)
    tokenizer.save_pretrained(folder)
    reference = runpy.run_path(str(ROOT / "tests" / "references" / "make_reference.py"))
    config = reference["CONFIGS"]["grouped"] | {"vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: np.ascontiguousarray(x) for name, x in reference["tiny_tensors"](config).items()}
    save_file(tensors, folder / "model.safetensors")
