"""Settings of every test, and a tiny model on disk whose tokenizer knows a few words.

JAX runs on the CPU, programs are compiled once for all tests, pictures need no screen.
"""

import collections
import gc
import itertools
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import matplotlib as mpl
import numpy as np
import pytest
from builders.thorough import EVERY
from builders.turns import PARTS, part, part_of
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from bnlora._util.caching import programs_folder

SETTINGS = {
    "jax_platforms": "cpu",
    # Many tests build the same small program: the library's folder serves all tests, workers and checkouts.
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(programs_folder()),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    # Programs here are tiny and run once or twice: most of a test's time is their compilation.
    "jax_disable_most_optimizations": True,
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the processes that tests start
# Tests have a process for each core: a compiler that splits its work among threads only loses time.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    # The way of older compilers, in half the time; later ones end the process at the name of the flag.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
mpl.use("agg")
# Python's collector takes a tenth of the time if it runs as often as it does by itself.
gc.set_threshold(50_000, 20, 100)
# No verdict depends on how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# `BNLORA_TEST_SEED=1 make fast` moves every seed. A verdict that moves with them is a matter of luck.
OFFSET = int(os.environ.get("BNLORA_TEST_SEED", "0"))


def moved(original: Callable) -> Callable:
    def with_another_seed(seed=None, *args, **options):
        return original(seed + OFFSET if isinstance(seed, int) else seed, *args, **options)

    return with_another_seed


if OFFSET:
    jax.random.key, jax.random.PRNGKey = moved(jax.random.key), moved(jax.random.PRNGKey)
    np.random.default_rng = moved(np.random.default_rng)

MOST_MAPS = 15_000
"""Pieces of mapped memory at the end of a file above which compiled programs are dropped."""

CORPUS = ["the plot is good", "the film was bad", "Review: good", "Sentiment: bad good"] * 20


SECONDS = Path(__file__).parent / "seconds.json"
"""Seconds of each test file in one run; `make seconds` writes them anew."""


def pytest_report_header() -> str:
    """Which of the slow tests run."""
    turn = part()
    if turn is None:
        return "slow tests: all"
    return f"slow tests: those of part {turn} of 0 to {PARTS - 1}; `make whole` takes all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out thorough tests, and slow ones whose turn it is not; start with the slowest files.

    So the workers end together.
    """
    turn = part()

    def left_out(item: pytest.Item) -> bool:
        waits = turn is not None and item.get_closest_marker("slow") and part_of(item.nodeid) != turn
        return bool(waits or (not EVERY and item.get_closest_marker("thorough")))

    config.hook.pytest_deselected(items=list(filter(left_out, items)))
    items[:] = itertools.filterfalse(left_out, items)
    known = json.loads(SECONDS.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -known.get(item.nodeid.partition("::")[0], 0))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: compressed ones carry the time, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the slowest files, and keep the seconds of all where `BNLORA_SECONDS` says so."""
    seconds: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("slowest ten files")
    for name, value in seconds.most_common(10):
        terminalreporter.write_line(f"{value:6.0f} s {name}")
    if "BNLORA_SECONDS" in os.environ:
        kept = {name: round(value) for name, value in sorted(seconds.items()) if value >= 1}
        SECONDS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Every compiled program holds mapped memory, of which a process may have only so many pieces (65,530).

    What is kept serves the next file: small operations are the same in all of them.
    """
    yield
    if too_many_maps():
        gc.collect()  # models of the file, which keep programs of their own
    if too_many_maps():
        jax.clear_caches()


def too_many_maps() -> bool:
    maps = Path("/proc/self/maps")
    return not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has every word of `CORPUS` as one token."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|end|>", model_max_length=64)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer) -> Path:
    """A Hugging Face folder of a random Llama with three layers and that tokenizer."""
    reference = runpy.run_path(str(Path(__file__).parent / "references" / "make_reference.py"))
    config = reference["CONFIGS"]["grouped"] | {"vocab_size": len(tokenizer)}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    tensors = {name: np.ascontiguousarray(x) for name, x in reference["tiny_tensors"](config).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
