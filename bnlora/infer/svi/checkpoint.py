"""Fits on disk: everything that was learned and recorded, without the base weights.

A folder with `fit.safetensors` (parameters, history, the rows that were fitted, as tokens) and `fit.json`
(counts, versions, the checksum of the other file, and what identifies the model: sites, label ids, and some
of the base's weights). A prior and a guide are programs and are not stored. To load a fit, build the same
model and guide first; every name, shape and range is checked against them.

Format 1 has no checksum, sites, label ids or weights, and stores scalars as vectors of length one. It is
still read; only names, shapes and ranges are checked.
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
from bnlora.priors.core import frames_of
from bnlora.program.model import kind_of
from bnlora.program.protocol import Model

FORMAT, READABLE = 2, (1, 2)
ARRAYS, RECORD = "fit.safetensors", "fit.json"
_COUNTS = ("best_step", "skipped_steps", "num_traces")
_ENDS = ("steps", "patience", "plateau", "interrupted", "diverged")
_ROWS = ("tokens", "mask", "labels")


def save_fit(fit: Fit, folder: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write a fit into a folder, which is made if it is not there; a fit that it holds is replaced.

    The record is written last and both files appear at once, so that an interrupted write leaves no fit
    that looks whole.

    Args:
        fit: The fit.
        folder: Folder to write; made where there is none.
        notes: What else to keep in the record, such as how model and guide were made: whatever JSON can say.
            `bnlora.infer.svi.checkpoint.read_notes` gives it back.

    Raises:
        OSError: When the folder cannot be written; a fit that it held is still there.

    Example:
        >>> bl.save_fit(fit, folder / "fit")
        >>> sorted(path.name for path in (folder / "fit").iterdir())
        ['fit.json', 'fit.safetensors']
    """
    write_fit(fit, folder, notes or {}, {})


def write_fit(fit: Fit, folder: str | Path, notes: Mapping[str, Any], more: Mapping[str, np.ndarray]) -> None:
    """`save_fit` with further arrays in the same file, under names of their own."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    trees = {name: getattr(fit, name) for name in ("params", "last_params", "history", "validation")}
    arrays = by_path(trees) | {f"train.{name}": getattr(fit.train, name) for name in _ROWS}
    arrays |= {"step_seconds": fit.step_seconds, "draw_key": jax.random.key_data(fit.draw_key)}
    arrays |= {"weights": _some_weights(fit.model), **_frame_arrays(fit.model)}
    arrays |= {"guide": fingerprint(_constants(fit.guide)), **more}
    record = {name: getattr(fit, name) for name in (*_COUNTS, "stopped")} | {"format": FORMAT}
    record |= {"key": str(jax.random.key_impl(fit.draw_key)), "model": _told(fit.model)}
    record |= {"kind": kind_of(fit.model)}
    record |= {"notes": dict(notes)}
    record |= {"versions": {name: version(name) for name in ("bnlora", "jax", "numpyro", "flax")}}
    # safetensors needs one block of memory; `np.ascontiguousarray` would make a vector of a scalar.
    _write(folder, {name: np.asarray(value, order="C") for name, value in arrays.items()}, record)


def load_fit(folder: str | Path, model: Model, guide: Callable) -> Fit:
    """Read a fit back onto the model and guide that it was made with.

    Args:
        folder: A folder that `save_fit` wrote.
        model: The same classifier, built again: equal base, sites, prior and label ids.
        guide: The same guide, built again.

    Returns:
        The fit, with the same draws as before.

    Raises:
        FileNotFoundError: When the folder holds no fit.
        ValueError: When a file is corrupt or belongs to another fit, base, sites, label ids or parameters are
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
    train = _rows(arrays, model, folder)
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
    """The `notes` that `save_fit` was given, by name; none where it was given none.

    Args:
        folder: A folder that `save_fit` wrote.

    Returns:
        The notes.

    Raises:
        FileNotFoundError: When the folder holds no fit.
        ValueError: When a file is corrupt or belongs to another fit.
    """
    return read_stored(Path(folder).expanduser())[0].get("notes", {})


def fit_size(model: Model, guide: Callable, train: Batch, num_steps: int) -> int:
    """Bytes that a fit of so many steps takes on disk, rounded up."""
    like, _ = parameter_shapes(model, guide, model.base.weights, train[:1], len(train))
    leaves = [*jax.tree.leaves(like)] * 2 + [getattr(train, name) for name in _ROWS]
    numbers = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return numbers + 200 * num_steps + 200 * len(leaves) + 2**17  # the history, names and shapes, the record


def _write(folder: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Replace both files, once both are written whole."""
    scratch, told = folder / f".{ARRAYS}", folder / f".new-{RECORD}"
    try:
        save_file(dict(arrays), scratch)
        write_json(told, {**record, "checksum": file_checksum(scratch)})
        (folder / RECORD).unlink(missing_ok=True)
        os.replace(scratch, folder / ARRAYS)
        os.replace(told, folder / RECORD)
    except SafetensorError as error:  # as on a full disk
        raise OSError(f"{str(folder / ARRAYS)!r} cannot be written ({error})") from error
    finally:
        for path in (scratch, told):
            path.unlink(missing_ok=True)


def _told(model: Model) -> dict[str, Any]:
    """What distinguishes a model from others of the same shapes."""
    sites = {f"site {name!r}": asdict(site) for name, site in model.sites.items()}
    return json.loads(json.dumps({"label ids": {"ids": model.label_ids}, **sites}))


def _some_weights(model: Model) -> Float[np.ndarray, " k"]:
    """A few numbers of every frozen array: the base's weights and the sites that are held."""
    return fingerprint((model.base.weights, getattr(model, "fixed", {})))


def _frame_arrays(model: Model) -> dict[str, np.ndarray]:
    """The frames that the model's prior keeps its updates in, if it has any."""
    frames = frames_of(getattr(model.prior, "program", model.prior))
    return {} if frames is None else stored_frames(frames)


def _require_same_model(
    record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], model: Model, folder: Path
) -> None:
    """Raise unless the fit was made with the kind, label ids, sites and frozen weights of this model."""
    kind = record.get("kind", "network")  # older ones have none
    if kind != kind_of(model):
        raise ValueError(
            f"the fit in {str(folder)!r} is one of a {kind} model; got a {kind_of(model)} model, under which "
            "the same adapters mean something else"
        )
    then, now = record["model"], _told(model)
    for name in {**then, **now}:
        if name not in then or name not in now:
            raise ValueError(
                f"the fit in {str(folder)!r} has {', '.join(then)}; the model has {', '.join(now)}"
            )
        for part, value in then[name].items():
            if now[name].get(part, value) != value:
                told = f"{part} {value} of {name}; got {now[name][part]}"
                raise ValueError(f"the fit in {str(folder)!r} was made with {told}")
    for name, value in _frame_arrays(model).items():
        then = arrays.get(name, value)
        if then.shape != value.shape or not np.allclose(then, value, atol=1e-4):
            raise ValueError(
                f"the fit in {str(folder)!r} was made with other frames than those of this prior; read its "
                f"own by bl.load_frames({str(folder)!r}, base)"
            )
    stored, weights = arrays["weights"], _some_weights(model)
    if not is_same(stored, weights):
        raise ValueError(
            f"the fit in {str(folder)!r} was made over another base than {model.base!r}, or with other "
            "values of the sites that are held; its weights are others"
        )


def _constants(guide: Callable) -> Any:
    """The arrays that a guide holds fixed, such as the coordinates of `around`."""
    return getattr(guide, "constants", {})


def _require_same_guide(arrays: Mapping[str, np.ndarray], guide: Callable, folder: Path) -> None:
    """Raise unless the guide's fixed arrays are those of the fit; eigenvectors can turn between machines."""
    now = fingerprint(_constants(guide))
    if not is_same(arrays.get("guide", now), now):  # older ones have none
        raise ValueError(
            f"the fit in {str(folder)!r} was made with a guide around another Gaussian, in whose coordinates "
            "its parameters are; give that Gaussian, or keep fits of bl.fit_core by bl.save_core"
        )


def _rows(arrays: Mapping[str, np.ndarray], model: Any, folder: Path) -> Batch:
    """The fitted rows, whose tokens and labels are those of this model."""
    tokens, mask, labels = (arrays[f"train.{name}"] for name in _ROWS)
    kinds = tokens.dtype.kind + mask.dtype.kind + labels.dtype.kind
    if kinds != "ibi" or tokens.ndim != 2 or mask.shape != tokens.shape or labels.shape != tokens.shape[:1]:
        raise ValueError(f"the fit in {str(folder)!r} is corrupt: its rows are not tokens, mask and labels")
    sizes = {"tokens": (tokens[mask], model.base.config.vocab_size, "tokens of the base")}
    sizes |= {"labels": (labels, len(model.label_ids), "classes of the model")}
    for name, (values, size, of) in sizes.items():
        if values.size == 0 or values.min() < 0 or values.max() >= size:
            wrong = values[(values < 0) | (values >= size)]
            raise ValueError(
                f"the {name} of the rows in {str(folder)!r} must be from 0 to {size - 1}, the {size} {of}; "
                f"got {wrong[0] if wrong.size else 'none'}"
            )
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(labels))


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, such as `params['q_proj.a.V.q.flow'].first[0]`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{path[0].key}{jax.tree_util.keystr(path[1:])}": leaf for path, leaf in leaves}


def group(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of one mapping that `by_path` has named, by their keys in it."""
    prefix = f"{name}['"
    return {key[len(prefix) : -2]: value for key, value in arrays.items() if key.startswith(prefix)}


def _restored(
    name: str, like: Any, allowed: Mapping[str, Any], arrays: Mapping[str, np.ndarray], folder: Path
) -> Any:
    """A tree of parameters; their names, shapes and ranges are those that model and guide declare."""
    wanted = {key: leaf.shape for key, leaf in by_path({name: like}).items()}
    found = {key: value for key, value in arrays.items() if key.startswith(f"{name}[")}
    for key in wanted.keys() & found.keys():
        if wanted[key] == () and found[key].shape == (1,):  # how format 1 has scalars
            found[key] = found[key].reshape(())
    differing = sorted(k for k in wanted.keys() & found.keys() if wanted[k] != found[k].shape)
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not of this model": sorted(found.keys() - wanted.keys()),
        "of another shape": [f"{key} {found[key].shape} instead of {wanted[key]}" for key in differing],
    }
    said = "; ".join(f"{what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys)
    if said:
        raise ValueError(f"the fit in {str(folder)!r} was made with another prior, guide or sites ({said})")
    values = jax.tree.unflatten(jax.tree.structure(like), [found[key] for key in wanted])
    for parameter, tree in values.items():
        if not all(_is_allowed(allowed[parameter], leaf) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"{parameter!r} in {str(folder)!r} has a value outside its range, {allowed[parameter]}; the "
                "file was changed, or is another's"
            )
    return jax.tree.map(jnp.asarray, values)


def _is_allowed(constraint: Any, value: np.ndarray) -> bool:
    """Whether a value is finite and in its range, including the edge: a tiny value may round to zero."""
    if not np.isfinite(value).all():
        return False
    step = np.asarray(1e-6 * np.maximum(np.abs(value), 1), value.dtype)
    return any(np.all(constraint(x)) for x in (value, value + step, value - step))


def read_stored(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Record and arrays of a folder that holds a fit, once both are known to be whole."""
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
        problem = f"{ARRAYS} is not the file that {RECORD} describes: it is another fit's, or was changed"
    if problem:
        raise ValueError(f"the fit in {str(folder)!r} is corrupt: {problem}")
    return record, arrays


def _problem(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """What is wrong with the record, or with arrays that every fit has; empty where nothing is."""
    newer = record["format"] > 1
    needed = {*(f"train.{name}" for name in _ROWS), "step_seconds", "draw_key"} | (
        {"weights"} if newer else set()
    )
    entries = {*_COUNTS, "stopped", "key"} | ({"checksum", "model", "notes"} if newer else set())
    for expected, found, file in ((needed, arrays, ARRAYS), (entries, record, RECORD)):
        if expected - found.keys():
            return f"{file} lacks {', '.join(sorted(expected - found.keys()))}"
    for name in _COUNTS:
        if type(record[name]) is not int or record[name] < 0:
            return f"{name!r} in {RECORD} must be a whole number of at least 0; got {record[name]!r}"
    if record["stopped"] not in _ENDS:
        return f"'stopped' in {RECORD} must be one of {', '.join(_ENDS)}; got {record['stopped']!r}"
    lengths = {value.shape for value in group("history", arrays).values()} | {arrays["step_seconds"].shape}
    return "" if len(lengths) == 1 else f"the columns of the history in {ARRAYS} differ in length"
