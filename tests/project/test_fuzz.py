"""Files that are not trusted: every reader raises an error of the library's own and allocates little.

`make test` reads a few hundred changed files of each kind, `make thorough` a million in all. A file that was
read wrongly becomes a test of its own, beside the others of its reader.
"""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from builders.checkpoint_files import write_folder, write_gguf
from builders.mutations import write_changed
from builders.thorough import EVERY

import bnlora as bl
from bnlora.adapters.peft import load_peft, peft_sites, save_peft
from bnlora.app.recipe import FILE, Recipe
from bnlora.data.tables import read_table
from bnlora.infer.svi.checkpoint import ARRAYS, RECORD, read_stored
from bnlora.models import families
from bnlora.models.gguf_file import read_parts
from bnlora.models.loading import _read_json, _safetensors
from bnlora.models.tensors import TensorFiles
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
LARGEST = 64 * 2**20
"""Bytes that reading a file of some kilobytes may take."""


class Kind(NamedTuple):
    """A kind of file: how many changed ones `make test` and `make thorough` read, which, and how."""

    count: int
    thorough: int
    files: tuple[str, ...]
    read: Callable[[Path], object]


def of_safetensors(folder: Path) -> None:
    tensors = TensorFiles(_safetensors(folder / "model.safetensors"))
    for name in tensors:
        tensors[name]


def of_gguf(folder: Path) -> None:
    for tensor in read_parts(folder / "tiny.gguf")[1]:
        tensor.read()


def of_config(folder: Path) -> None:
    config = _read_json(folder, "config.json")
    (families.FAMILIES | families.ENCODERS)[families.family_of(config)].read_config(config)


BASE = tiny_base(KEY, num_layers=2)
SITES = bl.select(BASE, ["q_proj", "down_proj"], rank=2)
MODEL = bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5))

KINDS = {
    "safetensors": Kind(400, 300_000, ("model.safetensors",), of_safetensors),
    "gguf": Kind(150, 50_000, ("tiny.gguf",), of_gguf),
    "config": Kind(400, 300_000, ("config.json",), of_config),
    "adapter": Kind(
        150, 100_000, ("adapter_config.json", "adapter_model.safetensors"), lambda f: load_peft(f, SITES)
    ),
    "adapter's sites": Kind(150, 100_000, ("adapter_config.json",), lambda f: peft_sites(f, BASE)),
    "fit": Kind(150, 50_000, (RECORD, ARRAYS), read_stored),
    "recipe": Kind(300, 100_000, (FILE,), Recipe.from_folder),
    "monitor": Kind(100, 20_000, ("monitor.json",), lambda f: bl.monitor.load_monitor(f / "monitor.json")),
    "csv": Kind(150, 20_000, ("rows.csv",), lambda f: read_table(f / "rows.csv")),
    "jsonl": Kind(150, 20_000, ("rows.jsonl",), lambda f: read_table(f / "rows.jsonl")),
    "parquet": Kind(150, 20_000, ("rows.parquet",), lambda f: read_table(f / "rows.parquet")),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, bytes]:
    """The content of one valid file of each kind."""
    from datasets import Dataset

    from bnlora.data.tables import write_table

    folder = write_folder(tmp_path_factory.mktemp("valid") / "all")
    write_gguf(folder / "tiny.gguf")
    save_peft(adapters(), folder, sites=SITES, base=BASE)
    guide = bl.guides.Guide(MODEL.prior, bl.guides.mean_field())
    rows = tiny_rows(KEY, 8)
    fit = bl.fit(KEY, MODEL, guide, rows, optax.adam(0.01), num_steps=2, batch_size=4)
    bl.save_fit(fit, folder)
    Recipe(words=(" bad", " good")).save(folder)
    seen = bl.Prediction(np.log(np.random.default_rng(0).dirichlet([1, 1], (2, 40))))
    monitor = bl.monitor.Monitor.start(KEY, seen, np.arange(40) % 2).update(seen, np.zeros(40, int), "today")
    bl.monitor.save_monitor(monitor, folder / "monitor.json")
    table = Dataset.from_dict({"text": ["good", 'a "quoted", bad\none', "ü"] * 4, "label": [0, 1, 0] * 4})
    for ending in ("csv", "jsonl", "parquet"):
        write_table(table, folder / f"rows.{ending}")
    return {name: (folder / name).read_bytes() for kind in KINDS.values() for name in kind.files}


def adapters() -> dict:
    return {
        name: {factor: jax.numpy.ones(shape) for factor, shape in site.shapes.items()}
        for name, site in SITES.items()
    }


def is_refusal(error: BaseException) -> bool:
    """Whether an error is one of the library's own: a ValueError or an OSError with a sentence."""
    own = isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError)
    return own and bool(str(error).strip())


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_file_is_read_or_refused(name, valid, tmp_path):
    """Whatever is wrong, the error is a ValueError or an OSError with a sentence, never one of the depths."""
    kind, random = KINDS[name], np.random.default_rng(2026)
    count = kind.thorough if EVERY else kind.count
    refused = 0
    for turn in range(count):
        for file in kind.files:
            (tmp_path / file).write_bytes(valid[file])
        file = tmp_path / kind.files[int(random.integers(0, len(kind.files)))]
        write_changed(random, file, valid[file.name])
        if turn % 20 == 0:
            tracemalloc.start()
        try:
            kind.read(tmp_path)
        except BaseException as error:
            if not is_refusal(error):
                (tmp_path / f"{turn}-{file.name}").write_bytes(file.read_bytes())  # pytest keeps the folder
                said = f"turn {turn}, {file.name}: {type(error).__name__}: {error}"
                raise AssertionError(said) from error
            refused += 1
        if tracemalloc.is_tracing():
            assert tracemalloc.get_traced_memory()[1] < LARGEST, f"turn {turn}, {file.name}"
            tracemalloc.stop()
    assert refused > 0.2 * count


def test_the_valid_files_are_read(valid, tmp_path):
    for kind in KINDS.values():
        for file in kind.files:
            (tmp_path / file).write_bytes(valid[file])
        kind.read(tmp_path)
