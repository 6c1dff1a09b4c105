"""Fits on disk: everything that was learned and recorded, without the base weights.

A folder with `fit.safetensors` (parameters, history, the rows that were fitted, as tokens) and `fit.json`
(counts and versions). A prior and a guide are programs and are not stored: whoever loads a fit builds the
same model and guide first, and every name and shape is checked against them.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bnlora.data import Batch
from bnlora.elbo import parameter_shapes
from bnlora.files import write_json
from bnlora.fits import Fit

FORMAT = 1
ARRAYS, RECORD = "fit.safetensors", "fit.json"
_COUNTS = ("best_step", "skipped_steps", "num_traces", "stopped")
_ROWS = ("tokens", "mask", "labels")


def save_fit(fit: Fit, folder: str | Path) -> None:
    """Write a fit into a folder, which is made if it is not there; a fit that it holds is replaced.

    The record is written last and both files appear at once, so that an interrupted write leaves no fit
    that looks whole.

    Args:
        fit: The fit.
        folder: Folder to write; made where there is none.

    Example:
        >>> bl.save_fit(fit, folder / "fit")
        >>> sorted(path.name for path in (folder / "fit").iterdir())
        ['fit.json', 'fit.safetensors']
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    trees = {name: getattr(fit, name) for name in ("params", "last_params", "history", "validation")}
    arrays = _by_path(trees) | {f"train.{name}": getattr(fit.train, name) for name in _ROWS}
    arrays |= {"step_seconds": fit.step_seconds, "draw_key": jax.random.key_data(fit.draw_key)}
    record = {name: getattr(fit, name) for name in _COUNTS}
    record |= {"format": FORMAT, "key": str(jax.random.key_impl(fit.draw_key))}
    record |= {"versions": {name: version(name) for name in ("bnlora", "jax", "numpyro", "flax")}}
    scratch = folder / f".{ARRAYS}"
    # safetensors needs one block of memory; `np.ascontiguousarray` would make a vector of a scalar.
    save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, scratch)
    (folder / RECORD).unlink(missing_ok=True)
    os.replace(scratch, folder / ARRAYS)
    write_json(folder / RECORD, record)


def load_fit(folder: str | Path, model: Any, guide: Callable) -> Fit:
    """Read a fit back onto the model and guide that it was made with.

    Args:
        folder: A folder that `save_fit` wrote.
        model: The same classifier, built again: equal sites and an equal prior.
        guide: The same guide, built again.

    Returns:
        The fit, with the same draws as before.

    Raises:
        FileNotFoundError: When the folder holds no fit.
        ValueError: When a file is corrupt, or the parameters are not those of this model and guide.

    Example:
        >>> bl.save_fit(fit, folder / "fit")
        >>> bl.load_fit(folder / "fit", model, guide).best_step == fit.best_step
        True
    """
    folder = Path(folder).expanduser()
    record, arrays = _read(folder)
    tokens, mask, labels = (jnp.asarray(arrays[f"train.{name}"]) for name in _ROWS)
    train = Batch(tokens, mask, labels)
    like, _ = parameter_shapes(model, guide, model.base.params, train[:1], len(train))
    return Fit(
        model=model,
        guide=guide,
        params=_restored("params", like, arrays, folder),
        last_params=_restored("last_params", like, arrays, folder),
        history=_group("history", arrays),
        validation=_group("validation", arrays),
        train=train,
        step_seconds=arrays["step_seconds"],
        draw_key=jax.random.wrap_key_data(jnp.asarray(arrays["draw_key"]), impl=record["key"]),
        **{name: record[name] for name in _COUNTS},
    )


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, such as `params['q_proj.a.V.q.flow'].first[0]`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{path[0].key}{jax.tree_util.keystr(path[1:])}": leaf for path, leaf in leaves}


def _group(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = f"{name}['"
    return {key[len(prefix) : -2]: value for key, value in arrays.items() if key.startswith(prefix)}


def _restored(name: str, like: Any, arrays: dict[str, np.ndarray], folder: Path) -> Any:
    wanted = {key: leaf.shape for key, leaf in _by_path({name: like}).items()}
    # Versions before 0.2 wrote numbers as vectors of one.
    arrays = arrays | {
        k: arrays[k].reshape(()) for k, s in wanted.items() if s == () and k in arrays and arrays[k].size == 1
    }
    stored = {key: value.shape for key, value in arrays.items() if key.startswith(f"{name}[")}
    differing = sorted(k for k in wanted.keys() & stored.keys() if wanted[k] != stored[k])
    problems = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "not of this model": sorted(stored.keys() - wanted.keys()),
        "of another shape": [f"{key} {stored[key]} instead of {wanted[key]}" for key in differing],
    }
    found = "; ".join(f"{what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"the fit in {str(folder)!r} was made with another prior, guide or sites ({found})")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[key]) for key in wanted])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    absent = [name for name in (RECORD, ARRAYS) if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{str(folder)!r} holds no fit: it lacks {' and '.join(absent)}")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the fit in {str(folder)!r} is corrupt or truncated ({error})") from error
    if record.get("format") != FORMAT:
        raise ValueError(
            f"the fit in {str(folder)!r} has format {record.get('format')!r}; this version of bnlora reads "
            f"format {FORMAT}"
        )
    return record, arrays
