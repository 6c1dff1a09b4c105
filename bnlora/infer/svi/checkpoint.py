"""Fits on disk: parameters and record, without the base weights.

A folder contains `fit.safetensors` (parameters, history, the training rows as tokens, and some of the base's
weights) and `fit.json` (counts, versions, the checksum of the other file, sites and label ids). Prior and
guide are programs and are not stored. To load a fit, build the same model and guide first; every name, shape
and range is compared with theirs.

Format 1 lacks checksum, sites, label ids and weights, and stores scalars as vectors of length one. It can
still be read; only names, shapes and ranges are checked.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bnlora._util.files import file_checksum, read_json, write_json
from bnlora._util.fingerprint import fingerprint, is_same
from bnlora.adapters.frames import stored_frames
from bnlora.data.batch import Batch
from bnlora.infer.svi.elbo import parameter_shapes
from bnlora.infer.svi.result import Fit
from bnlora.infer.svi.stored_rows import ROWS, row_arrays, rows_from
from bnlora.models.hosts import leads
from bnlora.priors.core import frames_of
from bnlora.program.model import kind_of
from bnlora.program.protocol import Model

FORMAT, READABLE = 2, (1, 2)
ARRAYS, RECORD = "fit.safetensors", "fit.json"
_COUNTS = ("best_step", "skipped_steps", "num_traces")
_ENDS = ("steps", "patience", "plateau", "interrupted", "diverged", "memory")


def save_fit(fit: Fit, folder: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write a fit into a folder, which is created if needed; a fit in it is replaced.

    All processes of a fit over several call this, and process 0 writes.

    Both files are written under other names and then moved, the record last, so that an interrupted write
    leaves no incomplete fit that looks complete.

    Args:
        fit: The fit.
        folder: Folder to write; created if it does not exist.
        notes: Further entries of the record, such as how model and guide were built, as JSON values.
            `bnlora.infer.svi.checkpoint.read_notes` returns them.

    Raises:
        OSError: If the folder cannot be written; a fit that was in it is still there.

    Example:
        >>> bl.save_fit(fit, folder / "fit")
        >>> sorted(path.name for path in (folder / "fit").iterdir())
        ['fit.json', 'fit.safetensors']
    """
    write_fit(fit, folder, notes or {}, {})


def write_fit(fit: Fit, folder: str | Path, notes: Mapping[str, Any], more: Mapping[str, np.ndarray]) -> None:
    """`save_fit` with further named arrays in the same file."""
    folder = Path(folder).expanduser()
    trees = {name: getattr(fit, name) for name in ("params", "last_params", "history", "validation")}
    arrays = by_path(trees) | {f"train.{name}": value for name, value in row_arrays(fit.train).items()}
    arrays |= {"step_seconds": fit.step_seconds, "draw_key": jax.random.key_data(fit.draw_key)}
    arrays |= {"weights": some_weights(fit.model), **_frame_arrays(fit.model)}
    arrays |= {"guide": fingerprint(constants_of(fit.guide)), **more}
    record = {name: getattr(fit, name) for name in (*_COUNTS, "stopped")} | {"format": FORMAT}
    record |= {"key": str(jax.random.key_impl(fit.draw_key)), "model": identity(fit.model)}
    record |= {"kind": kind_of(fit.model)}
    record |= {"notes": dict(notes)}
    record |= {"versions": {name: version(name) for name in ("bnlora", "jax", "numpyro", "flax")}}
    # safetensors needs contiguous arrays; `np.ascontiguousarray` would turn a scalar into a vector.
    whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    if leads(fit.model.base.mesh):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, whole, record)


def load_fit(folder: str | Path, model: Model, guide: Callable) -> Fit:
    """Read a fit for the model and guide that it was fitted with.

    Args:
        folder: A folder that `save_fit` wrote.
        model: The same classifier, built again: equal base, sites, prior and label ids.
        guide: The same guide, built again.

    Returns:
        The fit, with the same draws as before.

    Raises:
        FileNotFoundError: If there is no fit in the folder.
        ValueError: If a file is corrupt or belongs to another fit, base, sites, label ids or parameters are
            not those of this model and guide, or a number is outside its range.

    Example:
        >>> bl.save_fit(fit, folder / "fit")
        >>> bl.load_fit(folder / "fit", model, guide).best_step == fit.best_step
        True
    """
    folder = Path(folder).expanduser()
    return fit_from(*read_stored(folder), model, guide, folder)


def fit_from(
    record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], model: Model, guide: Callable, folder: Path
) -> Fit:
    """`load_fit` of what `read_stored` returned."""
    if record["format"] > 1:
        _require_same_model(record, arrays, model, folder)
        _require_same_guide(arrays, guide, folder)
    train = rows_from(arrays, model, folder)
    like, allowed = parameter_shapes(model, guide, model.base.weights, train[:1], len(train))
    params, last_params = (_restored(n, like, allowed, arrays, folder) for n in ("params", "last_params"))
    return Fit(
        model=model,
        guide=guide,
        params=params,
        last_params=last_params,
        history=group("history", arrays),
        validation=group("validation", arrays),
        train=train,
        step_seconds=arrays["step_seconds"],
        draw_key=jax.random.wrap_key_data(jnp.asarray(arrays["draw_key"]), impl=record["key"]),
        **{name: record[name] for name in (*_COUNTS, "stopped")},
    )


def read_notes(folder: str | Path) -> dict[str, Any]:
    """The `notes` that `save_fit` wrote, by name; empty if there were none.

    Args:
        folder: A folder that `save_fit` wrote.

    Returns:
        The notes.

    Raises:
        FileNotFoundError: If there is no fit in the folder.
        ValueError: If a file is corrupt or belongs to another fit.
    """
    return read_stored(Path(folder).expanduser())[0].get("notes", {})


def fit_size(model: Model, guide: Callable, train: Batch, num_steps: int) -> int:
    """Size in bytes of a fit of `num_steps` steps on disk, an upper bound."""
    like, _ = parameter_shapes(model, guide, model.base.weights, train[:1], len(train))
    leaves = [*jax.tree.leaves(like)] * 2 + list(row_arrays(train).values())
    numbers = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return numbers + 200 * num_steps + 200 * len(leaves) + 2**17  # the history, names and shapes, the record


def _write(folder: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Replace both files after both are written completely."""
    scratch, new_record = folder / f".{ARRAYS}", folder / f".new-{RECORD}"
    try:
        save_file(dict(arrays), scratch)
        write_json(new_record, {**record, "checksum": file_checksum(scratch)})
        # No record while the arrays are replaced: an interrupt between the two leaves no mixed fit.
        (folder / RECORD).unlink(missing_ok=True)
        os.replace(scratch, folder / ARRAYS)
        os.replace(new_record, folder / RECORD)
    except SafetensorError as error:  # as on a full disk
        raise OSError(f"{str(folder / ARRAYS)!r} cannot be written ({error})") from error
    finally:
        for path in (scratch, new_record):
            path.unlink(missing_ok=True)


def identity(model: Model) -> dict[str, Any]:
    """Label ids and sites, which distinguish a model from others of the same shapes."""
    sites = {f"site {name!r}": asdict(site) for name, site in model.sites.items()}
    return json.loads(json.dumps({"label ids": model.likelihood.record(), **sites}))


def some_weights(model: Model) -> Float[np.ndarray, " k"]:
    """A few numbers of every frozen array: the base's weights and the fixed sites."""
    return fingerprint((model.base.weights, getattr(model, "fixed", {})))


def _frame_arrays(model: Model) -> dict[str, np.ndarray]:
    """The frames of the model's prior, if it has any."""
    frames = frames_of(getattr(model.prior, "program", model.prior))
    return {} if frames is None else stored_frames(frames)


def _require_same_model(
    record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], model: Model, folder: Path
) -> None:
    """Raise `ValueError` unless kind, label ids, sites and frozen weights are those of this model."""
    kind = record.get("kind", "network")  # older records have none
    if kind != kind_of(model):
        raise ValueError(
            f"the fit in {str(folder)!r} is one of a {kind} model; got a {kind_of(model)} model, in which "
            "the same adapters give other predictions"
        )
    then, now = record["model"], identity(model)
    for name in {**then, **now}:
        if name not in then or name not in now:
            raise ValueError(
                f"the fit in {str(folder)!r} has {', '.join(then)}; the model has {', '.join(now)}"
            )
        for part, value in then[name].items():
            if now[name].get(part) != value:
                difference = f"{part} {value} of {name}; got {now[name].get(part, now[name])}"
                raise ValueError(f"the fit in {str(folder)!r} was made with {difference}")
    for name, value in _frame_arrays(model).items():
        then = arrays.get(name, value)
        if then.shape != value.shape or not np.allclose(then, value, atol=1e-4):
            raise ValueError(
                f"the fit in {str(folder)!r} was made with other frames than those of this prior; read its "
                f"own by bl.load_frames({str(folder)!r}, base)"
            )
    stored, weights = arrays["weights"], some_weights(model)
    if not is_same(stored, weights):
        raise ValueError(
            f"the fit in {str(folder)!r} was made with a base other than {model.base!r}, or with other "
            "values of the fixed sites; its frozen weights differ"
        )


def constants_of(guide: Callable) -> Any:
    """The fixed arrays of a guide, such as the coordinates of `around`."""
    return getattr(guide, "constants", {})


def _require_same_guide(arrays: Mapping[str, np.ndarray], guide: Callable, folder: Path) -> None:
    """Raise `ValueError` unless the guide has the fit's fixed arrays; machines may turn eigenvectors."""
    now = fingerprint(constants_of(guide))
    if not is_same(arrays.get("guide", now), now):  # older records have none
        raise ValueError(
            f"the fit in {str(folder)!r} was made with a guide around another Gaussian, whose coordinates "
            "its parameters use; pass that Gaussian, or keep fits of bl.fit_core by bl.save_core"
        )


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, such as `params['q_proj.a.V.q.flow'].first[0]`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{path[0].key}{jax.tree_util.keystr(path[1:])}": leaf for path, leaf in leaves}


def group(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of one mapping by key, the inverse of `by_path`."""
    prefix = f"{name}['"
    return {key[len(prefix) : -2]: value for key, value in arrays.items() if key.startswith(prefix)}


def _restored(
    name: str, like: Any, allowed: Mapping[str, Any], arrays: Mapping[str, np.ndarray], folder: Path
) -> Any:
    """A tree of parameters; `ValueError` unless names, shapes and ranges are those of model and guide."""
    wanted = {key: leaf.shape for key, leaf in by_path({name: like}).items()}
    stored = {key: value for key, value in arrays.items() if key.startswith(f"{name}[")}
    for key in wanted.keys() & stored.keys():
        if wanted[key] == () and stored[key].shape == (1,):  # as format 1 stores scalars
            stored[key] = stored[key].reshape(())
    differing = sorted(k for k in wanted.keys() & stored.keys() if wanted[k] != stored[k].shape)
    problems = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "not of this model": sorted(stored.keys() - wanted.keys()),
        "of another shape": [f"{key} {stored[key].shape} instead of {wanted[key]}" for key in differing],
    }
    what = "; ".join(f"{kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys)
    if what:
        raise ValueError(f"the fit in {str(folder)!r} was made with another prior, guide or sites ({what})")
    values = jax.tree.unflatten(jax.tree.structure(like), [stored[key] for key in wanted])
    for parameter, tree in values.items():
        if not all(_is_allowed(allowed[parameter], leaf) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"{parameter!r} in {str(folder)!r} has a value outside its range, {allowed[parameter]}; the "
                "file was changed, or belongs to another fit"
            )
    return jax.tree.map(jnp.asarray, values)


def _is_allowed(constraint: Any, value: np.ndarray) -> bool:
    """Whether a value is finite and in its range or on its edge, since a tiny value may round to zero."""
    if not np.isfinite(value).all():
        return False
    step = np.asarray(1e-6 * np.maximum(np.abs(value), 1), value.dtype)
    return any(np.all(constraint(x)) for x in (value, value + step, value - step))


def read_stored(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Record and arrays of a stored fit, after a check that both are complete."""
    absent = [name for name in (RECORD, ARRAYS) if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{str(folder)!r} holds no fit: it lacks {' and '.join(absent)}")
    try:
        record = read_json(folder / RECORD)
        arrays = load_file(folder / ARRAYS)
        form = record.get("format")
    except (ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"the fit in {str(folder)!r} is corrupt or truncated ({error})") from error
    if form not in READABLE:
        raise ValueError(
            f"the fit in {str(folder)!r} has format {form!r}; this version of bnlora reads "
            f"formats {' and '.join(map(str, READABLE))}"
        )
    problem = _problem(record, arrays)
    if form > 1 and not problem and record["checksum"] != file_checksum(folder / ARRAYS):
        problem = (
            f"{ARRAYS} is not the file that {RECORD} describes: it belongs to another fit, or was changed"
        )
    if problem:
        raise ValueError(f"the fit in {str(folder)!r} is corrupt: {problem}")
    return record, arrays


def _problem(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The problem with the record, or with arrays that every fit has; empty if there is none."""
    newer = record["format"] > 1
    needed = {*(f"train.{name}" for name in ROWS), "step_seconds", "draw_key"} | (
        {"weights"} if newer else set()
    )
    entries = {*_COUNTS, "stopped", "key"} | ({"checksum", "model", "notes"} if newer else set())
    for expected, stored, file in ((needed, arrays, ARRAYS), (entries, record, RECORD)):
        if expected - stored.keys():
            return f"{file} lacks {', '.join(sorted(expected - stored.keys()))}"
    for name in _COUNTS:
        if type(record[name]) is not int or record[name] < 0:
            return f"{name!r} in {RECORD} must be a whole number of at least 0; got {record[name]!r}"
    if record["stopped"] not in _ENDS:
        return f"'stopped' in {RECORD} must be one of {', '.join(_ENDS)}; got {record['stopped']!r}"
    lengths = {value.shape for value in group("history", arrays).values()} | {arrays["step_seconds"].shape}
    return "" if len(lengths) == 1 else f"the columns of the history in {ARRAYS} differ in length"
