r"""Checkpoints of a fit: the state on disk from which the same call goes on, bit for bit.

A checkpoint contains the parameters, the state of the optimiser, the record of the steps and the validation
looks. Minibatches and guide draws are functions of the fit's key and the number of the step, so a fit that
goes on from a checkpoint has the same bits as one that was never interrupted. Orbax writes each checkpoint
under a temporary name, in the background, and renames it when it is complete; it removes the oldest ones.

Every checkpoint carries the mark of its fit: key, rows, model, guide, optimiser, options and versions. A fit
that finds checkpoints of another fit raises an error that names the differences.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpyro import handlers
from safetensors.numpy import load, save

from bnlora._util.checks import check_at_least
from bnlora._util.files import room
from bnlora._util.fingerprint import fingerprint, is_same
from bnlora.data.batch import Batch
from bnlora.infer.svi.checkpoint import by_path, constants_of, group, identity, some_weights
from bnlora.infer.svi.elbo import run_once
from bnlora.infer.svi.step import State, Step
from bnlora.infer.svi.stored_rows import row_arrays
from bnlora.infer.svi.validation import Validation
from bnlora.models.hosts import gathered, handed, is_shared, leads
from bnlora.models.sharding import put
from bnlora.priors.declared import runnable

RECORD = "record"
"""Name of the record among the arrays of a checkpoint."""

FINISHED = ("steps", "patience", "plateau", "diverged")
"""Ends of a fit after which its checkpoint has nothing to go on with, unless more steps are asked for."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a fit keeps its state, and how often.

    The same call of `bnlora.fit` goes on from the last checkpoint in the folder. After a fit has ended, the
    same call returns its result at once, and a call with a larger `num_steps` goes on with it.

    Attributes:
        folder: Folder of the checkpoints of one fit; created if needed.
        every: Steps between checkpoints. The last state is always kept, also after an interrupt.
        keep: Number of checkpoints to keep.

    Raises:
        ValueError: If `every` or `keep` is below one.

    Example:
        >>> kept = bl.Checkpoints(folder / "steps", every=2)
        >>> short = {"batch_size": 4, "checkpoints": kept}
        >>> first = bl.fit(key, model, guide, rows, optax.adam(0.01), num_steps=4, **short)
        >>> again = bl.fit(key, model, guide, rows, optax.adam(0.01), num_steps=6, **short)
        >>> len(again.history["elbo"]), bool(again.history["elbo"][3] == first.history["elbo"][3])
        (6, True)
    """

    folder: str | Path
    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_at_least({"every": self.every, "keep": self.keep}, 1)


class Kept:
    """The open checkpoints of a fit; without a folder nothing is kept.

    Of several processes the first one reads and writes the folder, and hands the others what it read.

    Args:
        where: Folder and options, or None.
        mark: What identifies the fit (`mark_of`).
        over: Mesh of the fit, which may span several processes.

    Raises:
        OSError: If the folder cannot be written.
    """

    def __init__(
        self, where: Checkpoints | None, mark: Callable[[], Mapping[str, Any]], over: Mesh | None = None
    ):
        self._manager: Any = None
        self._over, self._where = over, where
        self._writing: Future[Any] | None = None
        self.every = None if where is None else where.every
        if where is None:
            return
        self._folder, self._mark = Path(where.folder).expanduser().absolute(), mark()
        if leads(over):
            self._open(where.keep)

    def _open(self, keep: int) -> None:
        import orbax.checkpoint as ocp  # late: it takes as long as JAX itself to import

        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"{str(self._folder)!r} is a file; checkpoints need a folder")
        with room(self._folder):  # or an error in one sentence
            pass
        self._folder.mkdir(exist_ok=True)  # Orbax does not where only one of several processes writes
        # The thread is ours: after a failed write, Orbax's own wait for five minutes and hold the process.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        alone = (
            {"active_processes": {0}, "barrier_sync_key_prefix": "bnlora"} if is_shared(self._over) else {}
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**alone),
        )
        self._manager, self._args = ocp.CheckpointManager(self._folder, options=options), ocp.args

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the last checkpoint is complete."""
        self._finish()
        if self._manager is not None:
            self._manager.close()
            self._thread.shutdown()

    def _finish(self) -> None:
        """Wait for the last write; if it failed, warn and keep no more: the fit is worth more than these."""
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if error is None:
            return
        self._manager.close()
        self._thread.shutdown()
        self._manager = self.every = None
        reason = str(error).strip().partition("\n")[0][:200]
        warnings.warn(
            f"checkpoints cannot be written to {str(self._folder)!r} ({reason}); the fit goes on without "
            "them",
            stacklevel=2,
        )

    def resumed(self, state: State, loop: Step, look: Validation) -> tuple[State, str | None]:
        """The state of the last checkpoint, if there is one, and why that fit had ended, if it had.

        The records of loop and validation are filled. A fit that had done all its steps has not ended if it
        now has more of them.

        Raises:
            ValueError: If the folder has checkpoints of another fit, or the last one is corrupt.
        """
        if self._where is None:
            return state, None
        content = handed(self._over, self._last)
        if not content:
            return state, None
        arrays = load(content)
        record = json.loads(arrays.pop(RECORD).tobytes())
        self._require_same(record["mark"])
        for name, values in record["look"].items():
            setattr(look, name, values)
        columns = group("history", arrays)
        loop.steps.cut(0)
        loop.steps.add(columns)
        if look.best_step:
            look.best_params = _filled("best", state.params, arrays)
        ended = record["stopped"] if record["stopped"] in FINISHED else None
        return _filled("state", state, arrays), None if ended == "steps" else ended

    def save(self, state: State, loop: Step, look: Validation, stopped: str | None = None) -> None:
        """Keep the state if it is time or the fit ends; `stopped` says why it ends."""
        step = len(loop.steps)
        due = self.every is not None and step % self.every == 0
        if self._manager is None or (stopped is None and not due):
            return
        self._finish()
        if self._manager is None or step in {0, self._manager.latest_step()}:
            return
        history = {name: loop.steps.column(name) for name in loop.steps.names}
        named = by_path(jax.device_get({"state": state, "best": look.best_params, "history": history}))
        arrays = {name: np.asarray(x) for name, x in named.items() if np.size(x)}  # Orbax refuses empty ones
        record = {"steps": step, "stopped": stopped, "mark": self._mark}
        record["look"] = {name: getattr(look, name) for name in ("steps", "losses", "best_step")}
        items = {"arrays": self._args.StandardSave(arrays), "record": self._args.JsonSave(record)}
        self._writing = self._thread.submit(self._manager.save, step, args=self._args.Composite(**items))

    def _last(self) -> bytes:
        """The last checkpoint as the bytes of a file of safetensors; none if there is no checkpoint."""
        step = self._manager.latest_step()
        if step is None:
            return b""
        items = {"arrays": self._args.StandardRestore(), "record": self._args.JsonRestore()}
        try:
            found = self._manager.restore(step, args=self._args.Composite(**items))
            record = np.frombuffer(json.dumps(found.record).encode(), np.uint8)
            return save({RECORD: record} | {n: np.asarray(x, order="C") for n, x in found.arrays.items()})
        except Exception as error:  # noqa: BLE001 (Orbax and TensorStore raise what they like)
            raise ValueError(
                f"the checkpoint in {str(self._folder / str(step))!r} is corrupt "
                f"({str(error).partition(chr(10))[0][:200]}); remove it to go on from the one before"
            ) from error

    def _require_same(self, before: Mapping[str, Any]) -> None:
        shown = _differences(before, self._mark)
        if shown:
            raise ValueError(
                f"{str(self._folder)!r} holds checkpoints of another fit ({shown}); pass the same "
                "arguments to go on with it, or another folder"
            )


def require_same_call(over: Mesh | None, about: Callable[[], Mapping[str, Any]]) -> None:
    """Raise `ValueError` in every process of a mesh unless all of them make the same call.

    Args:
        over: Mesh of the fit.
        about: What must be the same, as JSON values.
    """
    if not is_shared(over):
        return
    own = about()
    shown = _differences(json.loads(handed(over, json.dumps(own).encode)), own, "here")
    differing = np.flatnonzero(gathered(over, bool(shown)))
    if differing.size:
        what = f" ({shown})" if shown else ""
        raise ValueError(
            f"all processes must make the same call; process {differing[0]} differs from process 0{what}"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], word: str = "now") -> str:
    """The entries of two marks that differ, in words."""
    now = json.loads(json.dumps(now))
    differing = [name for name in {**before, **now} if not _agree(before.get(name), now.get(name))]
    pairs = {name: (_brief(before.get(name)), _brief(now.get(name))) for name in differing}
    return "; ".join(f"{name}: {then}, {word} {new}" for name, (then, new) in pairs.items())


def call_of(key: Array, model: Any, rows: Mapping[str, Batch | None], **options: Any) -> dict[str, Any]:
    """What of a call can be compared before anything is computed; the arguments are those of `mark_of`."""
    marks = {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "label ids and sites": identity(model),
        "frozen weights": _numbers(some_weights(model)),
    }
    marks |= {f"{name} rows": _checksum(batch) for name, batch in rows.items()}
    return marks | {name: _plain(value) for name, value in options.items()}


def mark_of(
    key: Array, loop: Step, state: State, rows: Mapping[str, Batch | None], **options: Any
) -> dict[str, Any]:
    """What identifies a fit: everything that its bits depend on.

    Args:
        key: Random key of the fit.
        loop: Its step.
        state: Its first state.
        rows: Training and validation rows.
        **options: Further arguments, such as the rules that stop it.
    """
    prior = runnable(loop.model.prior)
    shapes = {name: f"{leaf.shape} {leaf.dtype}" for name, leaf in by_path({"state": state}).items()}
    update = jax.make_jaxpr(loop.optimizer.update)(state.params, state.optimizer, state.params)
    return call_of(key, loop.model, rows, **options) | {
        "guide": _numbers(fingerprint(constants_of(loop.guide))),
        "prior": _numbers(fingerprint(run_once(lambda: handlers.seed(prior, jax.random.key(0))()))),
        "parameters": shapes,
        "optimiser": hashlib.sha256(str(update).encode()).hexdigest()[:16],
        "num_particles": loop.num_particles,
        "versions": {name: version(name) for name in ("bnlora", "jax", "numpyro", "optax")},
    }


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _numbers(vector: np.ndarray) -> dict[str, list[float]]:
    """A fingerprint as JSON, which is compared up to rounding."""
    return {"numbers": np.asarray(vector, float).tolist()}


def _checksum(batch: Batch | None) -> str | None:
    if batch is None:
        return None
    digest = hashlib.sha256()
    for name, value in row_arrays(batch).items():
        digest.update(name.encode() + np.asarray(value).tobytes())
    return f"{len(batch)} rows {digest.hexdigest()[:16]}"


def _agree(then: Any, now: Any) -> bool:
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys() == {"numbers"}:
        return is_same(np.array(then["numbers"]), np.array(now["numbers"]))
    return then == now


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _filled(prefix: str, like: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The tree `like` with the stored arrays, on its devices."""
    values = [
        put(arrays[name].astype(leaf.dtype).reshape(leaf.shape), leaf.sharding) if leaf.size else leaf
        for name, leaf in by_path({prefix: like}).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), values)
