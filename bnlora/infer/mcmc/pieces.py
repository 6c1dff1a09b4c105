r"""A run of chains on disk: the warm-up, then the draws in pieces, each with the state at its end.

A folder contains `run.json` (what is run), `warm.npz` and `draws-00000.npz`, `draws-00001.npz`, ... Every
file is written completely or not at all, and contains the mark of its run. A run that finds its own pieces
continues after the last of them. A run that finds the pieces of another run raises an error that names the
differences.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.files import read_json, write_json, write_whole
from bnlora.infer.mcmc.target import Target

RUN, WARM = "run.json", "warm.npz"
_MARK, _DENSITY = "run", "log_density"
_COMPARED = ("sampler", "options", "key", "plan", "versions", "target")


@dataclass(frozen=True)
class Pieces:
    """Where a run stores its pieces; without a folder nothing is stored."""

    folder: Path | None
    mark: str = ""

    @classmethod
    def open(cls, folder: Path | None, record: dict[str, Any], target: Target, starts: Array) -> "Pieces":
        """Prepare the folder.

        Raises:
            ValueError: If it has the pieces of another run.
        """
        if folder is None:
            return cls(None)
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        now = {**record, "target": fingerprint(target, starts)}
        path = folder / RUN
        if path.is_file():
            before = _run_before(path)
            differing = [n for n in _COMPARED if before.get(n) != json.loads(json.dumps(now[n]))]
            # The log-density at the starts reveals another base, prior scale or order of label ids. Older
            # folders lack it.
            if not differing and not np.allclose(
                before.get(_DENSITY, now[_DENSITY]), now[_DENSITY], rtol=1e-3
            ):
                differing.append(_DENSITY)
            if differing:
                shown = "; ".join(f"{n}: {before.get(n)} then, {now[n]} now" for n in differing)
                raise ValueError(
                    f"{str(folder)!r} holds the pieces of another run ({shown}); pass the same arguments to "
                    "continue it, or another folder"
                )
        else:
            write_json(path, now)
        compared = json.dumps({name: now[name] for name in _COMPARED}, sort_keys=True)
        return cls(folder, hashlib.sha256(compared.encode()).hexdigest())

    def warm(self, compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Tuning and state after the warm-up: read if they are stored, else computed and stored."""
        return self._kept(WARM, compute)

    def draws(self, index: int, compute: Callable[[], Any], like: Any = None) -> Any:
        """State and draws of a piece: read if they are stored, else computed and stored.

        `like` has their shapes, if `compute` cannot be traced to find them.
        """
        return self._kept(f"draws-{index:05d}.npz", compute, like)

    def _kept(self, name: str, compute: Callable[[], Any], like: Any = None) -> Any:
        if self.folder is None:
            return compute()
        path = self.folder / name
        if path.is_file():
            return self._read(path, jax.eval_shape(compute) if like is None else like)
        computed = compute()
        arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(computed))}
        arrays[_MARK] = np.array(f"{name} {self.mark}")

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        write_whole(path, write)
        return computed

    def _read(self, path: Path, like: Any) -> Any:
        """The contents of a file, if it is this piece of this run; older files have shapes but no mark."""
        try:
            # Pass an open file, because with a path numpy leaves a broken file open.
            with path.open("rb") as file, np.load(file) as stored:
                kept = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{str(path)!r} is corrupt ({error}); remove it to draw it again") from error
        mark = str(kept.pop(_MARK, f"{path.name} {self.mark}"))
        wanted = {f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(like))}
        shapes = [{name: (x.shape, x.dtype) for name, x in side.items()} for side in (kept, wanted)]
        if mark != f"{path.name} {self.mark}" or shapes[0] != shapes[1]:
            raise ValueError(f"{str(path)!r} is another piece, or of another run; remove it to draw it again")
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(kept[name]) for name in wanted])


def _run_before(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is corrupt ({error}); pass another folder") from error


def fingerprint(target: Target, starts: Array) -> str:
    """Checksum of the target: names and shapes of the sites, parameters, rows and starts."""
    digest = hashlib.sha256(json.dumps({n: list(s) for n, s in target.view.shapes.items()}).encode())
    digest.update(target.held.encode())
    rows = target.rows
    data = rows.tokens, rows.mask, rows.labels, rows.choices, rows.outcomes
    parts = [target.view.params, *data, starts]
    for leaf in jax.tree.leaves(parts):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
