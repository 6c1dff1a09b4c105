r"""A certified reference on disk: function values and predictions, without adapters or the language model.

A comparison does not need the adapters, which are large and not identifiable. A folder contains

- `certificate.json`: the verdict, its numbers, what was sampled and how, and checksums of the other files;
- `draws.nc`: values of the functions by chain and draw, and log-probabilities of the classes by draw and row;
- `held.safetensors`, if sites were fixed: their values and the parameters of the prior, so that another
  posterior can be fixed at the same values.

The rows are not stored. A checksum of their tokens and labels is, so that a comparison on other rows is
refused. Older folders without checksums can be read; their checksums are not tested.

Draws that travel with their certificate are an idea of posteriordb (Magnusson et al. 2024, arXiv 2407.04967).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bnlora._util.files import file_checksum, read_json, write_json, write_whole
from bnlora.assess.comparison.draws import Draws, evenly
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.certificate import Certificate
from bnlora.prediction.functions import PROBES, evaluate, identifiable
from bnlora.prediction.predict import Prediction, predict_with_draws, require_classes
from bnlora.program.model import kind_of
from bnlora.program.protocol import Model

RECORD, DRAWS, HELD = "certificate.json", "draws.nc", "held.safetensors"


@dataclass(frozen=True, repr=False)
class StoredReference:
    """The part of a run of MCMC that a comparison needs.

    Attributes:
        draws: Values of the default functions at every draw, by chain.
        prediction: Log-probabilities of the rows' classes under some of the draws.
        certificate: Results of the checks of the run.
        record: How the run was computed: sampler, options, seed, sizes, seconds, command, versions.
        rows: Checksum of the rows of functions and predictions.
        sites: The adapted sites and label words, in words.
        fixed: Value of every fixed site, by name.
        params: Values of the prior's parameters, if sites were fixed.
    """

    draws: Draws
    prediction: Prediction
    certificate: Certificate
    record: Mapping[str, Any]
    rows: str
    sites: str
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    params: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def families(self) -> tuple[str, ...]:
        """Families whose norms are among the functions."""
        return tuple(n[len("norm[") : -1] for n in self.draws.names if n.startswith("norm["))

    @property
    def holds_unknown(self) -> bool:
        """Whether there are fixed sites without stored values, as in folders of earlier versions."""
        return bool(self.record.get("held")) and not self.fixed

    def thinned_prediction(self, size: int) -> Prediction:
        """The prediction from `size` evenly spaced draws of those stored."""
        log_probs = self.prediction.draw_log_probs
        return Prediction(log_probs[evenly(len(log_probs), size)])

    def __repr__(self) -> str:
        chains, count, functions = self.draws.values.shape
        sampler = self.record.get("sampler", "a sampler")
        sizes = f"{chains} chains of {count} draws, {functions} functions"
        return f"StoredReference({sampler}, {sizes})\n  {self.certificate.verdict}"


def store_reference(
    chains: Any,
    data: Batch,
    *,
    num_draws: int = 400,
    batch_size: int = 32,
    console: Console | None = None,
) -> StoredReference:
    """Evaluate the functions and predictions of a run that comparisons need.

    Args:
        chains: A run of MCMC with `model`, `num_chains`, `stored_adapters`, `certificate` and `record`.
        data: Rows with labels, for the functions (margins at the first eight) and the predictions.
        num_draws: Largest number of draws whose predictions are stored.
        batch_size: Rows to run at a time.
        console: Where to draw the progress bar; the terminal or notebook by default.

    Returns:
        The stored reference.

    Raises:
        ValueError: If the model does not have a label or a token of the rows.

    Example:
        >>> stored = bl.store_reference(chains, rows, num_draws=20)
        >>> stored.prediction.probs.shape
        (8, 2)
    """
    model = chains.model
    require_classes(model, "bl.store_reference")
    model.check_outcomes("data", data)
    adapters = chains.stored_adapters()
    names, values = evaluate(identifiable(model, data[:PROBES]), model, adapters, data)
    chosen = evenly(len(values), min(num_draws, len(values)))
    some = jax.tree.map(lambda x: x[chosen], adapters)
    prediction = predict_with_draws(model, some, data, batch_size=batch_size, console=console)
    draws = Draws(names, values.reshape(chains.num_chains, -1, len(names)), "chains")
    about = dict(chains.record) | {"held": chains.target.held, "thinning": chains.thinning}
    stored = StoredReference(draws, prediction, chains.certificate, about, checksum(data), describe(model))
    if not model.fixed:
        return stored
    fixed, params = (_arrays(values) for values in (model.fixed, chains.target.view.params))
    return replace(stored, fixed=fixed, params=params)


def _arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(value, order="C") for name, value in values.items()}


def describe(model: Any) -> str:
    """Sites, label words and kind of a classifier, in words."""
    classes = f"label ids {model.label_ids}" if model.label_ids else repr(model.likelihood)
    text = f"{model.sites!r}\n{classes}"
    if kind_of(model) == "network":
        return text
    return f"{text}\ntangent model in the frames {model.checksum[:12]}"


def checksum(data: Batch) -> str:
    """Checksum of tokens and labels of rows; padding does not change it."""
    digest = hashlib.sha256()
    for tokens, mask, label in zip(*map(np.asarray, (data.tokens, data.mask, data.labels)), strict=True):
        digest.update(np.asarray([label, *tokens[mask]], np.int64).tobytes())
    return digest.hexdigest()


def save_reference(stored: StoredReference, folder: str | Path) -> None:
    """Write a reference into a folder.

    Args:
        stored: A reference from `store_reference`.
        folder: Folder to write; created if it does not exist.

    Example:
        >>> bl.save_reference(bl.store_reference(chains, rows, num_draws=20), folder / "reference")
        >>> bl.load_reference(folder / "reference").certificate == chains.certificate
        True
    """
    import xarray

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    dataset = xarray.Dataset(
        {
            "values": (("chain", "draw", "function"), stored.draws.values.astype(np.float32)),
            "log_probs": (("sample", "row", "class"), stored.prediction.draw_log_probs.astype(np.float32)),
        },
        coords={"function": list(stored.draws.names)},
    )
    packed = {name: {"zlib": True, "complevel": 9} for name in dataset.data_vars}
    write_whole(
        folder / DRAWS, lambda scratch: dataset.to_netcdf(scratch, engine="h5netcdf", encoding=packed)
    )
    about = {
        "certificate": stored.certificate.to_json(),
        "record": dict(stored.record),
        "rows": stored.rows,
        "sites": stored.sites,
    }
    parts = {"fixed": stored.fixed, "params": stored.params}
    held = {f"{part}.{name}": x for part, values in parts.items() for name, x in values.items()}
    if held:
        write_whole(folder / HELD, lambda scratch: save_file(held, scratch))
    else:
        (folder / HELD).unlink(missing_ok=True)
    about["checksums"] = {
        name: file_checksum(folder / name) for name in ((DRAWS, HELD) if held else (DRAWS,))
    }
    write_json(folder / RECORD, about)


def load_reference(folder: str | Path) -> StoredReference:
    """Read a reference back.

    Args:
        folder: Folder that `save_reference` wrote.

    Returns:
        The reference, for `bnlora.compare`.

    Raises:
        FileNotFoundError: If the folder does not contain a reference.
        ValueError: If a file is corrupt, the files do not belong to one reference, a value is not finite, or
            the probabilities of the classes do not sum to one.

    Example:
        >>> bl.save_reference(bl.store_reference(chains, rows, num_draws=20), folder / "kept")
        >>> bl.load_reference(folder / "kept").prediction.draw_log_probs.shape  # draws, rows, classes
        (20, 8, 2)
    """
    import xarray

    folder = Path(folder).expanduser()
    absent = [name for name in (RECORD, DRAWS) if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{str(folder)!r} contains no reference: it lacks {' and '.join(absent)}")
    try:
        about = read_json(folder / RECORD)
        with xarray.open_dataset(folder / DRAWS, engine="h5netcdf") as dataset:
            names = tuple(str(name) for name in dataset["function"].values)
            values = np.asarray(dataset["values"].values, np.float64)
            log_probs = np.asarray(dataset["log_probs"].values)
        certificate = Certificate.from_json(about["certificate"])
        parts = {name: about[name] for name in ("record", "rows", "sites")}
        held = load_file(folder / HELD) if (folder / HELD).is_file() else {}
        _check(about, folder, values, log_probs)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the reference in {str(folder)!r} is corrupt: {error}") from error
    parts |= {
        part: {n.removeprefix(f"{part}."): x for n, x in held.items() if n.startswith(f"{part}.")}
        for part in ("fixed", "params")
    }
    return StoredReference(Draws(names, values, "chains"), Prediction(log_probs), certificate, **parts)


def _check(about: Mapping[str, Any], folder: Path, values: np.ndarray, log_probs: np.ndarray) -> None:
    """Raise `ValueError` unless the files belong to one reference and their numbers are valid."""
    for name, expected in about.get("checksums", {}).items():  # older folders have none
        if file_checksum(folder / name) != expected:
            raise ValueError(
                f"{name} is not the file that {RECORD} describes: it was changed, or is of another reference"
            )
    if not np.isfinite(values).all():
        raise ValueError(f"{DRAWS} has values that are not finite")
    if not np.allclose(np.exp(log_probs, dtype=np.float64).sum(-1), 1, atol=1e-3):
        raise ValueError(f"{DRAWS} has probabilities of the classes that do not sum to one")


def require_same_problem(stored: StoredReference, model: Model, data: Batch) -> None:
    """Raise `ValueError` unless a reference has these sites, label words and rows."""
    if stored.sites != describe(model):
        raise ValueError(
            f"expected a posterior over the sites of the reference,\n{stored.sites}\ngot\n{describe(model)}"
        )
    if stored.rows != checksum(data):
        raise ValueError("the reference was stored for other rows; give the rows used in `store_reference`")
