"""Frozen work done once: the activations below the lowest adapted layer, computed for every row.

They are constants of the data. Training, prediction and Monte Carlo start from them and run only
the layers above; with an adapted head alone nothing of the transformer is left to run.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bnlora._util.progress import speaker, track
from bnlora.data.batch import Batch, CachedActivations, Features, Part, parts
from bnlora.models.sharding import whole
from bnlora.program.protocol import Model


def cache_prefix(
    model: Model,
    batch: Batch,
    *,
    batch_size: int = 16,
    memory_limit: int = 4 * 2**30,
    console: Console | None = None,
) -> Batch:
    """Compute the activations below the lowest adapted layer and keep them with the batch.

    Args:
        model: The classifier whose sites decide the depth.
        batch: Rows to cache; returned unchanged where they are cached for this model already, or no layer is
            below the adapters. What was cached for another model is computed again.
        batch_size: Rows to run at a time.
        memory_limit: Largest size of the cache in bytes.
        console: Where to print the size and the progress bar; the terminal or notebook when omitted.

    Returns:
        The batch with `cached`, the activations and their depth.

    Raises:
        ValueError: When the cache would exceed `memory_limit`, or a row has a token that the base has no row
            for.

    Example:
        >>> bl.cache_prefix(model, rows)
        Batch(8 rows of 8 positions, activations of depth 2 cached)
    """
    model.check_tokens(batch)
    if model.is_prepared(batch):
        return batch
    size = model.cache_bytes(batch)
    if size > memory_limit:
        raise ValueError(
            f"caching {len(batch)} rows takes {size / 2**20:,.0f} MiB, more than the limit of "
            f"{memory_limit / 2**20:,.0f} MiB; raise `memory_limit` or fit with prefix_cache='off'"
        )
    text = f"{_LABELS[model.kind]}: {len(batch)} rows through {_layers(model)}, {size / 2**20:,.1f} MiB"
    speaker(console).print(text, highlight=False)
    # A tangent model starts from cached activations.
    known = batch.caches(model.first_layer, model.trunk.checksum)
    rows, made = batch if known else batch.plain, _Cache(batch)
    widths: Literal["few", "many"] = "few" if known else "many"
    for part in tracked_parts(rows, batch_size, _LABELS[model.kind], console, widths=widths):
        made.write(whole(model.base.mesh, model.prepare(part.batch)), part)
    return made.added_to(rows)


def tracked_parts(
    batch: Batch,
    batch_size: int,
    label: str,
    console: Console | None,
    *,
    narrow: bool = True,
    widths: Literal["many", "few"] = "many",
) -> Iterator[Part]:
    """The parts of a batch, as `bnlora.data.batch.parts` cuts them, while a bar counts them."""
    count = -(-len(batch) // batch_size)
    return track(parts(batch, batch_size, narrow=narrow, widths=widths), count, label, console)


_LABELS = {"network": "prefix cache", "tangent": "tangent features"}


def _layers(model: Model) -> str:
    total = model.base.num_layers
    return f"{total} layers" if model.kind == "tangent" else f"{model.first_layer} of {total} layers"


class _Cache:
    """What `prepare` adds to a batch, collected part by part."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.arrays: dict[str, np.ndarray] = {}
        self.marks: dict[str, Any] = {}

    def write(self, computed: Batch, part: Part) -> None:
        rows = len(self.batch)
        if computed.features is not None:
            self.marks = {"frames": computed.frames}
            for name, values in computed.features._asdict().items():
                self._put(name, (rows, *values.shape[1:]), part.rows, values)
        elif computed.cached is not None:
            self.marks = {"depth": computed.cached.depth, "trunk": computed.cached.trunk}
            shape = (*self.batch.tokens.shape, computed.cached.hidden.shape[-1])
            choices = (slice(None),) * (len(shape) - 3)
            self._put("hidden", shape, (part.rows, *choices, part.columns), computed.cached.hidden)

    def _put(self, name: str, shape: tuple[int, ...], where: Any, values: Any) -> None:
        if name not in self.arrays:
            self.arrays[name] = np.zeros(shape, np.float32)
        count = len(where[0] if isinstance(where, tuple) else where)
        self.arrays[name][where] = np.asarray(values)[:count]

    def added_to(self, batch: Batch) -> Batch:
        arrays = {name: jnp.asarray(x) for name, x in self.arrays.items()}
        if "phi" in arrays:
            return replace(batch, features=Features(**arrays), **self.marks)
        if "hidden" in arrays:
            return replace(batch, cached=CachedActivations(arrays["hidden"], **self.marks))
        return batch
