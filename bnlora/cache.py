"""Frozen work done once: the activations below the lowest adapted layer, computed for every row.

They are constants of the data. Training, prediction and Monte Carlo start from them and run only
the layers above; with an adapted head alone nothing of the transformer is left to run.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bnlora.data import Batch, parts
from bnlora.progress import speaker, track


def prefix_bytes(model: Any, batch: Batch) -> int:
    """Memory that the cached activations of `batch` take, in bytes (float32)."""
    rows, length = batch.tokens.shape
    return rows * length * model.base.config.d_model * 4


def cache_prefix(
    model: Any,
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
        The batch with `hidden`, shape `(n, t, d)`, and its `depth`.

    Raises:
        ValueError: When the cache would exceed `memory_limit`, or a row has a token that the base has no row
            for.

    Example:
        >>> bl.cache_prefix(model, rows)
        Batch(8 rows of 8 positions, activations of depth 2 cached)
    """
    model.check_tokens(batch)
    depth = model.start
    if depth == 0 or batch.caches(depth, model.trunk):
        return batch
    size = prefix_bytes(model, batch)
    if size > memory_limit:
        raise ValueError(
            f"caching {len(batch)} rows takes {size / 2**20:,.0f} MiB, more than the limit of "
            f"{memory_limit / 2**20:,.0f} MiB; raise `memory_limit` or fit with prefix_cache='off'"
        )
    through = f"{depth} of {model.base.num_layers} layers"
    text = f"prefix cache: {len(batch)} rows through {through}, {size / 2**20:,.1f} MiB"
    speaker(console).print(text, highlight=False)
    hidden = np.zeros((*batch.tokens.shape, model.base.config.d_model), np.float32)
    count = -(-len(batch) // batch_size)
    for part in track(parts(batch.plain, batch_size), count, "prefix cache", console):
        computed = np.asarray(model.with_hidden(part.batch).hidden)
        hidden[part.rows, part.columns] = computed[: len(part.rows)]
    return replace(batch, hidden=jnp.asarray(hidden), depth=depth, trunk=model.trunk)
